"""What the scheduler tells the workers about one step.

Knows no tensors and no vLLM. The messages travel as the attribute `kv_compression` of vLLM's
`SchedulerOutput`, pickled where workers live in other processes. Next: worker/flush.py, which
carries a directive out.
"""

from dataclasses import dataclass, field

STEP_PLAN_ATTRIBUTE = "kv_compression"


@dataclass(frozen=True, slots=True)
class EvictionDirective:
    """Evict exactly `num_evict` tokens from the settled prefix of one request.

    Lengths are physical (positions in the request's cache) and count from before this eviction.
    The directive never says "compact to B": a rejected draft changes how many tokens follow the
    settled prefix, but not how many leave it.

    Attributes:
        req_id: vLLM's request id.
        num_evicted_before: tokens evicted by earlier compactions; logical = physical + this.
        settled_len: C, tokens [0, C) are judged and shrink by `num_evict`.
        total_len: L >= C, tokens [C, L) move along unchanged.
        num_evict: E = C - budget.
        slot: observation slot that holds the queries of [C - window, C).
        old_block_ids: the blocks that hold [0, L) now, in order.
        new_block_ids: the blocks that hold [0, L - E) afterwards, in order.
    """

    req_id: str
    num_evicted_before: int
    settled_len: int
    total_len: int
    num_evict: int
    slot: int
    old_block_ids: list[int]
    new_block_ids: list[int]

    @property
    def budget(self) -> int:
        """Survivors among the settled tokens."""
        return self.settled_len - self.num_evict

    @property
    def num_freed_blocks(self) -> int:
        """Blocks this request holds less of afterwards."""
        return len(self.old_block_ids) - len(self.new_block_ids)

    @property
    def settled_logical_len(self) -> int:
        """Logical position behind the last settled token."""
        return self.settled_len + self.num_evicted_before


@dataclass(slots=True)
class StepPlan:
    """Compression's share of one scheduler step.

    Attributes:
        directives: compactions to run right after this step's forward.
        watched: observation slot of every scheduled request whose queries this step records.
        num_deferred: compactions that became due and have to wait, first seen in this step.
        num_short_of_blocks: those of them that wait for a free block; the others wait for a slot
            or for its window.
        num_free_blocks: blocks in the free queue after this step's reclaim.
        num_total_blocks: blocks of the pool, null block not counted.
    """

    directives: list[EvictionDirective] = field(default_factory=list)
    watched: dict[str, int] = field(default_factory=dict)
    num_deferred: int = 0
    num_short_of_blocks: int = 0
    num_free_blocks: int = 0
    num_total_blocks: int = 0
