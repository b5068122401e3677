"""What the slots kernel reads and writes of one step."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepRows:
    """The requests of a step.

    Attributes:
        state_idx: int64 [num_reqs], row of each request in the per-request tensors; -1 is padding.
        query_start_loc: int32 [>= num_reqs + 1], first token of each request in the step.
        num_evicted: int32 [max_num_reqs], by request state; physical = logical - this.
        slots: int32 [max_num_reqs], by request state: observation slot, -1 = not watched.
        ring_len: positions per observation slot.
    """

    state_idx: Tensor
    query_start_loc: Tensor
    num_evicted: Tensor
    slots: Tensor
    ring_len: int


@dataclass(frozen=True)
class StepSlots:
    """Persistent outputs; captured graphs hold their addresses.

    Attributes:
        slot_mapping: int64 [max_num_tokens], cache slot of each token, -1 = write nothing.
        token_rows: int32 [max_num_tokens], see `observe_naive`.
        seq_lens: int32 [max_num_reqs], physical length of each request of the step.
    """

    slot_mapping: Tensor
    token_rows: Tensor
    seq_lens: Tensor
