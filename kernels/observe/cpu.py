"""observe in C++: looks for watched tokens without leaving the call."""

from ctypes import c_int32, c_int64, c_void_p
from functools import cache

from torch import Tensor

from rkv_vllm.kernels.native import library
from rkv_vllm.kernels.observe.naive import check_observe, observe_naive


def observe_cpu(
    ring: Tensor,
    layer_idx: int,
    query: Tensor,
    token_rows: Tensor,
    query_scale: Tensor | None = None,
) -> None:
    """As `observe_naive`; it copies bytes, so torch serves where a query has to be rounded."""
    if query.dtype != ring.dtype:
        observe_naive(ring, layer_idx, query, token_rows, query_scale)
        return
    check_observe(ring, layer_idx, query, token_rows)
    num_tokens, num_heads, head_size = query.shape
    _function()(
        ring.data_ptr(),
        ring.stride(0),
        ring.stride(2),
        layer_idx * ring.stride(1),
        ring.shape[2],
        query.data_ptr(),
        query.stride(0),
        query.stride(1),
        token_rows.data_ptr(),
        num_tokens,
        num_heads,
        head_size,
        ring.element_size(),
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
