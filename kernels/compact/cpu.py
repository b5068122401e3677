"""compact in C++: moves the survivors inside the paged cache, without a copy of it."""

from ctypes import byref

from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.compact.naive import check_keep
from rkv_vllm.kernels.native import library, paged
from rkv_vllm.kernels.paged import PagedStates


def compact_cpu(states: PagedStates, batch: EvictionBatch, keep: Tensor) -> None:
    """As `compact_naive`."""
    batch.check_rows(states)
    check_keep(keep, batch, states)
    keep = keep.contiguous()
    described = paged(states)
    for i, eviction in enumerate(batch.evictions):
        kept = keep[i, :, : eviction.budget]
        first, end = eviction.prefix_len, eviction.settled_len
        if kept.numel() and not first <= int(kept.min()) <= int(kept.max()) < end:
            raise ValueError(
                f"keep of request {i}: expected positions in [{first}, {end}), got {kept.tolist()}"
            )
        library().rkv_compact(
            byref(described),
            states.blocks.element_size(),
            batch.old_block_table[i].data_ptr(),
            batch.new_block_table[i].data_ptr(),
            keep[i].data_ptr(),
            keep.stride(1),
            eviction.prefix_len,
            eviction.budget,
            eviction.settled_len,
            eviction.total_len,
        )
