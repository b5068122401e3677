"""score in C++: reads the paged keys in place, memory O(num_tokens) per thread."""

from ctypes import byref

import torch
from torch import Tensor

from rkv_vllm.kernels.native import DTYPES, check_block_ids, library, paged
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.methods.base import NonFiniteScoreError

_NO_MEMORY = -2


def score_cpu(
    keys: PagedStates,
    block_ids: Tensor,
    num_tokens: int,
    queries: Tensor,
    *,
    window: int = 8,
    lam: float = 0.1,
    pool: int = 7,
    threshold: float = 0.5,
) -> Tensor:
    """As `score_naive`."""
    num_heads = keys.num_layers * keys.num_heads
    check_block_ids(keys, block_ids, num_tokens)
    group = queries.shape[0] // max(num_heads, 1)
    expected = (num_heads * group, window, keys.head_size)
    if num_tokens <= window or group < 1 or queries.shape != expected:
        raise ValueError(
            f"queries: expected [{num_heads} * group, {window}, {keys.head_size}] and more than "
            f"{window} tokens, got {list(queries.shape)} and {num_tokens} tokens"
        )
    queries = queries.to(keys.blocks.dtype).contiguous()
    scores = torch.empty(num_heads, num_tokens - window)
    bad_head = library().rkv_score(
        byref(paged(keys)),
        block_ids.data_ptr(),
        queries.data_ptr(),
        DTYPES[queries.dtype],
        num_tokens,
        group,
        window,
        lam,
        pool,
        threshold,
        scores.data_ptr(),
    )
    if bad_head == _NO_MEMORY:
        raise MemoryError(f"no memory to score {num_tokens} tokens of {num_heads} heads")
    if bad_head >= 0:
        raise NonFiniteScoreError(bad_head)
    return scores
