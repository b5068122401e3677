"""Key norm: keep the shortest keys, which tend to get the most attention.

Source: A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression (arXiv:2406.11430),
section 3. A model that normalises its keys (Qwen3) gives all keys of a head nearly one norm, and
nothing is left to choose by.
"""

import torch
from torch import Tensor

from rkv_vllm.kernels.batch import Eviction
from rkv_vllm.methods.base import DenseMethod


class KNorm(DenseMethod):
    """Keeps the keys of the smallest norm."""

    depends_on_prefix_only = True

    def score_dense(
        self,
        keys: Tensor,
        values: Tensor,
        queries: Tensor | None,
        layer: int,
        eviction: Eviction,
    ) -> Tensor:
        """Minus the norm. See the base class."""
        return -torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32)
