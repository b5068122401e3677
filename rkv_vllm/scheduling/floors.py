"""Whom to admit when requests are compacted only under pressure.

A request can be cut down to its floor at any time, so as many are admitted as the pool can hold at
their floors; pressure.py cuts down those that run when a newcomer needs their blocks. Requests that
end before they reach a floor, or are never compacted, are not reserved for: vLLM's own optimism
applies to them. Knows requests, lengths and blocks, not vLLM's queues. Next: scheduler.py, which
asks; admission.py does the same for `--kv-when always`.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vllm.utils.math_utils import cdiv
from vllm.v1.request import Request

from rkv_vllm.limits import Limits
from rkv_vllm.policy import Terms, floor_len
from rkv_vllm.scheduling.admission import ENDED_BY_ITSELF, SHARE_STEP
from rkv_vllm.scheduling.books import GroupBooks
from rkv_vllm.scheduling.demand import Demand
from rkv_vllm.scheduling.directive import EvictionDirective
from rkv_vllm.scheduling.kept_group import KeptGroup
from rkv_vllm.scheduling.running_bound import Running, RunningBound


class _Asked(NamedTuple):
    """Who asked last to be admitted, and the blocks that have to be free for it."""

    req_id: str
    num_blocks: int


class FloorAdmission:
    """Admits whom the pool can hold when all others stand at their floors.

    Args:
        groups: books of the compressed groups.
        kept: the groups that are not compressed.
        running: all running requests.
        asked_beside: most blocks that vLLM asks for a newcomer beside those that are required here.
        demand: of the running requests.
        horizon: steps from arming a request to the blocks of its compaction, by running requests.
        limits: of the engine.
        terms_of: what holds for a request in each group; None if its cache is kept whole.
        server_terms: what holds in each group for a request that asks for nothing.
    """

    def __init__(
        self,
        groups: Sequence[GroupBooks],
        kept: Sequence[KeptGroup],
        running: Running,
        asked_beside: Callable[[Request], int],
        demand: Demand,
        horizon: Callable[[int], int],
        limits: Limits,
        terms_of: Callable[[Request], Sequence[Terms] | None],
        server_terms: Sequence[Terms],
    ) -> None:
        self._groups = groups
        self._kept = kept
        self._running = running
        self._asked_beside = asked_beside
        self._demand = demand
        # Steps of a horizon; those of the bounds.
        self._num_steps = 0
        self._bounds = (
            # Of blocks that others hold as well, a newcomer takes its part from their shares.
            RunningBound(
                running,
                lambda request: -self._spare(request),
                lambda new: sum(books.share_of_shared(new.request_id) for books in groups),
            ),
            RunningBound(
                running,
                lambda request: demand.of(request, self._num_steps),
                lambda new: sum(group.num_shared_with_one(new.request_id) for group in kept),
            ),
            RunningBound(running, self._copies, self._shared, max),
        )
        self._horizon = horizon
        self._limits = limits
        self._terms_of = terms_of
        self._server_terms = server_terms
        # Until requests have finished, all are expected to reach their floor.
        self._share_long = 1.0
        self._asked: _Asked | None = None

    def restart_bounds(self) -> None:
        """Call it when a step is scheduled: from here on the running requests change."""
        for bound in self._bounds:
            bound.restart()

    def note_compaction(self, request: Request, directive: EvictionDirective) -> None:
        """A request was compacted; nothing is remembered that this could change."""

    def note_end(self, request: Request) -> None:
        """A request leaves the batch; call it before its books are closed."""
        self.restart_bounds()
        terms = self._terms_of(request)
        if terms is None or request.status not in ENDED_BY_ITSELF:
            return
        growth = self._limits.growth(self._horizon(1))
        floor = min(floor_len(own, growth, books.block_size) for own, books in self._each(terms))
        if floor <= self._limits.final_len(request):
            was_long = request.num_tokens >= floor
            self._share_long += SHARE_STEP * (was_long - self._share_long)

    def required(
        self, newcomer: Request, num_blocks: int, not_displaced: Sequence[Request], num_free: int
    ) -> int:
        """Blocks that must be free for `newcomer` to be admitted.

        Args:
            newcomer: asks to be admitted.
            num_blocks: blocks that its tokens need now, in one group.
            not_displaced: the running requests that vLLM would not preempt for it; without any
                nothing is reserved.
            num_free: free blocks of the pool.
        """
        running = self._running()
        if not running:
            return num_blocks
        num_steps = self._horizon(len(running) + 1)
        if num_steps != self._num_steps:
            self.restart_bounds()
            self._num_steps = num_steps
        blocks_now = num_blocks * len(self._groups) + self._growth(newcomer, num_steps)
        soon = self._growth_within(newcomer, num_steps) + self._copies(newcomer, num_blocks)

        def weigh() -> tuple[bool, int]:
            short, needed = self._sums(running, not_displaced)
            # vLLM counts what the other groups need now by itself.
            return math.ceil(blocks_now + short) > num_free, num_blocks + soon + needed

        is_full, required = weigh()
        beside = self._asked_beside(newcomer)
        if (is_full or required + beside > num_free) and not all(b.is_exact for b in self._bounds):
            self.restart_bounds()
            is_full, required = weigh()
        if not_displaced and is_full:
            return num_free + 1
        self._asked = _Asked(newcomer.request_id, num_blocks * len(self._groups) + soon)
        return required

    def _sums(
        self, running: Sequence[Request], not_displaced: Sequence[Request]
    ) -> tuple[float, int]:
        """Blocks by which requests are short of their floors, and that they take meanwhile.

        Meanwhile: before compactions can give any back. For those that the newcomer may displace no
        more than what compactions could give back.
        """
        if len(not_displaced) == len(running):
            short, needed, copies = (bound.get() for bound in self._bounds)
            return short, int(needed + copies)
        of, num_steps = self._demand.of, self._num_steps
        needed = sum(of(request, num_steps) for request in not_displaced)
        kept = {request.request_id for request in not_displaced}
        theirs = sum(
            of(request, num_steps) for request in running if request.request_id not in kept
        )
        above = sum(max(self._spare(request), 0) for request in running)
        needed += min(theirs, math.ceil(above)) + max(map(self._copies, running))
        return -sum(map(self._spare, not_displaced)), needed

    def take_wanted(self) -> int:
        """Blocks that whoever asked last and was refused needs beside the running requests.

        0 when it was admitted, or when the pool cannot hold it beside the floors of the others.
        """
        asked, self._asked = self._asked, None
        if asked is None or any(r.request_id == asked.req_id for r in self._running()):
            return 0
        return asked.num_blocks

    def _growth_within(self, newcomer: Request, num_steps: int) -> int:
        """Blocks beyond a newcomer's tokens that it takes until it can be compacted.

        Of groups that give blocks back by themselves, vLLM counts what a newcomer keeps, not what
        its prefill takes.
        """
        later = self._limits.growth(num_steps)
        longest = newcomer.num_tokens + later
        growth = sum(min(cdiv(longest, g.block_size), g.most_ever) for g in self._kept)
        for books in self._groups:
            tokens = books.held_len(newcomer.request_id, newcomer.num_tokens)
            growth += cdiv(tokens + later, books.block_size) - cdiv(tokens, books.block_size)
        return growth

    def _copies(self, request: Request, num_blocks: int | None = None) -> int:
        """Free blocks that a request's compaction may need for copies of shared ones.

        Args:
            request: running, or a newcomer.
            num_blocks: that a newcomer needs in a group; the others of its tokens it will share.
        """
        terms = self._terms_of(request)
        if terms is None:
            return 0
        copies = 0
        for own, books in self._each(terms):
            if num_blocks is None:
                shared = books.num_leading_shared_blocks(request.request_id)
            else:
                held = books.held_len(request.request_id, request.num_tokens)
                shared = cdiv(held, books.block_size) - num_blocks
            survivors = own.prefix_len + own.budget + self._limits.in_flight
            copies += max(min(shared, cdiv(survivors, books.block_size)), 0)
        return copies

    def _each(self, terms: Sequence[Terms]) -> zip:
        return zip(terms, self._groups, strict=True)

    def _shared(self, request: Request) -> int:
        """Blocks that others may have to copy since this one was admitted."""
        return sum(g.num_leading_shared_blocks(request.request_id) for g in self._groups)

    def _spare(self, request: Request) -> float:
        """Blocks that a running request holds above its floor, or is expected to be short of."""
        terms = self._terms_of(request)
        if terms is None:
            return 0.0
        longest, growth = self._limits.final_len(request), self._limits.growth(self._num_steps)
        spare = 0.0
        for own, books in self._each(terms):
            floor = floor_len(own, growth, books.block_size)
            above = books.fair_share(request.request_id) - cdiv(floor, books.block_size)
            if above < 0:
                above *= self._share_long * (floor <= longest)
            spare += above
        return spare

    def _growth(self, newcomer: Request, num_steps: int) -> float:
        """Blocks from a newcomer's tokens to its floor.

        Counted up to the floor that the server grants by default: whoever asks for more takes the
        risk of being preempted, instead of waiting, and all behind it, until the others are done.
        """
        terms = self._terms_of(newcomer)
        if terms is None:
            return 0.0
        growth = 0
        for own, server, books in zip(terms, self._server_terms, self._groups, strict=True):
            capped = own._replace(budget=min(own.budget, server.budget))
            floor = floor_len(capped, self._limits.growth(num_steps), books.block_size)
            if floor <= self._limits.final_len(newcomer):
                held = books.held_len(newcomer.request_id, newcomer.num_tokens)
                growth += max(cdiv(floor, books.block_size) - cdiv(held, books.block_size), 0)
        return self._share_long * growth
