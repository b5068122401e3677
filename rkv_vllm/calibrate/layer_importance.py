"""How much each layer's attention changes what it is given: the profile behind layer budgets.

A head whose output for a token points where the token's own value points has hardly used its cache;
one that turns it away has. So a layer weighs

    1 - mean over tokens and query heads of cos(value of the token, output for the token)

Layers are ranked by that, cut into classes of equal size, and a class gets the mean of its layers
as its share.

Source: BaKlaVa: Budgeted Allocation of KV cache for Long-context Inference (arXiv:2502.13176),
which compares the input and the output of attention heads in a one-time profile. It then searches
for the mapping from importance to budget by perplexity; here a share is the importance itself.
Next: rkv_vllm/layer_budgets.py, which reads the file.
"""

import torch
from torch import Tensor

from rkv_vllm.layer_budgets import LayerClass, require_classes

# A layer that changes nothing still keeps something.
_LEAST_IMPORTANCE = 0.01


class LayerImportance:
    """Sums over tokens and heads, by layer; an observer of `forward.read`.

    Args:
        num_layers: of the model.
    """

    def __init__(self, num_layers: int) -> None:
        self._cosines = torch.zeros(num_layers, dtype=torch.float64)
        self._counts = torch.zeros(num_layers, dtype=torch.int64)

    def observe(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, output: Tensor
    ) -> None:
        """Compare values and outputs of a piece of text. See `AttentionObserver`."""
        own = value.repeat_interleave(output.shape[0] // value.shape[0], dim=0)
        cosines = torch.cosine_similarity(own.float(), output.float(), dim=-1)
        self._cosines[layer] += cosines.sum().item()
        self._counts[layer] += cosines.numel()

    def importance(self) -> list[float]:
        """Returns the weight of each layer, above 0 and at most 2."""
        return (1 - self._cosines / self._counts).clamp(min=_LEAST_IMPORTANCE).tolist()

    def classes(self) -> list[LayerClass]:
        """Returns classes of equally many layers, the most important first.

        Raises:
            OptionError: the layers cannot be shared out.
        """
        importance = self.importance()
        count = require_classes(len(importance))
        ranked = sorted(range(len(importance)), key=lambda layer: -importance[layer])
        size = len(importance) // count
        cut = [sorted(ranked[first : first + size]) for first in range(0, len(ranked), size)]
        return [
            LayerClass(tuple(layers), round(sum(importance[i] for i in layers) / size, 6))
            for layers in cut
        ]
