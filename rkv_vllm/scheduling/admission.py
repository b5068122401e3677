"""How many blocks must be free before vLLM admits one more request.

A compacted request stops growing at a known length, so requests can be admitted up to the number
that never has to be preempted. What is kept back is what the running requests can still grow into
while the newcomer lives; their later growth is paid from what the newcomer gives back. Requests
that compaction does not bound are not reserved for: vLLM's own optimism applies to them, and they
may have to be preempted.

Knows requests, lengths and blocks, not vLLM's queues. Next: scheduler.py, which asks.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vllm.v1.request import Request, RequestStatus

from rkv_vllm.limits import Limits
from rkv_vllm.policy import Policy, Terms, longest_prefill
from rkv_vllm.scheduling.books import GroupBooks
from rkv_vllm.scheduling.directive import EvictionDirective
from rkv_vllm.scheduling.kept_group import KeptGroup
from rkv_vllm.scheduling.planner import GroupPlanner
from rkv_vllm.scheduling.pressed_group import PressedGroup
from rkv_vllm.scheduling.running_bound import Running, RunningBound

# Weight of the latest finished request in the share of those that were compacted: about the last
# ten count, so that admission follows a change of workload within seconds.
SHARE_STEP = 0.1

# How a request ends by itself; one that its client gave up says nothing about the others.
ENDED_BY_ITSELF = (
    RequestStatus.FINISHED_STOPPED,
    RequestStatus.FINISHED_LENGTH_CAPPED,
    RequestStatus.FINISHED_REPETITION,
)


class Track(NamedTuple):
    """One compressed KV-cache group on the scheduler's side."""

    books: GroupBooks
    planner: GroupPlanner | PressedGroup


class _Refusal(NamedTuple):
    """A newcomer that was refused, and when: requests that have left, its blocks, free blocks."""

    req_id: str
    num_events: int
    num_blocks: int
    num_free: int

    def holds_for(self, asked: "_Refusal") -> bool:
        """Whether nothing has got better since: what the running ones grow into comes off both."""
        same = (self.req_id, self.num_events) == (asked.req_id, asked.num_events)
        return same and asked.num_blocks >= self.num_blocks and asked.num_free <= self.num_free


