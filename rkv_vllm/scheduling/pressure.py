"""Compacts only when the pool runs short, and then no more than it takes.

`PressedGroup` stands where GroupPlanner stands for `--kv-when always`: it knows of one compressed
group who could be compacted and what that gives back. `UnderPressure` looks at all
groups, because they share the pool, and says who is next. Knows lengths and blocks, no tensors.
Next: booking.py; demand.py for the forecast, floors.py for who is admitted.

Source: SPEC section 5.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vllm.utils.math_utils import cdiv
from vllm.v1.request import Request

from rkv_vllm.policy import Terms, floor_len
from rkv_vllm.scheduling.booking import ScheduledRequest, book_eviction
from rkv_vllm.scheduling.books import GroupBooks
from rkv_vllm.scheduling.demand import Demand
from rkv_vllm.scheduling.directive import StepPlan
from rkv_vllm.scheduling.planner import Lookup, Seats


class _Seat(NamedTuple):
    """A seat that a request has been given.

    Attributes:
        number: in the query rings of all groups.
        watched_from: position of the first query recorded for it.
    """

    number: int
    watched_from: int


class ArmedRequests:
    """Whose queries are recorded; a request has the same seat in every group's query ring.

    Args:
        seats: of each ring; without any a compaction needs no queries.
    """

    def __init__(self, seats: Seats) -> None:
        self._seats = seats
        self._armed: dict[str, _Seat] = {}
        self._free = list(range(seats.count - 1, -1, -1))
        # Of compactions of this step: what its forward records must not come before they are read.
        self._released: list[int] = []

    def __len__(self) -> int:
        return len(self._armed)

    def __contains__(self, req_id: str) -> bool:
        return not self._seats.count or req_id in self._armed

    def is_warm(self, request: ScheduledRequest) -> bool:
        """Whether the queries of the request's last settled tokens are recorded."""
        if not self._seats.count:
            return True
        seat = self._armed.get(request.req_id)
        return seat is not None and request.settled - seat.watched_from >= self._seats.window

    def arm(self, request: ScheduledRequest) -> bool:
        """Record the request's queries from this step on; False when no seat is free."""
        if request.req_id in self:
            return True
        if not self._free:
            return False
        first = request.num_computed - request.num_scheduled
        self._armed[request.req_id] = _Seat(self._free.pop(), first)
        return True

    def seat_of(self, req_id: str) -> int | None:
        """The request's seat, None without one."""
        seat = self._armed.get(req_id)
        return None if seat is None else seat.number

    def release(self, req_id: str) -> None:
        """The request is compacted in this step; its seat is free from the next one on."""
        seat = self._armed.pop(req_id, None)
        if seat is not None:
            self._released.append(seat.number)

    def forget(self, req_id: str) -> None:
        """The request left the batch."""
        seat = self._armed.pop(req_id, None)
        if seat is not None:
            self._free.append(seat.number)

    def clear(self) -> None:
        """Record nobody's queries any longer."""
        self._free.extend(seat.number for seat in self._armed.values())
        self._armed.clear()

    def end_step(self, lookup: Lookup) -> dict[str, int]:
        """Returns the seats of the requests that this step computes."""
        self._free.extend(self._released)
        self._released = []
        return {
            req_id: seat.number
            for req_id, seat in self._armed.items()
            if lookup(req_id) is not None
        }


class _Victim(NamedTuple):
    """A request that could be compacted, and what the pool would get back.

    Attributes:
        above_floor: whether it holds more than it needs until it can be compacted again.
        rank: the highest are compacted first.
        gain: blocks, over all groups.
        num_copies: free blocks that its compaction needs before it gives any back.
        is_warm: whether that can be now.
        longest: tokens that the request reaches within the horizon.
        request: as this step computes it.
    """

    above_floor: bool
    rank: int
    gain: int
    num_copies: int
    is_warm: bool
    longest: int
    request: ScheduledRequest

    @property
    def turn(self) -> tuple[bool, int, int]:
        """The largest are compacted first."""
        return self[:3]


@dataclass(slots=True, eq=False)
class _Absent:
    """A request that left and will be back; without a seat, so nothing recorded is kept."""

    terms: Terms
    seat: int | None = None


