"""observe: keep the queries of watched tokens; the last `window` of them judge a compaction."""

from torch import Tensor

from rkv_vllm.kernels.native import library
from rkv_vllm.kernels.observe.cpu import observe_cpu
from rkv_vllm.kernels.observe.naive import observe_naive

__all__ = ["observe"]


def observe(pool: Tensor, layer_idx: int, query: Tensor, token_rows: Tensor) -> None:
    """Write the queries of one layer's watched tokens with the fastest version; `observe_naive`.

    Raises:
        ValueError: the shapes, dtypes or strides do not fit.
    """
    _check(pool, layer_idx, query, token_rows)
    if pool.device.type == "cuda":
        # Imported late: a CPU build of vLLM comes without Triton.
        from rkv_vllm.kernels.observe.triton import observe_triton

        observe_triton(pool, layer_idx, query, token_rows)
    elif library() is not None and query.dtype == pool.dtype:
        observe_cpu(pool, layer_idx, query, token_rows)
    else:
        observe_naive(pool, layer_idx, query, token_rows)


def _check(pool: Tensor, layer_idx: int, query: Tensor, token_rows: Tensor) -> None:
    fits = (
        pool.dim() == 5
        and query.dim() == 3
        and query.shape[1:] == pool.shape[3:]
        and query.stride(2) == 1
        and pool.stride()[3:] == (pool.shape[4], 1)
        and 0 <= layer_idx < pool.shape[1]
        and token_rows.dtype.itemsize == 4
        and token_rows.is_contiguous()
        and token_rows.shape[0] >= query.shape[0]
    )
    if not fits or not pool.device == query.device == token_rows.device:
        raise ValueError(
            "observe: expected pool [slots, layers, ring, heads, head_size], query [tokens, heads, "
            "head_size] with a contiguous last dimension and contiguous int32 token_rows [>= "
            f"tokens] on one device, got pool {list(pool.shape)} on {pool.device}, layer "
            f"{layer_idx}, query {list(query.shape)} {query.stride()} on {query.device} and "
            f"{token_rows.dtype} token_rows {list(token_rows.shape)} on {token_rows.device}"
        )
