"""How many blocks the running requests will ask of the pool within the next steps.

Knows vLLM's managers and requests, no policy. Next: pressure.py, which compares it with what is
free.
"""

from collections.abc import Iterable, Sequence

from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.request import Request

from rkv_vllm.scheduling.books import GroupBooks


class Demand:
    """Counts blocks over all KV-cache groups, compressed or not.

    Exact for requests that decode; for groups that give blocks back by themselves, as
    sliding-window ones do, an upper bound.

    Args:
        managers: of all groups.
        max_model_len: tokens that no request exceeds.
        max_advance: most tokens by which one step takes a decoding request on.

    Attributes:
        max_advance: see above.
    """

    def __init__(
        self, managers: Sequence[SingleTypeKVCacheManager], max_model_len: int, max_advance: int
    ) -> None:
        self._managers = managers
        self._max_model_len = max_model_len
        self.max_advance = max_advance

    def most(self, num_running: int, prefilling: Iterable[Request], num_steps: int) -> int:
        """No less than the demand of these requests, without looking at those that decode.

        Args:
            num_running: all running requests.
            prefilling: those of them that have not computed all their tokens.
            num_steps: ahead of the next one, it included.
        """
        tokens = num_steps * self.max_advance
        blocks = num_running * sum(cdiv(tokens, manager.block_size) for manager in self._managers)
        return blocks + sum(self.of(request, num_steps) for request in prefilling)

    def of(self, request: Request, num_steps: int) -> int:
        """Blocks that one running request will ask for.

        Args:
            request: that runs; the rest of its prefill counts whole.
            num_steps: ahead of the next one, it included.
        """
        req_id = request.request_id
        longest = self.longest(request, num_steps)
        blocks = 0
        for manager in self._managers:
            tokens = longest
            if isinstance(manager, GroupBooks):
                tokens -= manager.num_evicted.get(req_id, 0)
                # A request that decodes has one token to compute.
                if manager.longest_prefill and request.num_computed_tokens < request.num_tokens - 1:
                    most = manager.longest_prefill(req_id) + num_steps * self.max_advance
                    tokens = min(tokens, most)
            blocks += max(cdiv(tokens, manager.block_size) - len(manager.req_to_blocks[req_id]), 0)
        return blocks

    def longest(self, request: Request, num_steps: int) -> int:
        """Tokens that a running request reaches at most, the rest of its prefill whole."""
        now = max(request.num_computed_tokens, request.num_tokens)
        return min(now + num_steps * self.max_advance, final_len(request, self._max_model_len))


def final_len(request: Request, max_model_len: int) -> int:
    """Most tokens that a request can reach."""
    return min(request.num_prompt_tokens + request.max_tokens, max_model_len)