class PressedGroup:
    """The decoding requests of one group: what the compaction of each would give back.

    Args:
        group_id: of the group.
        books: of the group.
        armed: of all groups.
    """

    def __init__(self, group_id: int, books: GroupBooks, armed: ArmedRequests) -> None:
        self.group_id = group_id
        self._books = books
        self._armed = armed
        self._terms: dict[str, Terms] = {}
        self._short_of_blocks: set[str] = set()

    @property
    def num_seats_in_use(self) -> int:
        """Seats that belong to a request."""
        return len(self._armed)

    @property
    def block_size(self) -> int:
        """Tokens of a block of this group."""
        return self._books.block_size

    def begin(self, req_id: str, terms: Terms, prefill_len: int) -> None:
        """A request's prefill ends with the step at hand; it decodes from the next one on."""
        self._terms[req_id] = terms

    def leave(self, req_id: str) -> "_Absent | None":
        """Forget a request that will be back; returns what `rejoin` wants, None if it prefills."""
        terms = self._terms.get(req_id)
        self.forget(req_id)
        return None if terms is None else _Absent(terms)

    def rejoin(self, req_id: str, absent: "_Absent", num_computed: int) -> None:
        """Take a request up again; it is armed anew when its turn comes."""
        self._terms[req_id] = absent.terms

    def decodes(self, req_id: str) -> bool:
        """Whether the request has begun to decode, or has rejoined, and may be compacted."""
        return req_id in self._terms

    def forget(self, req_id: str) -> None:
        """Drop all state of a request that left the batch (finished, aborted or preempted)."""
        self._terms.pop(req_id, None)
        self._short_of_blocks.discard(req_id)
        self._armed.forget(req_id)

    def gain(self, request: ScheduledRequest, longest: int) -> int:
        """Blocks that a compaction now saves.

        Args:
            request: as it is or will be.
            longest: tokens that it reaches within the horizon.
        """
        untouched, num_kept, num_held, num_evict = self._row(request)
        if num_held <= num_kept:
            return 0
        # A shared block does not return, and what is kept of it needs a copy.
        num_shared = self._books.num_leading_shared_blocks(request.req_id, untouched)
        later = longest - self._books.num_evicted.get(request.req_id, 0)
        without = max(cdiv(later, self.block_size), num_held)
        return without - max(cdiv(later - num_evict, self.block_size), num_kept) - num_shared

    def is_above_floor(self, request: ScheduledRequest, num_steps: int) -> bool:
        """Whether the request holds more than it needs to decode so many steps uncompacted."""
        terms = self._terms[request.req_id]
        untouched, _, num_held, _ = self._row(request)
        num_shared = self._books.num_leading_shared_blocks(request.req_id, untouched)
        floor = floor_len(terms, num_steps, self.block_size)
        return num_held - num_shared > cdiv(floor, self.block_size)

    def num_copies(self, request: ScheduledRequest) -> int:
        """Free blocks that the request's compaction needs before it gives any back."""
        untouched, num_kept, _, _ = self._row(request)
        num_shared = self._books.num_leading_shared_blocks(request.req_id, untouched)
        return min(num_shared, num_kept - untouched)

    def _row(self, request: ScheduledRequest) -> tuple[int, int, int, int]:
        """Of a compaction now: blocks left alone, left over, found, and the tokens that go."""
        terms = self._terms[request.req_id]
        before = self._books.num_evicted.get(request.req_id, 0)
        num_evict = max(request.settled - before - terms.prefix_len - terms.budget, 0)
        return (
            terms.prefix_len // self.block_size,
            cdiv(request.num_computed - before - num_evict, self.block_size),
            len(self._books.req_to_blocks[request.req_id]),
            num_evict,
        )

    def compact(self, request: ScheduledRequest, plan: StepPlan) -> bool:
        """Book the request's eviction.

        Returns:
            False (nothing changed) when there is no free block for the copy of a shared one.
        """
        req_id = request.req_id
        seat = self._armed.seat_of(req_id)
        directive = book_eviction(
            self.group_id, self._books, request, self._terms[req_id], seat, "pressure"
        )
        if directive is None:
            plan.num_waiting_for_blocks += req_id not in self._short_of_blocks
            self._short_of_blocks.add(req_id)
            return False
        self._short_of_blocks.discard(req_id)
        plan.directives.append(directive)
        return True


