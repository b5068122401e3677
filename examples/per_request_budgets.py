"""Let every request choose how much of its KV cache is kept, then print what each one gave up.

python examples/per_request_budgets.py .models/SmolLM2-135M-Instruct

OpenAI clients send the same settings as extra_body={"vllm_xargs": {"kv_budget": 192}}.
"""

import sys

from vllm import LLM, SamplingParams

import rkv_vllm

PROMPTS = {
    "The history of the bicycle begins": None,  # what the engine was started with
    "A recipe for bread:": {"kv_budget": 192, "kv_buffer": 32},
    "Once upon a time": {"kv_compression": "off"},
}


def sampling(settings: dict | None) -> SamplingParams:
    """300 greedy tokens under these settings."""
    return SamplingParams(temperature=0, max_tokens=300, ignore_eos=True, extra_args=settings)


if __name__ == "__main__":
    compression = rkv_vllm.engine_args(budget=128, buffer=64)
    llm = LLM(sys.argv[1], enforce_eager=True, kv_cache_memory_bytes=2**28, **compression)
    outputs = llm.generate(list(PROMPTS), [sampling(settings) for settings in PROMPTS.values()])
    reports = llm.collective_rpc("kv_compression_requests")[0]
    by_id = {report["req_id"].split("-")[0]: report for report in reports}
    for output, settings in zip(outputs, PROMPTS.values(), strict=True):
        report = by_id[output.request_id]
        kept, evicted = report["physical_len"], report["evicted_tokens"]
        print(f"{settings}: {report['compactions']} compactions evicted {evicted}, kept {kept}")
    stats = rkv_vllm.stats(llm)
    print(f"{stats['compactions']} compactions evicted {stats['evicted_tokens']} tokens")
