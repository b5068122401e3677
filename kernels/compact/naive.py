"""Reference for compact: read everything, gather per head, write."""

import torch
from torch import Tensor

from rkv_vllm.kernels.paged import PagedStates


def compact_naive(
    states: PagedStates,
    old_block_ids: Tensor,
    new_block_ids: Tensor,
    keep: Tensor,
    settled_len: int,
    total_len: int,
) -> None:
    """Leave the kept tokens and the tail, in order, in the new blocks.

    Args:
        states: keys or values, changed in place.
        old_block_ids: int64, the row that holds tokens [0, total_len).
        new_block_ids: int64, the row for the survivors; block i is old block i or a foreign one.
        keep: int64 [num_layers * num_kv_heads, budget], ascending, all < settled_len.
        settled_len: tokens [settled_len, total_len) follow the survivors unchanged.
        total_len: tokens before the eviction.
    """
    dense = states.read(old_block_ids, total_len)
    index = keep.view(*dense.shape[:2], -1, 1).expand(-1, -1, -1, states.head_size)
    survivors = dense.gather(2, index)
    states.write(new_block_ids, torch.cat([survivors, dense[:, :, settled_len:]], dim=2))
