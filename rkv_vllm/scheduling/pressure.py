"""Compacts only when the pool runs short, and then no more than it takes.

Looks at all compressed groups, because they share the pool. Knows lengths and blocks, no tensors.
Next: pressed_group.py for one group, armed.py for who is recorded; demand.py for the forecast,
floors.py for who is admitted.

Source: SPEC section 5.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from vllm.utils.math_utils import cdiv
from vllm.v1.request import Request

from rkv_vllm.scheduling.armed import ArmedRequests
from rkv_vllm.scheduling.booking import ScheduledRequest
from rkv_vllm.scheduling.demand import Demand
from rkv_vllm.scheduling.directive import StepPlan
from rkv_vllm.scheduling.planner import Lookup, Seats
from rkv_vllm.scheduling.pressed_group import PressedGroup


class _Victim(NamedTuple):
    """A request that could be compacted, and what the pool would get back.

    Attributes:
        above_floor: whether it holds more than it needs until it can be compacted again.
        rank: of those alike in that the highest are compacted first.
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
        rank: of a request; of those above their floors, and then of the others, the highest are
            compacted first, whatever they give.
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
        rank: Callable[[Request], int],
        most_copies: int,
    ) -> None:
        self._groups = groups
        self._armed = armed
        self.demand = demand
        self._num_free = num_free
        self._seats = seats
        self._rank = rank
        self._most_copies = most_copies

    def horizon(self, num_running: int) -> int:
        """Steps from arming a request to the blocks of its compaction, and one to spare.

        With fewer seats than requests they are armed in turns, so it takes as many times longer.
        """
        turns = cdiv(num_running, self._seats.count) if self._seats.count else 1
        window = self._seats.window if self._seats.count else 0
        # A window may begin behind drafts under way that are then rejected.
        limits = self.demand.limits
        return (window + 2 + limits.steps_in_flight * limits.max_advance) * max(turns, 1)

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
            limits = self.demand.limits
            ahead = min(scheduled.num_in_flight, limits.steps_in_flight * limits.max_advance)
            then = scheduled
            if not is_warm:
                num_computed = scheduled.num_computed + ahead
                then = scheduled._replace(num_computed=num_computed, num_in_flight=ahead)
            longest = self.demand.longest(request, num_steps)
            gain = sum(max(group.gain(then, longest), 0) for group in self._groups)
            if gain:
                growth = limits.growth(num_steps)
                above = any(group.is_above_floor(then, growth) for group in self._groups)
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
