"""score: how much each token of a paged cache is worth keeping (methods/rkv.py has the maths)."""

from torch import Tensor

from rkv_vllm.kernels.dispatch import backend
from rkv_vllm.kernels.eviction import EvictionBatch
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.kernels.score.cpu import score_cpu
from rkv_vllm.kernels.score.naive import score_naive

__all__ = ["score"]


def score(
    keys: PagedStates, batch: EvictionBatch, observation_queries: Tensor, **method: float
) -> Tensor:
    """Score the tokens before the window with the fastest version for this cache.

    Args and result: see `score_naive`. On a GPU a NaN or infinite score raises nothing, it is
    noted in `batch.non_finite`.
    """
    chosen = backend(keys)
    if chosen == "triton":
        # Imported where it serves: a CPU installation need not have Triton.
        from rkv_vllm.kernels.score.triton import score_triton

        return score_triton(keys, batch, observation_queries, **method)
    version = score_cpu if chosen == "cpu" else score_naive
    return version(keys, batch, observation_queries, **method)
