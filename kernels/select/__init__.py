"""select: the best scored tokens of every head, ascending, ties to the lower index."""

from importlib.util import find_spec

from torch import Tensor

from rkv_vllm.kernels.eviction import EvictionBatch
from rkv_vllm.kernels.native import library
from rkv_vllm.kernels.select.cpu import select_cpu
from rkv_vllm.kernels.select.naive import select_naive

__all__ = ["select"]


def select(scores: Tensor, batch: EvictionBatch) -> Tensor:
    """Select with the fastest version for these scores; see `select_naive`."""
    if scores.device.type == "cuda" and find_spec("triton") is not None:
        # Imported where it serves: a CPU installation need not have Triton.
        from rkv_vllm.kernels.select.triton import select_triton

        return select_triton(scores, batch)
    in_cpp = scores.device.type == "cpu" and library() is not None
    return (select_cpu if in_cpp else select_naive)(scores, batch)
