"""Reference for compact: gather the survivors of every head on its own, append the tail."""

import torch


def compact_naive(states: torch.Tensor, keep: torch.Tensor, settled_len: int) -> torch.Tensor:
    """Drop the evicted tokens of a dense cache.

    Args:
        states: [num_layers, num_heads, total_len, head_size], keys or values in cache order.
        keep: int64 [num_layers, num_heads, budget], ascending, all < settled_len.
        settled_len: tokens [settled_len, total_len) follow the survivors unchanged.

    Returns:
        [num_layers, num_heads, budget + total_len - settled_len, head_size]
    """
    index = keep.unsqueeze(-1).expand(-1, -1, -1, states.shape[-1])
    survivors = states.gather(2, index)
    return torch.cat([survivors, states[:, :, settled_len:]], dim=2)
