"""compact: move the survivors of an eviction together."""

from torch import Tensor

from rkv_vllm.kernels.compact.cpu import compact_cpu
from rkv_vllm.kernels.compact.naive import compact_naive
from rkv_vllm.kernels.native import is_available
from rkv_vllm.kernels.paged import PagedStates

__all__ = ["compact"]


def compact(
    states: PagedStates,
    old_block_ids: Tensor,
    new_block_ids: Tensor,
    keep: Tensor,
    settled_len: int,
    total_len: int,
) -> None:
    """Compact with the fastest version for this cache; see `compact_naive`."""
    version = compact_cpu if is_available(states) else compact_naive
    version(states, old_block_ids, new_block_ids, keep, settled_len, total_len)
