"""Reference for compact: per request read everything, gather per head, write."""

import torch
from torch import Tensor

from rkv_vllm.kernels.eviction import EvictionBatch
from rkv_vllm.kernels.paged import PagedStates


def compact_naive(states: PagedStates, batch: EvictionBatch, keep: Tensor) -> None:
    """Leave the kept tokens and the tail of every request, in order, in its new blocks.

    No request may write a block that another one of the batch reads.

    Args:
        states: keys or values, changed in place.
        batch: the requests.
        keep: int32 [R, num_layers * num_kv_heads, largest budget]; of request r the first
            `budget` of each row are ascending and below its settled_len.

    Raises:
        ValueError: the rows or `keep` do not fit the cache.
    """
    batch.check_rows(states)
    batch.check_keep(keep, states)
    for i, eviction in enumerate(batch.evictions):
        dense = states.read(batch.old_block_table[i], eviction.total_len)
        index = keep[i, :, : eviction.budget].long().view(*dense.shape[:2], -1, 1)
        survivors = dense.gather(2, index.expand(-1, -1, -1, states.head_size))
        num_new = -(-eviction.new_len // states.block_size)
        after = torch.cat([survivors, dense[:, :, eviction.settled_len :]], dim=2)
        states.write(batch.new_block_table[i, :num_new], after)
