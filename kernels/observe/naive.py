"""Reference for observe: one indexed assignment."""

import torch


def observe_naive(
    pool: torch.Tensor,
    layer_idx: int,
    query: torch.Tensor,
    token_idx: torch.Tensor,
    slot_ids: torch.Tensor,
    ring_idx: torch.Tensor,
) -> None:
    """Write the queries of some tokens to their place in the observation pool.

    Args:
        pool: [num_slots, num_layers, ring_len, num_heads, head_size], written in place.
        layer_idx: layer of the pool.
        query: [num_tokens, num_heads, head_size] after RoPE, any dtype.
        token_idx: int64 [k], rows of `query`.
        slot_ids: int64 [k], observation slot of each token.
        ring_idx: int64 [k], logical position of each token modulo ring_len.
    """
    pool[slot_ids, layer_idx, ring_idx] = query[token_idx].to(pool.dtype)
