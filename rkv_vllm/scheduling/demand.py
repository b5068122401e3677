"""How many blocks the running requests will ask of the pool within the next steps.

Knows books and requests, no policy. Next: kept_group.py for groups that are not compressed,
pressure.py, which compares the sum with what is free.
"""

from collections.abc import Iterable, Sequence

from vllm.utils.math_utils import cdiv
from vllm.v1.request import Request

from rkv_vllm.scheduling.books import GroupBooks
from rkv_vllm.scheduling.kept_group import KeptGroup


class Demand:
    """Counts blocks over all KV-cache groups, compressed or not.

    Exact in compressed groups for requests that decode; in the others no less than what is taken
    beyond what is given back.

    Args:
        books: of the compressed groups.
        kept: the other groups.
        max_model_len: tokens that no request exceeds.
        max_advance: most tokens by which one step takes a decoding request on.

    Attributes:
        max_advance: see above.
    """

    def __init__(
        self,
        books: Sequence[GroupBooks],
        kept: Sequence[KeptGroup],
        max_model_len: int,
        max_advance: int,
    ) -> None:
        self._books = books
        self._kept = kept
        self._block_sizes = [group.block_size for group in (*books, *kept)]
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
        blocks = num_running * sum(cdiv(tokens, block_size) for block_size in self._block_sizes)
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
        for books in self._books:
            tokens = longest - books.num_evicted.get(req_id, 0)
            # A request that decodes has one token to compute.
            if books.longest_prefill and request.num_computed_tokens < request.num_tokens - 1:
                most = books.longest_prefill(req_id) + num_steps * self.max_advance
                tokens = min(tokens, most)
            blocks += max(cdiv(tokens, books.block_size) - len(books.req_to_blocks[req_id]), 0)
        if self._kept:
            # Of a prefill any part may be in flight.
            left = request.num_tokens - request.num_computed_tokens
            in_flight = request.num_in_flight_tokens + num_steps * self.max_advance + max(left, 0)
            blocks += sum(group.growth(req_id, longest, in_flight) for group in self._kept)
        return blocks

    def longest(self, request: Request, num_steps: int) -> int:
        """Tokens that a running request reaches at most, the rest of its prefill whole."""
        now = max(request.num_computed_tokens, request.num_tokens)
        return min(now + num_steps * self.max_advance, final_len(request, self._max_model_len))


def final_len(request: Request, max_model_len: int) -> int:
    """Most tokens that a request can reach."""
    return min(request.num_prompt_tokens + request.max_tokens, max_model_len)
