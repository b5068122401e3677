"""Decides, from lengths alone, when a request is compacted and who records its queries.

One planner per compressed KV-cache group. Knows the policy and the seats of the query ring; knows
no vLLM, no tensors, no blocks beyond the `Books` it asks to move them. All lengths kept here are
logical, because those never shrink: a compaction changes what a request holds, not how far it has
come. A step costs nothing for requests that are far from due: a calendar brings them back in time.
Next: booking.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from rkv_vllm.policy import Policy, Terms
from rkv_vllm.scheduling.booking import Books, ScheduledRequest, book_eviction
from rkv_vllm.scheduling.directive import StepPlan

Lookup = Callable[[str], ScheduledRequest | None]


class Seats(NamedTuple):
    """What a method asks of the query ring.

    Attributes:
        count: requests whose queries can be recorded at once; 0 when the method needs no queries.
        window: newest tokens whose queries judge the others.
    """

    count: int
    window: int


@dataclass(slots=True, eq=False)
class _Progress:
    """A decoding request on its way to its next compaction.

    Attributes:
        terms: budget, buffer and prefix.
        due_at: settled length at which it is due.
        seat: its seat, None while it has none.
        watched_from: position of the first query recorded for it.
        waits: what its due compaction waited for, as far as it was counted.
    """

    terms: Terms
    due_at: int
    seat: int | None = None
    watched_from: int = 0
    waits: set[str] = field(default_factory=set)


_Entry = tuple[int, int, str, _Progress]


class GroupPlanner:
    """Turns the steps of one group into directives.

    Args:
        group_id: of the group.
        books: of the group.
        policy: when.
        seats: of the query ring.
        max_advance: most tokens by which one step takes a decoding request on.

    Source: SPEC section 3.
    """

    def __init__(
        self, group_id: int, books: Books, policy: Policy, seats: Seats, max_advance: int = 1
    ) -> None:
        self._group_id = group_id
        self._books = books
        self._policy = policy
        self._seats = seats
        self._max_advance = max_advance
        self._step = 0
        self._progress: dict[str, _Progress] = {}
        # (step, tie, request, progress): when to look at a request again. It may have left by then;
        # such entries are never more than half of them.
        self._calendar: list[_Entry] = []
        self._num_entries = 0
        # Those to look at in every step, first come first.
        self._near: dict[str, _Progress] = {}
        self._free_seats = list(range(seats.count - 1, -1, -1))
        # Requests that want a seat, oldest wish first; a dict because it is an ordered set.
        self._seat_queue: dict[str, None] = {}

    @property
    def num_seats_in_use(self) -> int:
        """Seats that belong to a request."""
        return self._seats.count - len(self._free_seats)

    def begin(self, req_id: str, terms: Terms, prefill_len: int) -> None:
        """A request's prefill ends with the step at hand; it decodes from the next one on."""
        num_evicted = self._books.num_evicted.get(req_id, 0)
        first_due_at = self._policy.first_due_at(terms, prefill_len - num_evicted)
        progress = _Progress(terms, num_evicted + first_due_at)
        self._progress[req_id] = progress
        self._look_again(req_id, progress, prefill_len)

    def plan_step(self, lookup: Lookup, plan: StepPlan) -> None:
        """Decide what happens to the group's requests in this step.

        Call it once per step, after the scheduler advanced its counters and allocated all blocks.

        Args:
            lookup: a request of this step by id; None if the step does not compute it.
            plan: takes the directives, the watched requests and the waits.
        """
        self._step += 1
        self._wake()
        near = [
            request for req_id in list(self._near) if (request := self._if_near(req_id, lookup))
        ]
        released = [seat for request in near if (seat := self._compact_if_due(request, plan)) >= 0]
        self._hand_out_seats(near)
        watched = {}
        for request in near:
            seat = self._progress[request.req_id].seat
            if seat is not None:
                watched[request.req_id] = seat
        plan.watched[self._group_id] = watched
        # Only now: a seat given away in this step would be written by this step's forward, before
        # the compaction has read it.
        self._free_seats.extend(released)

    def due_at(self, req_id: str) -> int | None:
        """Settled length at which a decoding request is due next; None before it decodes."""
        progress = self._progress.get(req_id)
        return None if progress is None else progress.due_at

    def decodes(self, req_id: str) -> bool:
        """Whether the request has begun to decode, or has rejoined."""
        return req_id in self._progress

    def leave(self, req_id: str) -> "_Progress | None":
        """Forget a request that will be back; returns what `rejoin` wants, None if it prefills.

        `seat` of it is the seat that it had.
        """
        progress = self._progress.get(req_id)
        self.forget(req_id)
        return progress

    def rejoin(self, req_id: str, progress: "_Progress", num_computed: int) -> int | None:
        """Take a request up where it left, before `plan_step` of the step that computes it again.

        Args:
            req_id: vLLM's request id.
            progress: what `leave` returned.
            num_computed: its tokens once this step has run.

        Returns:
            The seat that its recorded queries belong into; None without any, or without a free
            seat: then its window starts anew, like that of any request that waits for one.
        """
        had_seat = progress.seat is not None
        progress.seat = self._free_seats.pop() if had_seat and self._free_seats else None
        self._progress[req_id] = progress
        if progress.seat is None:
            self._look_again(req_id, progress, num_computed)
        else:
            self._near[req_id] = progress
        return progress.seat

    def forget(self, req_id: str) -> None:
        """Drop all state of a request that left the batch (finished, aborted or preempted)."""
        self._seat_queue.pop(req_id, None)
        self._near.pop(req_id, None)
        progress = self._progress.pop(req_id, None)
        if progress is not None and progress.seat is not None:
            self._free_seats.append(progress.seat)
        if len(self._calendar) > 2 * len(self._progress):
            self._calendar = [entry for entry in self._calendar if self._is_current(entry)]
            heapify(self._calendar)

    def _look_again(self, req_id: str, progress: _Progress, num_computed: int) -> None:
        """Note in the calendar when the request can first compute a token of its next window."""
        missing = self._policy.watches_from(progress.due_at) + 1 - num_computed
        steps = max(1, -(-missing // self._max_advance))
        self._num_entries += 1
        heappush(self._calendar, (self._step + steps, self._num_entries, req_id, progress))

    def _wake(self) -> None:
        while self._calendar and self._calendar[0][0] <= self._step:
            entry = heappop(self._calendar)
            if self._is_current(entry):
                _, _, req_id, progress = entry
                self._near[req_id] = progress

    def _is_current(self, entry: _Entry) -> bool:
        _, _, req_id, progress = entry
        return self._progress.get(req_id) is progress

    def _if_near(self, req_id: str, lookup: Lookup) -> ScheduledRequest | None:
        """The request, if this step computes a token of its next window or a later one."""
        request = lookup(req_id)
        if request is None:
            return None
        progress = self._near[req_id]
        if self._needs_watching(request, progress):
            return request
        # Steps that did not compute it, or rejected drafts, have put it off.
        if progress.seat is None:
            del self._near[req_id]
            self._look_again(req_id, progress, request.num_computed)
            return None
        return request

    def _needs_watching(self, request: ScheduledRequest, progress: _Progress) -> bool:
        return request.num_computed > self._policy.watches_from(progress.due_at)

    def _compact_if_due(self, request: ScheduledRequest, plan: StepPlan) -> int:
        """Compact the request if rules 1 and 2 hold and nothing is missing.

        Returns:
            The seat that becomes free after this step, -1 when none does.
        """
        progress = self._progress[request.req_id]
        if request.settled < progress.due_at:
            return -1
        if not self._window_is_warm(request, progress):
            self._count_wait(progress, "seat", plan)
            return -1
        directive = book_eviction(
            self._group_id, self._books, request, progress.terms, progress.seat, "buffer"
        )
        if directive is None:
            self._count_wait(progress, "blocks", plan)
            return -1
        plan.directives.append(directive)
        progress.due_at = self._policy.next_due_at(progress.terms, request.settled)
        progress.waits.clear()
        if self._needs_watching(request, progress) and not self._seat_queue:
            return -1
        # Seats go round: who needs one again queues up behind those that wait.
        seat, progress.seat = progress.seat, None
        if not self._needs_watching(request, progress):
            del self._near[request.req_id]
            self._look_again(request.req_id, progress, request.num_computed)
        return -1 if seat is None else seat

    def _count_wait(self, progress: _Progress, reason: str, plan: StepPlan) -> None:
        if reason in progress.waits:
            return
        progress.waits.add(reason)
        if reason == "seat":
            plan.num_waiting_for_seat += 1
        else:
            plan.num_waiting_for_blocks += 1

    def _window_is_warm(self, request: ScheduledRequest, progress: _Progress) -> bool:
        """Whether the seat holds the queries of the last settled tokens."""
        if not self._seats.count:
            return True
        recorded = request.settled - progress.watched_from
        return progress.seat is not None and recorded >= self._seats.window

    def _hand_out_seats(self, near: list[ScheduledRequest]) -> None:
        """Give free seats to the requests that wait for one, first come first served."""
        if not self._seats.count:
            return
        requests = {}
        for request in near:
            progress = self._progress[request.req_id]
            if progress.seat is None and self._needs_watching(request, progress):
                requests[request.req_id] = request
                self._seat_queue.setdefault(request.req_id)
        # A request that is not scheduled in this step keeps its place but takes no seat.
        for req_id in [req_id for req_id in self._seat_queue if req_id in requests]:
            if not self._free_seats:
                break
            del self._seat_queue[req_id]
            progress = self._progress[req_id]
            progress.seat = self._free_seats.pop()
            request = requests[req_id]
            progress.watched_from = request.num_computed - request.num_scheduled