class Admission:
    """Keeps back blocks for the running requests.

    Args:
        tracks: the compressed groups.
        kept: the other groups.
        running: all running requests.
        asked_beside: most blocks that vLLM asks for a newcomer beside those that are required here.
        policy: says how long a request can get.
        limits: of the engine.
        terms_of: what holds for a request in each group; None if its cache is kept whole.
        server_terms: what holds in each group for a request that asks for nothing.
    """

    def __init__(
        self,
        tracks: Sequence[Track],
        kept: Sequence[KeptGroup],
        running: Running,
        asked_beside: Callable[[Request], int],
        policy: Policy,
        limits: Limits,
        terms_of: Callable[[Request], Sequence[Terms] | None],
        server_terms: Sequence[Terms],
    ) -> None:
        self._tracks = tracks
        self._kept = kept
        self._asked_beside = asked_beside
        # As if every newcomer lived for ever.
        self._most_growth = RunningBound(
            running,
            lambda request: self._expected_growth(request, limits.max_model_len),
            self._newly_shared,
        )
        self._policy = policy
        self._limits = limits
        self._terms_of = terms_of
        self._server_terms = server_terms
        # Until requests have finished, all are expected to be long.
        self._share_compacted = 1.0
        # Refusals hold until something shrinks.
        self._num_events = 0
        self._refused: _Refusal | None = None

    def restart_bounds(self) -> None:
        """Call it when a step is scheduled: from here on the running requests change."""
        self._most_growth.restart()

    def note_compaction(self, request: Request, directive: EvictionDirective) -> None:
        """A request was compacted, and may be smaller now than its growth said.

        Not so in the middle of its life, when it was compacted in time: it only grows back.

        Args:
            request: the request; it knows already when it is due next.
            directive: what was booked.
        """
        terms = self._terms_of(request)
        grows_back = directive.num_evicted_before and all(
            directive.num_evict <= own.buffer and self._is_due_before_its_end(request, own, track)
            for own, track in zip(terms, self._tracks, strict=True)
        )
        self._num_events += not grows_back

    def note_end(self, request: Request) -> None:
        """A request leaves the batch; call it before its books are closed.

        Args:
            request: finished, aborted or preempted.
        """
        self._num_events += 1
        self._most_growth.restart()
        if request.status in ENDED_BY_ITSELF and self._is_bounded(request):
            was_compacted = any(request.request_id in t.books.num_evicted for t in self._tracks)
            self._share_compacted += SHARE_STEP * (was_compacted - self._share_compacted)

    def required(
        self, newcomer: Request, num_blocks: int, running: Sequence[Request], num_free: int
    ) -> int:
        """Blocks that must be free for `newcomer` to be admitted.

        Args:
            newcomer: asks to be admitted.
            num_blocks: blocks that its tokens need now.
            running: the requests that it may not displace; without any nothing is reserved.
            num_free: free blocks of the pool; a refusal is remembered until it may be wrong.
        """
        if not running or num_blocks > num_free:
            return num_blocks
        asked = _Refusal(newcomer.request_id, self._num_events, num_blocks, num_free)
        if self._refused is not None and self._refused.holds_for(asked):
            return num_free + 1
        own_growth = self._own_growth(newcomer)
        most = num_blocks + math.ceil(self._most_growth.get() + own_growth)
        if most + self._asked_beside(newcomer) <= num_free:
            return most
        horizon = self._life(newcomer)
        growth = sum(self._expected_growth(request, horizon) for request in running)
        required = num_blocks + math.ceil(growth + own_growth)
        if required > num_free:
            self._refused = asked
        return required

    def _newly_shared(self, request: Request) -> int:
        """Blocks that others have to copy, or do not get back, since this one was admitted."""
        groups = (*(track.books for track in self._tracks), *self._kept)
        return sum(group.num_shared_with_one(request.request_id) for group in groups)

    def _life(self, newcomer: Request) -> int:
        """Most steps that the newcomer will take."""
        prefill_steps = -(-newcomer.num_tokens // self._limits.max_step_tokens)
        return prefill_steps + self._limits.final_len(newcomer) - newcomer.num_tokens

    def _expected_growth(self, request: Request, horizon: int) -> float:
        """Blocks that a running request is expected to grow by within `horizon` steps.

        One that was not compacted yet may end before it gets there: it counts by the share of
        finished requests that did.
        """
        terms = self._terms_of(request)
        if terms is None:
            return 0.0
        growth = sum(
            self._growth(request, own, track, horizon)
            for own, track in zip(terms, self._tracks, strict=True)
        )
        return growth + self._growth_of_kept(request, horizon)

    def _growth(self, request: Request, terms: Terms, track: Track, horizon: int) -> float:
        books, req_id = track.books, request.request_id
        num_evicted = books.num_evicted.get(req_id)
        if num_evicted is None and not self._is_due_before_its_end(request, terms, track):
            return 0.0
        limits = self._limits
        peak = self._due_at(request, terms, track) + limits.in_flight
        final_len = limits.most_slots(request)
        prefilled = max(request.num_computed_tokens, request.num_tokens)
        longest = min(peak, final_len, prefilled + horizon + limits.drafted) - (num_evicted or 0)
        growth = max(-(-longest // books.block_size) - len(books.req_to_blocks[req_id]), 0)
        if num_evicted is not None:
            return growth
        if peak <= prefilled + horizon:
            survivors = terms.prefix_len + terms.budget + self._limits.in_flight
            growth += books.num_shared_blocks(req_id, terms.prefix_len, survivors)
        return self._share_compacted * growth

    def _growth_of_kept(self, request: Request, horizon: int) -> float:
        """The same in the groups that are not compressed, for a request that compaction bounds."""
        if not self._kept or not self._is_bounded(request):
            return 0.0
        req_id = request.request_id
        prefilled = max(request.num_computed_tokens, request.num_tokens)
        limits = self._limits
        final_len = limits.most_slots(request)
        longest = min(final_len, prefilled + horizon + limits.drafted)
        in_flight = request.num_in_flight_tokens + limits.in_flight
        in_flight += prefilled - request.num_computed_tokens
        growth = sum(group.growth(req_id, longest, in_flight) for group in self._kept)
        was_compacted = any(req_id in track.books.num_evicted for track in self._tracks)
        return growth if was_compacted else self._share_compacted * growth

    def _own_growth(self, newcomer: Request) -> float:
        """Blocks that the newcomer may need beyond its tokens so far.

        Counted up to what the server grants by default: whoever asks for more takes the risk of
        being preempted, instead of waiting, and all behind it, until the others are done.
        """
        terms = self._terms_of(newcomer)
        if terms is None:
            return 0.0
        growth = 0
        for own, server, track in zip(terms, self._server_terms, self._tracks, strict=True):
            if not self._is_due_before_its_end(newcomer, own, track):
                continue
            capped = own._replace(
                budget=min(own.budget, server.budget), buffer=min(own.buffer, server.buffer)
            )
            final_len = self._limits.most_slots(newcomer)
            longest = self._policy.bound(
                capped, newcomer.num_tokens, final_len, self._limits.in_flight
            )
            block_size = track.books.block_size
            prefill = longest_prefill(own, newcomer.num_tokens)
            growth += max(-(-longest // block_size) - -(-prefill // block_size), 0)
        if self._kept and self._is_bounded(newcomer):
            tokens = newcomer.num_tokens
            longest = self._limits.most_slots(newcomer)
            in_flight = self._limits.in_flight
            growth += sum(
                max(g.most(longest, in_flight) - g.most(tokens, tokens), 0) for g in self._kept
            )
        return self._share_compacted * growth

    def _is_bounded(self, request: Request) -> bool:
        """Whether compaction keeps this request shorter than its full length."""
        terms = self._terms_of(request)
        if terms is None:
            return False
        return any(
            request.request_id in track.books.num_evicted
            or self._is_due_before_its_end(request, own, track)
            for own, track in zip(terms, self._tracks, strict=True)
        )

    def _is_due_before_its_end(self, request: Request, terms: Terms, track: Track) -> bool:
        due_at = self._due_at(request, terms, track)
        return due_at + self._limits.steps_in_flight < self._limits.final_len(request)

    def _due_at(self, request: Request, terms: Terms, track: Track) -> int:
        due_at = track.planner.due_at(request.request_id)
        if due_at is not None:
            return due_at
        num_evicted = track.books.num_evicted.get(request.request_id, 0)
        prefill = longest_prefill(terms, request.num_tokens)
        return num_evicted + self._policy.first_due_at(terms, prefill)
