"""Whose queries are recorded under pressure, in which seats.

Knows seats and lengths, no vLLM. Next: pressure.py, which arms and compacts.
"""

from typing import NamedTuple

from rkv_vllm.scheduling.booking import ScheduledRequest
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
