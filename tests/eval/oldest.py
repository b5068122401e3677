"""A broken method for the tests: it keeps the oldest tokens and forgets what was just said."""

from torch import Tensor, arange

from rkv_vllm.kernels.batch import Eviction
from rkv_vllm.methods import DenseMethod


class Oldest(DenseMethod):
    """Scores fall with the position."""

    def score_dense(
        self,
        keys: Tensor,
        values: Tensor,
        queries: Tensor | None,
        layer: int,
        eviction: Eviction,
    ) -> Tensor:
        """The older, the better. See the base class."""
        num_heads, num_tokens, _ = keys.shape
        return -arange(num_tokens).expand(num_heads, -1).float()
