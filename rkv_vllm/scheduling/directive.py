"""What the scheduler tells the workers about one step.

Knows no tensors and no vLLM. The messages travel as the attribute `kv_compression` of vLLM's
`SchedulerOutput`, pickled where workers live in other processes. Next: worker/flush.py, which
carries a directive out, and worker/host_cache.py, which swaps.
"""

from dataclasses import dataclass, field
from typing import Any

# Why a request is compacted: its buffer was full, the pool ran short, or its prompt is longer than
# its cache may get.
REASONS = ("buffer", "pressure", "prompt")

STEP_PLAN_ATTRIBUTE = "kv_compression"


@dataclass(frozen=True, slots=True)
class EvictionDirective:
    """Evict exactly `num_evict` tokens from the settled part of one request in one KV-cache group.

    Lengths are physical (positions in the request's cache) and count from before this eviction.
    The directive never says "compact to B": a rejected draft changes how many tokens follow the
    settled ones, but not how many of those leave.

    With blocks of 4 tokens, prefix 5, settled_len 16, total_len 17 and num_evict 5: tokens 0 to 4
    stay, 6 of the tokens 5 to 15 survive at 5 to 10, token 16 moves to 11; of five blocks the
    first stays untouched and three are left.

    Attributes:
        req_id: vLLM's request id.
        group_id: index of the KV-cache group in vLLM's configuration.
        num_evicted_before: tokens evicted by earlier compactions; logical = physical + this.
        prefix_len: P, tokens [0, P) stay where they are.
        settled_len: C, tokens [P, C) are judged and shrink by `num_evict`.
        total_len: L >= C, tokens [C, L) move along unchanged.
        num_evict: E = C - P - budget.
        seat: place in the query ring that holds the queries of [C - window, C); -1 when the method
            asked for none.
        prompt_len: tokens of the request's prompt.
        seed: 64 bits that a repeated run repeats, others for every compaction.
        method_options: the method's options if the request has its own, None for the server's.
        old_block_ids: the blocks that hold [0, L) now, in order.
        new_block_ids: the blocks that hold [0, L - E) afterwards, in order.
        reason: why, one of `REASONS`.
    """

    req_id: str
    group_id: int
    num_evicted_before: int
    prefix_len: int
    settled_len: int
    total_len: int
    num_evict: int
    seat: int
    prompt_len: int
    seed: int
    method_options: Any | None
    old_block_ids: list[int]
    new_block_ids: list[int]
    reason: str = "buffer"

    @property
    def budget(self) -> int:
        """Survivors among the settled tokens behind the prefix."""
        return self.settled_len - self.prefix_len - self.num_evict

    @property
    def num_freed_blocks(self) -> int:
        """Blocks this request holds less of afterwards."""
        return len(self.old_block_ids) - len(self.new_block_ids)

    @property
    def settled_logical_len(self) -> int:
        """Logical position behind the last settled token."""
        return self.settled_len + self.num_evicted_before


@dataclass(frozen=True, slots=True)
class SwapDirective:
    """Copy what one request holds in one KV-cache group to host memory, or back.

    Attributes:
        req_id: vLLM's request id.
        group_id: index of the KV-cache group in vLLM's configuration.
        num_evicted: tokens evicted from it so far, those of a pending directive included.
        block_ids: its blocks, in order.
        host_block_ids: host blocks, one for each.
        seat: place in the query ring of the queries recorded for it; -1 when there are none.
        host_window_ids: host blocks of these queries; unused without a seat.
    """

    req_id: str
    group_id: int
    num_evicted: int
    block_ids: list[int]
    host_block_ids: list[int]
    seat: int
    host_window_ids: list[int]


@dataclass(slots=True)
class StepPlan:
    """Compression's share of one scheduler step.

    Attributes:
        directives: compactions to run right after this step's forward, in the order of the books.
        watched: by group, the seat of every scheduled request whose queries this step records.
        num_waiting_for_seat: compactions that are due and begin to wait for a seat or its window.
        num_waiting_for_blocks: compactions that are due and begin to wait for a free block.
        saved: copies to host memory, to be made right after the flush of what the step before
            booked, the directives of these requests included.
        restored: copies from host memory, to be made behind those and before this step's forward.
        adopted: request, group and evicted tokens of those that start from a compressed prefix.
        num_recomputed: preempted requests whose compacted cache is lost for want of swap space or
            because it may not be kept; 0 without a swap space.
        under_pressure: whether the pool runs short, with `--kv-when pressure`.
    """

    directives: list[EvictionDirective] = field(default_factory=list)
    watched: dict[int, dict[str, int]] = field(default_factory=dict)
    num_waiting_for_seat: int = 0
    num_waiting_for_blocks: int = 0
    saved: list[SwapDirective] = field(default_factory=list)
    restored: list[SwapDirective] = field(default_factory=list)
    adopted: list[tuple[str, int, int]] = field(default_factory=list)
    num_recomputed: int = 0
    under_pressure: bool = False

    @property
    def num_deferred(self) -> int:
        """Waits that begin in this step; a compaction may wait for a seat and then for blocks."""
        return self.num_waiting_for_seat + self.num_waiting_for_blocks