class UnderPressure:
    """Says in every step who is recorded and who is compacted.

    As long as the free blocks cover what the running requests and the head of the waiting queue
    will ask for until a window armed now is warm, nobody is.

    Args:
        groups: the compressed ones.
        armed: of all groups.
        demand: of the running requests.
        num_free: free blocks of the pool.
        seats: of the query ring.
        in_flight: steps computed while a compaction waits for the step's output.
        rank: of a request; the highest are compacted first, whatever they give.
        most_copies: blocks that survivors of one request fill.

    Attributes:
        demand: see above.
    """

    def __init__(
        self,
        groups: Sequence[PressedGroup],
        armed: ArmedRequests,
        demand: Demand,
        num_free: Callable[[], int],
        seats: Seats,
        in_flight: int,
        rank: Callable[[Request], int],
        most_copies: int,
    ) -> None:
        self._groups = groups
        self._armed = armed
        self.demand = demand
        self._num_free = num_free
        self._seats = seats
        self._in_flight = in_flight
        self._rank = rank
        self._most_copies = most_copies

    def horizon(self, num_running: int) -> int:
        """Steps from arming a request to the blocks of its compaction, and one to spare.

        With fewer seats than requests they are armed in turns, so it takes as many times longer.
        """
        turns = cdiv(num_running, self._seats.count) if self._seats.count else 1
        window = self._seats.window if self._seats.count else 0
        return (window + 2 + self._in_flight) * max(turns, 1)

    def plan_step(
        self,
        running: Sequence[Request],
        prefilling: Sequence[Request],
        num_wanted: int,
        lookup: Lookup,
        plan: StepPlan,
    ) -> None:
        """Decide what happens to all requests in this step.

        Call it once per step, after the scheduler advanced its counters and allocated all blocks.

        Args:
            running: all running requests.
            prefilling: those that have not computed all their tokens.
            num_wanted: blocks that the head of the waiting queue needs to be admitted.
            lookup: a decoding request of this step by id; None if the step does not compute it.
            plan: takes the directives and the recorded requests.
        """
        num_steps = self.horizon(len(running))
        room = self._num_free() - num_wanted
        shortage = self.demand.most(len(running), prefilling, num_steps) + self._most_copies - room
        if shortage > 0:
            victims = self._victims(running, num_steps, lookup)
            shortage = sum(self.demand.of(request, num_steps) for request in running) - room
            shortage += max((victim.num_copies for victim in victims), default=0)
        if shortage > 0:
            plan.under_pressure = True
            self._relieve(victims, shortage, plan)
        else:
            self._armed.clear()
        watched = self._armed.end_step(lookup)
        plan.watched = {group.group_id: watched for group in self._groups}

    def _victims(self, running: Sequence[Request], num_steps: int, lookup: Lookup) -> list[_Victim]:
        """Whose compaction would give something back, in the order of their turn."""
        victims = []
        for request in running:
            # Others are kept whole, or their prefill has not ended.
            if not self._groups[0].decodes(request.request_id):
                continue
            scheduled = lookup(request.request_id)
            if scheduled is None:
                continue
            is_warm = self._armed.is_warm(scheduled)
            # As it will be when it is warm: what is computed now has settled, and a little follows.
            ahead = min(scheduled.num_in_flight, self._in_flight * self.demand.max_advance)
            then = scheduled
            if not is_warm:
                num_computed = scheduled.num_computed + ahead
                then = scheduled._replace(num_computed=num_computed, num_in_flight=ahead)
            longest = self.demand.longest(request, num_steps)
            gain = sum(max(group.gain(then, longest), 0) for group in self._groups)
            if gain:
                above = any(group.is_above_floor(then, num_steps) for group in self._groups)
                copies = sum(group.num_copies(then) for group in self._groups)
                rank = self._rank(request)
                victims.append(_Victim(above, rank, gain, copies, is_warm, longest, scheduled))
        # Stable: among equals those that run longest.
        victims.sort(key=lambda victim: victim.turn, reverse=True)
        return victims

    def _relieve(self, victims: list[_Victim], shortage: int, plan: StepPlan) -> None:
        """Compact and arm until the shortage is covered, or nobody is left."""
        cold = []
        for victim in victims:
            # Without the blocks for its copies a warm request stays armed, and counts for nothing.
            if not victim.is_warm:
                cold.append(victim)
            elif shortage > 0 and self._compact(victim, plan):
                shortage -= victim.gain
        shortage -= sum(victim.gain for victim in cold if victim.request.req_id in self._armed)
        for victim in cold:
            if shortage <= 0:
                return
            if victim.request.req_id not in self._armed and self._armed.arm(victim.request):
                shortage -= victim.gain

    def _compact(self, victim: _Victim, plan: StepPlan) -> bool:
        """Compact one request in every group where that gives something back."""
        request = victim.request
        gaining = [group for group in self._groups if group.gain(request, victim.longest) > 0]
        done = [group.compact(request, plan) for group in gaining]
        if any(done):
            self._armed.release(request.req_id)
        return any(done)
