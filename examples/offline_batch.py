"""Answer a few prompts offline with a bounded KV cache, then print what compression did.

python examples/offline_batch.py --model .models/SmolLM2-135M-Instruct
"""

import argparse

from vllm import LLM, SamplingParams

import rkv_vllm

PROMPTS = ["The history of the bicycle begins", "A recipe for bread:", "Once upon a time"]


def main() -> None:
    """Generate for all prompts in one batch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub name of the model")
    parser.add_argument("--budget", type=int, default=128, help="tokens kept per request")
    parser.add_argument("--buffer", type=int, default=64, help="tokens between compactions")
    parser.add_argument("--max-tokens", type=int, default=300, help="longest answer in tokens")
    args = parser.parse_args()

    compression = rkv_vllm.engine_args(budget=args.budget, buffer=args.buffer)
    llm = LLM(args.model, enforce_eager=True, kv_cache_memory_bytes=2**28, **compression)
    sampling = SamplingParams(temperature=0, max_tokens=args.max_tokens, ignore_eos=True)
    for output in llm.generate(PROMPTS, sampling):
        print(f"{output.prompt!r} -> {output.outputs[0].text[:70]!r} ...")
    stats = rkv_vllm.stats(llm)
    print(f"{stats['compactions']} compactions evicted {stats['evicted_tokens']} tokens")


if __name__ == "__main__":
    main()
