"""Recent: keep the first few tokens and the newest; the baseline that reads no cache.

Source: Efficient Streaming Language Models with Attention Sinks (StreamingLLM, arXiv:2309.17453),
section 3, but every token keeps its position.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.methods.base import Heads, Method
from rkv_vllm.option_field import option


class Recent(Method):
    """Keeps sinks, which are the first tokens of the text, and then the newest."""

    depends_on_prefix_only = True

    @dataclass(frozen=True)
    class Options:
        """What users can set."""

        sinks: int = option(
            4,
            "First tokens of the text that always stay; those that are protected count.",
            wanted="a whole number of tokens, at least 0",
            accepts=lambda tokens: tokens >= 0,
            per_request=True,
        )

    def score(self, heads: Heads, batch: EvictionBatch) -> Tensor:
        """Later is better, and the sinks are the best. See the base class."""
        m = batch.max_candidates
        place = torch.arange(m, device=batch.prefix_lens.device)
        # Sinks have survived every earlier compaction, so they are still the first.
        is_sink = place < self.options.sinks - batch.prefix_lens.unsqueeze(1)
        scores = torch.where(is_sink, float(m), place.float())
        return scores.unsqueeze(1).expand(-1, heads.keys.num_layers * heads.keys.num_heads, -1)
