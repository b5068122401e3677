"""KeyDiff: keep the keys that point elsewhere than most.

Source: KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference
(arXiv:2504.15364), section 3. The direction that all are compared with is that of the mean of the
keys; other versions take the mean of the unit keys, which differs where norms differ.
"""

import torch.nn.functional as F
from torch import Tensor

from rkv_vllm.kernels.batch import Eviction
from rkv_vllm.methods.base import DenseMethod


class KeyDiff(DenseMethod):
    """Keeps the keys with the least cosine to the mean of all judged ones, window included."""

    depends_on_prefix_only = True

    def score_dense(
        self,
        keys: Tensor,
        values: Tensor,
        queries: Tensor | None,
        layer: int,
        eviction: Eviction,
    ) -> Tensor:
        """Minus the cosine. See the base class."""
        keys = keys.float()
        return -F.cosine_similarity(keys, keys.mean(dim=1, keepdim=True), dim=-1)
