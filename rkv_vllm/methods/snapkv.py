"""SnapKV: keep what the newest queries look at.

Source: SnapKV: LLM Knows What You are Looking for Before Generation (arXiv:2404.14469), section 4,
there for prompts; asked again at every compaction, as RPC (arXiv:2505.13866) does. It is R-KV's
importance without its redundancy, so of the query heads that share a KV head the largest logit
counts. `defensive` is DefensiveKV's aggregation (arXiv:2510.13334). Next: kernels/rkv/naive.py for
the formulas.
"""

from dataclasses import dataclass

from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.methods.base import Heads, Method, Need
from rkv_vllm.option_field import option


class SnapKV(Method):
    """Keeps the tokens that get the most attention of the window, and their neighbours."""

    depends_on_prefix_only = True

    @dataclass(frozen=True)
    class Options:
        """What users can set."""

        # Unrolled by the compiler, hence the bound.
        pool: int = option(
            7,
            "Width of the max-pooling over importance, in tokens; odd, 1 switches it off.",
            wanted="an odd number of tokens from 1 to 63",
            accepts=lambda tokens: 1 <= tokens <= 63 and tokens % 2 == 1,
        )
        defensive: bool = option(
            False,
            "Whether importance is the attention of the window's most attentive query, and at "
            "least the head's mean of that, instead of the mean over the window.",
            per_request=True,
        )

    @classmethod
    def need(cls, options: Options) -> Need:
        """Importance is what the window's queries look at."""
        return Need(queries=True)

    def score(self, heads: Heads, batch: EvictionBatch) -> Tensor:
        """The attention that a token gets. See the base class."""
        scale, soft_cap = self.model.scale[heads.layers], self.model.soft_cap[heads.layers]
        return self.ops.importance(
            heads.keys,
            batch,
            heads.queries,
            scale,
            soft_cap,
            pool=self.options.pool,
            defensive=self.options.defensive,
        )
