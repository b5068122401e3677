"""compact in C++: moves the survivors inside the paged cache, without a copy of it."""

from ctypes import byref

import torch
from torch import Tensor

from rkv_vllm.kernels.native import check_block_ids, library, paged
from rkv_vllm.kernels.paged import PagedStates


def compact_cpu(
    states: PagedStates,
    old_block_ids: Tensor,
    new_block_ids: Tensor,
    keep: Tensor,
    settled_len: int,
    total_len: int,
) -> None:
    """As `compact_naive`, but cells behind the last token keep what they held."""
    num_heads = states.num_layers * states.num_heads
    if keep.dtype != torch.int64 or keep.dim() != 2 or keep.shape[0] != num_heads:
        raise ValueError(
            f"keep: expected int64 [{num_heads}, budget], got {keep.dtype} {list(keep.shape)}"
        )
    keep = keep.contiguous()
    budget = keep.shape[1]
    if budget and not 0 <= int(keep.min()) <= int(keep.max()) < settled_len <= total_len:
        raise ValueError(f"keep: expected positions in [0, {settled_len}), got {keep.tolist()}")
    check_block_ids(states, old_block_ids, total_len)
    check_block_ids(states, new_block_ids, budget + total_len - settled_len)
    library().rkv_compact(
        byref(paged(states)),
        states.blocks.element_size(),
        old_block_ids.data_ptr(),
        new_block_ids.data_ptr(),
        keep.data_ptr(),
        budget,
        settled_len,
        total_len,
    )
