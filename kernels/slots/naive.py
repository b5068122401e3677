"""Reference for slots: a loop over requests."""

from torch import Tensor

from rkv_vllm.kernels.slots.step import StepRows, StepSlots


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
        slot = int(rows.slots[state])
        if slot >= 0:
            first = max(start, end - rows.ring_len)
            ring_idx = positions[first:end] % rows.ring_len
            out.token_rows[first:end] = (slot * rows.ring_len + ring_idx).int()
