"""compact: move the survivors of an eviction together."""

from torch import Tensor

from rkv_vllm.kernels.compact.cpu import compact_cpu
from rkv_vllm.kernels.compact.naive import compact_naive
from rkv_vllm.kernels.dispatch import backend
from rkv_vllm.kernels.eviction import EvictionBatch
from rkv_vllm.kernels.paged import PagedStates

__all__ = ["compact"]


def compact(states: PagedStates, batch: EvictionBatch, keep: Tensor) -> None:
    """Compact with the fastest version for this cache; see `compact_naive`."""
    chosen = backend(states)
    if chosen == "triton":
        # Imported where it serves: a CPU installation need not have Triton.
        from rkv_vllm.kernels.compact.triton import compact_triton

        compact_triton(states, batch, keep)
        return
    version = compact_cpu if chosen == "cpu" else compact_naive
    version(states, batch, keep)
