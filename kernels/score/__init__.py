"""score: how much each token of a paged cache is worth keeping (methods/rkv.py has the maths)."""

from torch import Tensor

from rkv_vllm.kernels.native import is_available
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.kernels.score.cpu import score_cpu
from rkv_vllm.kernels.score.naive import score_naive

__all__ = ["score"]


def score(
    keys: PagedStates, block_ids: Tensor, num_tokens: int, queries: Tensor, **method
) -> Tensor:
    """Score the tokens before the window with the fastest version for this cache.

    Args and result: see `score_naive`.
    """
    version = score_cpu if is_available(keys) else score_naive
    return version(keys, block_ids, num_tokens, queries, **method)
