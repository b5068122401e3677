"""How many blocks the running requests will ask of the pool within the next steps.

Knows books and requests, no policy. Next: kept_group.py for groups that are not compressed,
pressure.py, which compares the sum with what is free.
"""

from collections.abc import Iterable, Sequence

from vllm.utils.math_utils import cdiv
from vllm.v1.request import Request

from rkv_vllm.limits import Limits
from rkv_vllm.scheduling.books import GroupBooks
from rkv_vllm.scheduling.kept_group import KeptGroup


class Demand:
    """Counts blocks over all KV-cache groups, compressed or not.

    Exact in compressed groups for requests that decode; in the others no less than what is taken
    beyond what is given back.

    Args:
        books: of the compressed groups.
        kept: the other groups.
        limits: of the engine.

    Attributes:
        limits: see above.
    """

    def __init__(
        self, books: Sequence[GroupBooks], kept: Sequence[KeptGroup], limits: Limits
    ) -> None:
        self._books = books
        self._kept = kept
        self._block_sizes = [group.block_size for group in (*books, *kept)]
        self.limits = limits

    def most(self, num_running: int, prefilling: Iterable[Request], num_steps: int) -> int:
        """No less than the demand of these requests, without looking at those that decode.

        Args:
            num_running: all running requests.
            prefilling: those of them that have not computed all their tokens.
            num_steps: ahead of the next one, it included.
        """
        tokens = self.limits.growth(num_steps)
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
                most = books.longest_prefill(req_id) + self.limits.growth(num_steps)
                tokens = min(tokens, most)
            blocks += max(cdiv(tokens, books.block_size) - len(books.req_to_blocks[req_id]), 0)
        if self._kept:
            # Of a prefill any part may be in flight.
            left = request.num_tokens - request.num_computed_tokens
            in_flight = request.num_in_flight_tokens + self.limits.growth(num_steps) + max(left, 0)
            blocks += sum(group.growth(req_id, longest, in_flight) for group in self._kept)
        return blocks

    def longest(self, request: Request, num_steps: int) -> int:
        """Slots that a running request reaches at most, the rest of its prefill whole."""
        now = max(request.num_computed_tokens, request.num_tokens)
        limits = self.limits
        last = limits.most_slots(request)
        return min(now + limits.growth(num_steps), last)
