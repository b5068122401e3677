"""VaSE's two halves in C++: read the paged cache in place, memory O(tokens) per thread."""

from ctypes import byref

from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.native import DTYPES, check_memory, library, paged
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.kernels.rkv.cpu import score_windows_cpu
from rkv_vllm.kernels.rkv.naive import check_keys, new_scores


def attention_cpu(
    keys: PagedStates,
    batch: EvictionBatch,
    queries: Tensor,
    scale: Tensor,
    soft_cap: Tensor,
    *,
    pool: int,
) -> Tensor:
    """As `attention_naive`; one call per request, whose heads the threads share."""
    call = library().rkv_attention
    return score_windows_cpu(call, keys, batch, queries, scale, soft_cap, pool)


def channel_range_cpu(values: PagedStates, batch: EvictionBatch) -> Tensor:
    """As `channel_range_naive`; one call per request, whose heads the threads share."""
    batch.check_rows(values)
    check_keys(values)
    result = new_scores(values, batch).zero_()
    described = paged(values)
    for i, eviction in enumerate(batch.evictions):
        if num_candidates := batch.num_candidates(i):
            done = library().rkv_channel_range(
                byref(described),
                batch.old_block_table[i].data_ptr(),
                DTYPES[values.dtype],
                eviction.prefix_len,
                num_candidates,
                result[i].data_ptr(),
                result.stride(1),
            )
            check_memory(done, f"score {num_candidates} tokens")
    if values.quantisation is not None:
        result.mul_(values.quantisation.scale.reshape(1, -1, 1))
    return result
