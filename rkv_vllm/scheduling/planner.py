"""Decides, from lengths alone, when a request is compacted and who records its queries.

Knows SPEC section 3 and the pool of observation slots; knows no vLLM, no tensors, no blocks beyond
the `Books` it asks to move them. All lengths kept here are logical, because those never shrink:
a compaction changes what a request holds, not how far it has come. Next: books.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from rkv_vllm.config import KVCompressionConfig
from rkv_vllm.request_options import RequestOptions
from rkv_vllm.scheduling.directive import EvictionDirective, StepPlan


class ScheduledRequest(NamedTuple):
    """One request of a step, as the scheduler leaves it after advancing its counters.

    Attributes:
        req_id: vLLM's request id.
        num_computed: tokens computed once this step has run, drafts counted as accepted.
        num_scheduled: tokens that this step computes.
        num_in_flight: tokens whose step has not been processed yet, this step included.
        is_prefilling: this step does not reach the end of the prefill.
        options: the budget and buffer that hold for this request.
    """

    req_id: str
    num_computed: int
    num_scheduled: int
    num_in_flight: int
    is_prefilling: bool
    options: RequestOptions


class Books(Protocol):
    """The block bookkeeping the planner relies on (GroupBooks)."""

    def num_evicted(self, req_id: str) -> int:
        """Tokens evicted from this request since its (re)admission."""

    def compact(
        self, req_id: str, num_evict: int, total_len: int
    ) -> tuple[list[int], list[int]] | None:
        """Book one eviction; returns (old, new) block ids, None when blocks are short."""


@dataclass(slots=True)
class _Progress:
    """A decoding request on its way to its next compaction.

    Attributes:
        due_at: settled logical length at which it is due.
        slot: its observation slot, None while it has none.
        watched_from: logical position of the first query recorded in the slot.
        deferred: it is due, and was counted as waiting.
    """

    due_at: int
    slot: int | None = None
    watched_from: int = 0
    deferred: bool = False


class CompressionPlanner:
    """Turns every scheduler step into a StepPlan.

    Source: SPEC section 3 (rules 1 and 2), DESIGN sections 1 and 3.
    """

    def __init__(self, config: KVCompressionConfig, books: Books) -> None:
        self._config = config
        self._books = books
        self._progress: dict[str, _Progress] = {}
        self._free_slots = list(range(config.observation_slots - 1, -1, -1))
        # Requests that want a slot, oldest wish first; a dict because it is an ordered set.
        self._slot_queue: dict[str, None] = {}

    @property
    def num_seats_in_use(self) -> int:
        """Observation slots that belong to a request."""
        return self._config.observation_slots - len(self._free_slots)

    def plan_step(self, scheduled: Iterable[ScheduledRequest]) -> StepPlan:
        """Decide what happens to each request of this step.

        Call it once per step, after the scheduler advanced its counters and allocated all blocks.

        Args:
            scheduled: the requests that this step computes.

        Returns:
            The plan: directives, watched rows, and how many compactions have to wait.
        """
        plan = StepPlan()
        near = [request for request in scheduled if self._is_near_compaction(request)]
        released = [slot for request in near if (slot := self._compact_if_due(request, plan)) >= 0]
        self._hand_out_slots(near)
        for request in near:
            slot = self._progress[request.req_id].slot
            if slot is not None:
                plan.watched[request.req_id] = slot
        # Only now: a slot given away in this step would be written by this step's forward,
        # before the compaction has read it.
        self._free_slots.extend(released)
        return plan

    def due_at(self, req_id: str, num_tokens: int, options: RequestOptions) -> int:
        """Settled logical length at which the request is due next.

        Args:
            req_id: vLLM's request id.
            num_tokens: its tokens so far; all of them are prefilled if it is not decoding yet.
            options: the request's budget and buffer.
        """
        progress = self._progress.get(req_id)
        return options.first_due_at(num_tokens) if progress is None else progress.due_at

    def forget(self, req_id: str) -> None:
        """Drop all state of a request that left the batch (finished, aborted or preempted)."""
        self._slot_queue.pop(req_id, None)
        progress = self._progress.pop(req_id, None)
        if progress is not None and progress.slot is not None:
            self._free_slots.append(progress.slot)

    def _is_near_compaction(self, request: ScheduledRequest) -> bool:
        """Whether this step computes a token of the request's next window, or a later one."""
        if request.is_prefilling:
            return False
        progress = self._progress.get(request.req_id)
        if progress is None:
            # The first step that reaches the end of the prefill ends exactly there.
            due_at = request.options.first_due_at(request.num_computed)
            self._progress[request.req_id] = _Progress(due_at)
            return False
        return self._needs_watching(request, progress)

    def _compact_if_due(self, request: ScheduledRequest, plan: StepPlan) -> int:
        """Compact the request if rules 1 and 2 hold and nothing is missing.

        Returns:
            The observation slot that becomes free after this step, -1 when none does.
        """
        progress = self._progress[request.req_id]
        settled = request.num_computed - request.num_in_flight
        if settled < progress.due_at:
            return -1
        directive = self._book_eviction(request, progress, settled)
        if directive is None:
            if not progress.deferred:
                plan.num_deferred += 1
                plan.num_short_of_blocks += self._window_is_warm(progress, settled)
            progress.deferred = True
            return -1
        plan.directives.append(directive)
        progress.due_at = settled + request.options.buffer
        progress.deferred = False
        if self._needs_watching(request, progress):
            return -1
        slot, progress.slot = progress.slot, None
        return slot

    def _book_eviction(
        self, request: ScheduledRequest, progress: _Progress, settled: int
    ) -> EvictionDirective | None:
        """Book the eviction, or return None when the window is not warm or blocks are short."""
        if not self._window_is_warm(progress, settled):
            return None
        before = self._books.num_evicted(request.req_id)
        num_evict = settled - before - request.options.budget
        total_len = request.num_computed - before
        blocks = self._books.compact(request.req_id, num_evict, total_len)
        if blocks is None:
            return None
        return EvictionDirective(
            req_id=request.req_id,
            num_evicted_before=before,
            settled_len=settled - before,
            total_len=total_len,
            num_evict=num_evict,
            slot=progress.slot,
            old_block_ids=blocks[0],
            new_block_ids=blocks[1],
        )

    def _window_is_warm(self, progress: _Progress, settled: int) -> bool:
        """Whether the slot holds the queries of the last settled tokens."""
        return progress.slot is not None and settled - progress.watched_from >= self._config.window

    def _hand_out_slots(self, near: list[ScheduledRequest]) -> None:
        """Give free slots to the requests that wait for one, first come first served."""
        requests = {request.req_id: request for request in near}
        for req_id, request in requests.items():
            progress = self._progress[req_id]
            if progress.slot is None and self._needs_watching(request, progress):
                self._slot_queue.setdefault(req_id)
        # A request that is not scheduled in this step keeps its place but takes no slot.
        for req_id in [req_id for req_id in self._slot_queue if req_id in requests]:
            if not self._free_slots:
                break
            del self._slot_queue[req_id]
            progress = self._progress[req_id]
            progress.slot = self._free_slots.pop()
            request = requests[req_id]
            progress.watched_from = request.num_computed - request.num_scheduled

    def _needs_watching(self, request: ScheduledRequest, progress: _Progress) -> bool:
        return request.num_computed > progress.due_at - self._config.window
