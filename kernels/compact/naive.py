"""Reference for compact: per request read everything, gather per head, write."""

import torch
from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.paged import PagedStates


def compact_naive(states: PagedStates, batch: EvictionBatch, keep: Tensor) -> None:
    """Leave prefix, kept tokens and tail of every request, in order, in its new blocks.

    Blocks that are full of prefix are neither read nor written. What follows the last token in its
    block becomes zero: a fresh block may hold what no attention may read, masked or not. No request
    may write a block that another one of the batch reads.

    Args:
        states: keys or values, changed in place.
        batch: the requests.
        keep: int32 [R, num_layers * num_kv_heads, largest budget]; of request r the first
            `budget` of each row are ascending and in [prefix_len, settled_len).

    Raises:
        ValueError: the rows or `keep` do not fit the cache.
    """
    batch.check_rows(states)
    check_keep(keep, batch, states)
    for i, eviction in enumerate(batch.evictions):
        num_full = eviction.prefix_len // states.block_size
        start = num_full * states.block_size
        dense = states.read(batch.old_block_table[i], eviction.total_len, start)
        index = (keep[i, :, : eviction.budget].long() - start).view(*dense.shape[:2], -1, 1)
        survivors = dense.gather(2, index.expand(-1, -1, -1, states.head_size))
        prefix = dense[:, :, : eviction.prefix_len - start]
        after = torch.cat([prefix, survivors, dense[:, :, eviction.settled_len - start :]], dim=2)
        num_new = -(-eviction.new_len // states.block_size)
        states.write(batch.new_block_table[i, num_full:num_new], after)


def check_keep(keep: Tensor, batch: EvictionBatch, states: PagedStates) -> None:
    """Raise ValueError unless this is a choice for this batch and this cache."""
    expected = (batch.num_requests, states.num_layers * states.num_heads, batch.max_budget)
    if keep.shape != expected or keep.dtype != torch.int32 or keep.device != states.device:
        raise ValueError(
            f"keep: expected int32 {list(expected)} on {states.device}, got {keep.dtype} "
            f"{list(keep.shape)} on {keep.device}"
        )
