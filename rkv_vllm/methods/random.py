"""Random: keep tokens by lot, drawn anew at every compaction and in every head.

Source: Random Attention (arXiv:2609.03430): with `--kv-protect prompt --kv-window 64` this is that
method. As the draw is repeated, the older a token, the fewer heads still have it.
"""

from typing import Any

from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.ops import Ops
from rkv_vllm.methods.base import Heads, Method, ModelFacts
from rkv_vllm.methods.draws import Draws


class Random(Method):
    """Gives each candidate an equal chance."""

    def __init__(self, options: Any, model: ModelFacts, ops: Ops) -> None:
        super().__init__(options, model, ops)
        self._draws = Draws(model)

    def score(self, heads: Heads, batch: EvictionBatch) -> Tensor:
        """A number drawn for each token. See the base class."""
        return self._draws.uniform(heads, batch)
