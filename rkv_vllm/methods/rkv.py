"""R-KV: keep what the newest queries look at, drop keys that repeat others.

Source: R-KV: Redundancy-aware KV Cache Compression for Reasoning Models (arXiv:2505.24133),
section 3; docs/method.md explains the formulas. The defensive aggregation is that of Taming the
Fragility of KV Cache Eviction in LLM Inference (arXiv:2510.13334). Next: kernels/rkv/naive.py,
which computes them.
"""

import logging
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.ops import Ops
from rkv_vllm.methods.base import Heads, Method, ModelFacts, Need
from rkv_vllm.option_field import option

# Below vLLM's own name, because vLLM configures its loggers only; methods do not import it.
logger = logging.getLogger(f"vllm.{__name__}")

# Neighbours in real text have cosines around 0.8; above this few keys have a similar one.
_RARE_COSINE = 0.9


class RKV(Method):
    """Weighs the attention that a token gets against how much it repeats the others."""

    depends_on_prefix_only = True

    @dataclass(frozen=True)
    class Options:
        """What users can set."""

        lam: float = option(
            0.1,
            "Weight of importance against redundancy, no unit: 1 looks at attention only, 0 at "
            "similarity only.",
            flag="--kv-lambda",
            metavar="WEIGHT",
            wanted="a number from 0 to 1",
            accepts=lambda weight: 0 <= weight <= 1,
            per_request=True,
        )
        # Unrolled by the compiler, hence the bound.
        pool: int = option(
            7,
            "Width of the max-pooling over importance, in tokens; odd, 1 switches it off.",
            flag="--kv-pool",
            metavar="TOKENS",
            wanted="an odd number of tokens from 1 to 63",
            accepts=lambda tokens: 1 <= tokens <= 63 and tokens % 2 == 1,
        )
        threshold: float = option(
            0.5,
            "Cosine between two keys above which the tokens count as similar, no unit. Write a "
            "negative one with `=`.",
            flag="--kv-threshold",
            metavar="COSINE",
            wanted="a cosine from -1 to 1",
            accepts=lambda cosine: -1 <= cosine <= 1,
            per_request=True,
        )
        center: bool = option(
            False,
            "Whether cosines are those of the keys without their mean: what all keys of a head "
            "have in common then makes no two of them similar.",
            per_request=True,
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

    def __init__(self, options: Options, model: ModelFacts, ops: Ops) -> None:
        super().__init__(options, model, ops)
        if options.threshold > _RARE_COSINE:
            _warn_of_long_searches()

    def score(self, heads: Heads, batch: EvictionBatch) -> Tensor:
        """Weigh importance against redundancy. See the base class."""
        scale, soft_cap = self.model.scale[heads.layers], self.model.soft_cap[heads.layers]
        own = self.options
        return self.ops.rkv_scores(
            heads.keys,
            batch,
            heads.queries,
            scale,
            soft_cap,
            lam=own.lam,
            pool=own.pool,
            defensive=own.defensive,
            threshold=own.threshold,
            center=own.center,
        )


@cache
def _warn_of_long_searches() -> None:
    """Once: any request may bring a threshold of its own."""
    logger.warning(
        "A threshold above %g: hardly any key has another one this similar, so each search looks "
        "at nearly all pairs and a compaction's time grows with the square of its tokens; lower "
        "it for long prompts",
        _RARE_COSINE,
    )
