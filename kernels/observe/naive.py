"""Reference for observe: one indexed assignment."""

import torch
from torch import Tensor

from rkv_vllm.kernels.paged import FLOATS_OF_A_BYTE


def observe_naive(
    ring: Tensor,
    layer_idx: int,
    query: Tensor,
    token_rows: Tensor,
    query_scale: Tensor | None = None,
) -> None:
    """Write the queries of the watched tokens of one layer into the query ring.

    Args:
        ring: [num_seats, num_layers, ring_len, num_heads, head_size], written in place.
        layer_idx: layer of the ring.
        query: [num_tokens, num_heads, head_size] after RoPE, last dimension contiguous.
        token_rows: int32 [>= num_tokens]. For a watched token seat * ring_len + logical position
            modulo ring_len, for all others -1. No row stands there twice.
        query_scale: float32, factor of a query of fp8, one or one for each KV head; None with
            other queries. Query head h reads KV head h * KV heads // num_heads.

    Raises:
        ValueError: the shapes, dtypes or strides do not fit.
    """
    check_observe(ring, layer_idx, query, token_rows, query_scale)
    ring_len = ring.shape[2]
    rows = token_rows[: query.shape[0]]
    watched = (rows >= 0).nonzero().squeeze(1)
    rows = rows[watched].long()
    if query_scale is None:
        found = query[watched]
    else:
        # torch does not index every float of a byte.
        found = query.view(torch.uint8)[watched].view(query.dtype).float()
        found = found.unflatten(1, (query_scale.numel(), -1)) * query_scale.view(-1, 1, 1)
        found = found.flatten(1, 2)
    ring[rows // ring_len, layer_idx, rows % ring_len] = found.to(ring.dtype)


def check_observe(
    ring: Tensor,
    layer_idx: int,
    query: Tensor,
    token_rows: Tensor,
    query_scale: Tensor | None = None,
) -> None:
    """Raise ValueError unless one layer's queries can be recorded in this ring."""
    if (query_scale is not None) != (query.dtype in FLOATS_OF_A_BYTE):
        raise ValueError(
            f"observe: expected a query_scale with queries of {FLOATS_OF_A_BYTE} and no others, "
            f"got {'none' if query_scale is None else 'one'} with {query.dtype}"
        )
    if query_scale is not None and (
        query_scale.dtype != torch.float32
        or not query_scale.is_contiguous()
        or query_scale.device != query.device
        or query.shape[1] % query_scale.numel()
    ):
        raise ValueError(
            f"observe: expected query_scale float32 on {query.device}, contiguous, as many as "
            f"divide {query.shape[1]} heads, got {query_scale.dtype} {list(query_scale.shape)} on "
            f"{query_scale.device}"
        )
    fits = (
        ring.dim() == 5
        and query.dim() == 3
        and query.shape[1:] == ring.shape[3:]
        and query.stride(2) == 1
        and ring.stride()[3:] == (ring.shape[4], 1)
        and 0 <= layer_idx < ring.shape[1]
        and token_rows.dtype.itemsize == 4
        and token_rows.is_contiguous()
        and token_rows.shape[0] >= query.shape[0]
    )
    if not fits or not ring.device == query.device == token_rows.device:
        raise ValueError(
            "observe: expected ring [seats, layers, ring, heads, head_size], query [tokens, heads, "
            "head_size] with a contiguous last dimension and contiguous int32 token_rows [>= "
            f"tokens] on one device, got ring {list(ring.shape)} on {ring.device}, layer "
            f"{layer_idx}, query {list(query.shape)} {query.stride()} on {query.device} and "
            f"{token_rows.dtype} token_rows {list(token_rows.shape)} on {token_rows.device}"
        )
