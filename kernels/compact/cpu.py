"""compact in C++: moves the survivors inside the paged cache, without a copy of it."""

from ctypes import byref

from torch import Tensor

from rkv_vllm.kernels.eviction import EvictionBatch
from rkv_vllm.kernels.native import library, paged
from rkv_vllm.kernels.paged import PagedStates


def compact_cpu(states: PagedStates, batch: EvictionBatch, keep: Tensor) -> None:
    """As `compact_naive`, but cells behind the last token keep what they held."""
    batch.check_rows(states)
    batch.check_keep(keep, states)
    keep = keep.contiguous()
    described = paged(states)
    for i, eviction in enumerate(batch.evictions):
        kept = keep[i, :, : eviction.budget]
        if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < eviction.settled_len:
            raise ValueError(
                f"keep of request {i}: expected positions in [0, {eviction.settled_len}), "
                f"got {kept.tolist()}"
            )
        library().rkv_compact(
            byref(described),
            states.dtype.itemsize,
            batch.old_block_table[i].data_ptr(),
            batch.new_block_table[i].data_ptr(),
            keep[i].data_ptr(),
            keep.stride(1),
            eviction.budget,
            eviction.settled_len,
            eviction.total_len,
        )
