"""A compression method of one's own in one file: keep the first few tokens and the newest.

python examples/keep_most_recent.py .models/SmolLM2-135M-Instruct
PYTHONPATH=examples vllm serve MODEL --kv-compression keep_most_recent.KeepMostRecent
"""

import sys

import torch

import rkv_vllm
from rkv_vllm.methods import CompressionMethod


class KeepMostRecent(CompressionMethod):
    """The choice of StreamingLLM (arXiv:2309.17453), but every token keeps its position."""

    @classmethod
    def from_config(cls, config: rkv_vllm.KVCompressionConfig) -> "KeepMostRecent":
        """There is nothing to set."""
        return cls()

    def keep_indices(self, keys, values, queries, budget: int) -> torch.LongTensor:
        """Return [heads, budget] of keys [heads, n, head_size]; the window must be among them."""
        num_first = min(4, budget - queries.shape[1])
        kept = torch.arange(budget, device=keys.device)
        kept[num_first:] += keys.shape[1] - budget
        return kept.expand(keys.shape[0], budget)


if __name__ == "__main__":
    from vllm import LLM, SamplingParams  # not at the top: workers import this file, too

    method = rkv_vllm.engine_args("keep_most_recent.KeepMostRecent", budget=128, buffer=64)
    llm = LLM(sys.argv[1], enforce_eager=True, kv_cache_memory_bytes=2**28, **method)
    sampling = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
    print(llm.generate("Once upon a time", sampling)[0].outputs[0].text)
    stats = rkv_vllm.stats(llm)
    print(f"{stats['compactions']} compactions evicted {stats['evicted_tokens']} tokens")
