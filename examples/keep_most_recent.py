"""A compression method of one's own in one file: keep the first few tokens and the newest.

python examples/keep_most_recent.py .models/SmolLM2-135M-Instruct
PYTHONPATH=examples vllm serve MODEL --kv-compression keep_most_recent.KeepMostRecent
"""

import sys
from dataclasses import dataclass

import torch

import rkv_vllm
from rkv_vllm.methods import DenseMethod, option


class KeepMostRecent(DenseMethod):
    """The choice of StreamingLLM (arXiv:2309.17453), but every token keeps its position."""

    @dataclass(frozen=True)
    class Options:
        """What users can set: --kv-option num_first=8."""

        num_first: int = option(4, "First tokens that always stay.", per_request=True)

    def score_dense(self, keys, values, queries, layer, eviction):
        """Later is better, and the first are the best."""
        scores = torch.arange(float(keys.shape[1]), device=keys.device)
        scores[: self.options.num_first] += len(scores)
        return scores.expand(len(keys), -1)


if __name__ == "__main__":
    from vllm import LLM, SamplingParams  # not at the top: workers import this file, too

    method = rkv_vllm.engine_args("keep_most_recent.KeepMostRecent", budget=128, buffer=64)
    llm = LLM(sys.argv[1], enforce_eager=True, kv_cache_memory_bytes=2**28, **method)
    sampling = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
    print(llm.generate("Once upon a time", sampling)[0].outputs[0].text)
    print("{compactions} compactions evicted {evicted_tokens} tokens".format(**rkv_vllm.stats(llm)))
