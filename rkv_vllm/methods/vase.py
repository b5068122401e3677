"""VaSE: keep the values that stand out, draw the others in proportion to their attention.

Source: VaSE (arXiv:2606.03928). Of K places behind the window, the `share` goes to the tokens whose
value has the widest range over its channels. The rest is drawn without replacement: with e_i drawn
from an exponential distribution, the largest attention_i / e_i are such a draw, the first with
probability in proportion to attention_i, and so on (Efraimidis, Spirakis, Weighted Random Sampling
with a Reservoir, 2006; its logarithm is the Gumbel top-k trick). Meant for `--kv-window 64`.
Next: kernels/vase/naive.py for attention and widths.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.ops import Ops
from rkv_vllm.methods.base import Heads, Method, ModelFacts, Need
from rkv_vllm.methods.draws import Draws
from rkv_vllm.option_field import option

# Weight of what is not drawn but kept: divided by any number drawn it is finite, and above all.
_ALWAYS = 1e30


class VaSE(Method):
    """Keeps sinks, the widest values, and tokens drawn by attention."""

    @dataclass(frozen=True)
    class Options:
        """What users can set."""

        sinks: int = option(
            4,
            "First tokens of the text that always stay, of the places for wide values; those that "
            "are protected count.",
            wanted="a whole number of tokens, at least 0",
            accepts=lambda tokens: tokens >= 0,
            per_request=True,
        )
        share: float = option(
            0.25,
            "Share of the budget behind the window that goes to the tokens with the widest values; "
            "the rest is drawn.",
            wanted="a number from 0 to 1",
            accepts=lambda share: 0 <= share <= 1,
            per_request=True,
        )
        pool: int = option(
            5,
            "Width of the average-pooling over attention, in tokens; odd, 1 switches it off.",
            wanted="an odd number of tokens from 1 to 63",
            accepts=lambda tokens: 1 <= tokens <= 63 and tokens % 2 == 1,
        )

    @classmethod
    def need(cls, options: Options) -> Need:
        """Attention is what the window's queries look at."""
        return Need(queries=True)

    def __init__(self, options: Options, model: ModelFacts, ops: Ops) -> None:
        super().__init__(options, model, ops)
        self._draws = Draws(model)

    def score(self, heads: Heads, batch: EvictionBatch) -> Tensor:
        """Draw by attention, and keep what is not drawn. See the base class."""
        scale, soft_cap = self.model.scale[heads.layers], self.model.soft_cap[heads.layers]
        weights = self.ops.attention(
            heads.keys, batch, heads.queries, scale, soft_cap, pool=self.options.pool
        )
        width = self.ops.channel_range(heads.values, batch)
        # An infinite value shows as NaN in its head's weights.
        weights += 0.0 * width
        weights += self._kept(width, batch)
        return weights.div_(self._draws.uniform(heads, batch).log_().neg_())

    def _kept(self, width: Tensor, batch: EvictionBatch) -> Tensor:
        """Of `width [R, heads, m]` a weight for each head's widest, the sinks first; else 0."""
        place = torch.arange(width.shape[2], device=width.device)
        num_sinks = (self.options.sinks - batch.prefix_lens).clamp(min=0)
        places = batch.budgets - batch.window
        num_widest = (self.options.share * places.double()).int().maximum(num_sinks)
        is_sink = place < num_sinks.unsqueeze(1)
        # Stable: of equal widths the lower index stays. They are common in half precision.
        order = width.masked_fill_(is_sink.unsqueeze(1), torch.inf).argsort(
            dim=2, descending=True, stable=True
        )
        weight = torch.where(place < num_widest.unsqueeze(1), _ALWAYS, 0.0)
        return torch.zeros_like(width).scatter_(2, order, weight.unsqueeze(1).expand_as(width))
