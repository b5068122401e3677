"""What the slots kernel reads and writes of one step, and its reference: a loop over requests."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepRows:
    """The requests of a step.

    Attributes:
        state_idx: int64 [num_reqs], row of each request in the per-request tensors; -1 is padding.
        query_start_loc: int32 [>= num_reqs + 1], first token of each request in the step.
        num_evicted: int32 [max_num_reqs], by request state; physical = logical - this.
        seats: int32 [max_num_reqs], by request state: place in the query ring, -1 = not watched.
        ring_len: positions per seat.
    """

    state_idx: Tensor
    query_start_loc: Tensor
    num_evicted: Tensor
    seats: Tensor
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


def slots_naive(
    rows: StepRows, positions: Tensor, block_table: Tensor, block_size: int, out: StepSlots
) -> None:
    """Find where each token of a step is written, how long its request is, and who is watched.

    Args:
        rows: the requests of the step.
        positions: int64 [>= num_tokens], logical position of each token.
        block_table: int32 [max_num_reqs, max_blocks], by request state.
        block_size: tokens per block of that table.
        out: filled whole: slots and rows of padding become -1, lengths of padding 0.
    """
    for tensor, padding in ((out.slot_mapping, -1), (out.token_rows, -1), (out.seq_lens, 0)):
        tensor.fill_(padding)
    for i, state in enumerate(rows.state_idx.tolist()):
        start, end = rows.query_start_loc[i : i + 2].tolist()
        num_evicted = int(rows.num_evicted[state]) if state >= 0 else 0
        out.seq_lens[i] = int(positions[end - 1]) + 1 - num_evicted
        if state < 0:
            continue
        logical = positions[start:end]
        physical = logical - num_evicted
        block_ids = block_table[state, physical // block_size]
        out.slot_mapping[start:end] = block_ids.long() * block_size + physical % block_size
        seat = int(rows.seats[state])
        if seat >= 0:
            first = max(start, end - rows.ring_len)
            ring_idx = positions[first:end] % rows.ring_len
            out.token_rows[first:end] = (seat * rows.ring_len + ring_idx).int()
