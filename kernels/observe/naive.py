"""Reference for observe: one indexed assignment."""

from torch import Tensor


def observe_naive(ring: Tensor, layer_idx: int, query: Tensor, token_rows: Tensor) -> None:
    """Write the queries of the watched tokens of one layer into the query ring.

    Args:
        ring: [num_seats, num_layers, ring_len, num_heads, head_size], written in place.
        layer_idx: layer of the ring.
        query: [num_tokens, num_heads, head_size] after RoPE, last dimension contiguous.
        token_rows: int32 [>= num_tokens]. For a watched token seat * ring_len + logical position
            modulo ring_len, for all others -1. No row stands there twice.

    Raises:
        ValueError: the shapes, dtypes or strides do not fit.
    """
    check_observe(ring, layer_idx, query, token_rows)
    ring_len = ring.shape[2]
    rows = token_rows[: query.shape[0]]
    watched = (rows >= 0).nonzero().squeeze(1)
    rows = rows[watched].long()
    ring[rows // ring_len, layer_idx, rows % ring_len] = query[watched].to(ring.dtype)


def check_observe(ring: Tensor, layer_idx: int, query: Tensor, token_rows: Tensor) -> None:
    """Raise ValueError unless one layer's queries can be recorded in this ring."""
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
