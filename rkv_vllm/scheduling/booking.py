"""One eviction: what the scheduler knows of a request, booked and put into a directive.

Shared by everything that decides when; knows no vLLM, no tensors, no blocks beyond the `Books` that
move them. Next: books.py.
"""

from typing import Any, NamedTuple, Protocol

from rkv_vllm.policy import Terms
from rkv_vllm.scheduling.directive import EvictionDirective


class ScheduledRequest(NamedTuple):
    """One decoding request of a step, as the scheduler leaves it after advancing its counters.

    Attributes:
        req_id: vLLM's request id.
        num_computed: tokens computed once this step has run, drafts counted as accepted.
        num_scheduled: tokens that this step computes.
        num_in_flight: tokens whose step has not been processed yet, this step included.
        prompt_len: tokens of its prompt.
        seed: 64 bits that a repeated run repeats.
        method_options: the method's options if the request has its own.
    """

    req_id: str
    num_computed: int
    num_scheduled: int
    num_in_flight: int
    prompt_len: int = 0
    seed: int = 0
    method_options: Any | None = None

    @property
    def settled(self) -> int:
        """Tokens that can no longer be rejected or rolled back."""
        return self.num_computed - self.num_in_flight


class Books(Protocol):
    """The block bookkeeping the planner relies on (GroupBooks)."""

    num_evicted: dict[str, int]

    def evict(
        self, req_id: str, num_evict: int, total_len: int, prefix_len: int
    ) -> tuple[list[int], list[int]] | None:
        """Book one eviction; returns (old, new) block ids, None when blocks are short."""


def book_eviction(
    group_id: int,
    books: Books,
    request: ScheduledRequest,
    terms: Terms,
    seat: int | None,
    reason: str,
) -> EvictionDirective | None:
    """Book the eviction of all settled tokens above prefix and budget.

    Args:
        group_id: of the group.
        books: of the group.
        request: more than `terms.budget` of its tokens behind the prefix have settled.
        terms: of the request in this group.
        seat: that holds the queries of its last settled tokens; None when none are needed.
        reason: see `EvictionDirective`.

    Returns:
        What the workers have to do, or None (nothing changed) when blocks are short.
    """
    before = books.num_evicted.get(request.req_id, 0)
    settled_len, total_len = request.settled - before, request.num_computed - before
    num_evict = settled_len - terms.prefix_len - terms.budget
    blocks = books.evict(request.req_id, num_evict, total_len, terms.prefix_len)
    if blocks is None:
        return None
    return EvictionDirective(
        req_id=request.req_id,
        group_id=group_id,
        num_evicted_before=before,
        prefix_len=terms.prefix_len,
        settled_len=settled_len,
        total_len=total_len,
        num_evict=num_evict,
        seat=-1 if seat is None else seat,
        prompt_len=request.prompt_len,
        # Odd, so that the seeds of one request never coincide.
        seed=(request.seed + 0x9E3779B97F4A7C15 * request.settled) % 2**64,
        method_options=request.method_options,
        old_block_ids=blocks[0],
        new_block_ids=blocks[1],
        reason=reason,
    )
