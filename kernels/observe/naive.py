"""Reference for observe: one indexed assignment."""

from torch import Tensor


def observe_naive(pool: Tensor, layer_idx: int, query: Tensor, token_rows: Tensor) -> None:
    """Write the queries of the watched tokens of one layer into the observation pool.

    Args:
        pool: [num_slots, num_layers, ring_len, num_heads, head_size], written in place.
        layer_idx: layer of the pool.
        query: [num_tokens, num_heads, head_size] after RoPE, last dimension contiguous.
        token_rows: int32 [>= num_tokens]. For a watched token slot * ring_len + logical position
            modulo ring_len, for all others -1. No row stands there twice.
    """
    ring_len = pool.shape[2]
    rows = token_rows[: query.shape[0]]
    watched = (rows >= 0).nonzero().squeeze(1)
    rows = rows[watched].long()
    pool[rows // ring_len, layer_idx, rows % ring_len] = query[watched].to(pool.dtype)
