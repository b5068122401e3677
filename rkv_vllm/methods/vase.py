"""VaSE: keep the values that stand out, draw the others in proportion to their attention.

Source: VaSE (arXiv:2606.03928). Of K places behind the window, the `share` goes to the tokens whose
value has the widest range over its channels. The rest is drawn without replacement: with e_i drawn
from an exponential distribution, the largest attention_i / e_i are such a draw, the first with
probability in proportion to attention_i, and so on (Efraimidis, Spirakis, Weighted Random Sampling
with a Reservoir, 2006; its logarithm is the Gumbel top-k trick). Meant for `--kv-window 64`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rkv_vllm.kernels.batch import Eviction, EvictionBatch
from rkv_vllm.kernels.ops import Ops
from rkv_vllm.methods.base import DenseMethod, Heads, ModelFacts, Need
from rkv_vllm.methods.draws import Draws
from rkv_vllm.option_field import option

# Weight of what is not drawn but kept: divided by any number drawn it is finite, and above all.
_ALWAYS = 1e30
# Float32 elements of the logits at once: a long prompt costs time, not memory.
_MAX_LOGITS = 1 << 22


class VaSE(DenseMethod):
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
        self._soft_caps = model.soft_cap.tolist()

    def score(self, heads: Heads, batch: EvictionBatch) -> Tensor:
        """Draw by the weights of `score_dense`. See the base class."""
        exponential = self._draws.uniform(heads, batch).log_().neg_()
        return super().score(heads, batch).div_(exponential)

    def score_dense(
        self,
        keys: Tensor,
        values: Tensor,
        queries: Tensor | None,
        layer: int,
        eviction: Eviction,
    ) -> Tensor:
        """The attention of each candidate, or a weight that no attention reaches."""
        window = queries.shape[1]
        m, places = keys.shape[1] - window, eviction.budget - window
        values = values[:, :m]
        width = values.amax(dim=-1).float() - values.amin(dim=-1).float()
        num_sinks = min(max(self.options.sinks - eviction.prefix_len, 0), m)
        num_widest = max(int(self.options.share * places), num_sinks)
        # An infinite value shows as NaN in its head's weights.
        weights = self._attention(keys[:, :m], queries, layer) + 0.0 * width
        width[:, :num_sinks] = torch.inf
        # Stable: of equal widths the lower index stays. They are common in half precision.
        order = width.argsort(dim=1, descending=True, stable=True)
        kept = torch.zeros_like(weights).scatter_(1, order[:, :num_widest], _ALWAYS)
        return weights + kept

    def _attention(self, keys: Tensor, queries: Tensor, layer: int) -> Tensor:
        """What the window pays to keys [KV heads, m, head_size]: float32 [KV heads, m]."""
        num_heads, m, head_size = keys.shape
        rows = queries.reshape(num_heads, -1, head_size)
        step = max(1, _MAX_LOGITS // (rows.shape[1] * m))
        means = []
        for some_keys, some_rows in zip(keys.split(step), rows.split(step), strict=True):
            logits = some_rows.float() @ some_keys.float().transpose(1, 2) * self.model.scale[layer]
            if cap := self._soft_caps[layer]:
                logits = cap * (logits / cap).tanh()
            means.append(logits.softmax(dim=-1).mean(dim=1))
        mean = torch.cat(means)
        # The mean over the group and the pool may change places. What lies outside does not count.
        return F.avg_pool1d(
            mean.unsqueeze(1),
            self.options.pool,
            stride=1,
            padding=self.options.pool // 2,
            count_include_pad=False,
        ).squeeze(1)
