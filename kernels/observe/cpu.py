"""observe in C++: looks for watched tokens without leaving the call."""

from ctypes import c_int32, c_int64, c_void_p
from functools import cache

from torch import Tensor

from rkv_vllm.kernels.native import library


def observe_cpu(pool: Tensor, layer_idx: int, query: Tensor, token_rows: Tensor) -> None:
    """As `observe_naive`, for a query in the pool's dtype."""
    num_tokens, num_heads, head_size = query.shape
    _function()(
        pool.data_ptr(),
        pool.stride(0),
        pool.stride(2),
        layer_idx * pool.stride(1),
        pool.shape[2],
        query.data_ptr(),
        query.stride(0),
        query.stride(1),
        token_rows.data_ptr(),
        num_tokens,
        num_heads,
        head_size,
        pool.element_size(),
    )


@cache
def _function():
    function = library().rkv_observe
    function.restype = None
    function.argtypes = (
        *(c_void_p, c_int64, c_int64, c_int64, c_int64),
        *(c_void_p, c_int64, c_int64, c_void_p),
        *(c_int64, c_int64, c_int64, c_int32),
    )
    return function
