"""select: the best scored tokens of every head, ascending, ties to the lower index."""

from torch import Tensor

from rkv_vllm.kernels.native import library
from rkv_vllm.kernels.select.cpu import select_cpu
from rkv_vllm.kernels.select.naive import select_naive

__all__ = ["select"]


def select(scores: Tensor, count: int) -> Tensor:
    """Select with the fastest version for these scores; see `select_naive`."""
    in_cpp = scores.device.type == "cpu" and library() is not None
    return (select_cpu if in_cpp else select_naive)(scores, count)
