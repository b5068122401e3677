"""One compressed group under pressure: what the compaction of each request would give back.

Stands where GroupPlanner stands for `--kv-when always`. Knows lengths and blocks, no tensors. Next:
pressure.py, which looks at all groups and says who is next; booking.py.
"""

from dataclasses import dataclass

from vllm.utils.math_utils import cdiv

from rkv_vllm.policy import Terms, floor_len
from rkv_vllm.scheduling.armed import ArmedRequests
from rkv_vllm.scheduling.booking import ScheduledRequest, book_eviction
from rkv_vllm.scheduling.books import GroupBooks
from rkv_vllm.scheduling.directive import StepPlan


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
        if not num_evict or num_held <= num_kept:
            return 0
        # A shared block does not return, and what is kept of it needs a copy.
        num_shared = self._books.num_leading_shared_blocks(request.req_id, untouched)
        later = longest - self._books.num_evicted.get(request.req_id, 0)
        without = max(cdiv(later, self.block_size), num_held)
        return without - max(cdiv(later - num_evict, self.block_size), num_kept) - num_shared

    def is_above_floor(self, request: ScheduledRequest, growth: int) -> bool:
        """Whether the request holds more than it needs to grow by so many tokens uncompacted."""
        terms = self._terms[request.req_id]
        untouched, _, num_held, _ = self._row(request)
        num_shared = self._books.num_leading_shared_blocks(request.req_id, untouched)
        floor = floor_len(terms, growth, self.block_size)
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
