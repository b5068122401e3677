"""Child of verify.py: what one engine with compaction says to a few prompts, token by token.

With `--mode reference` it is no engine but explicit eviction on transformers (tests/reference.py),
which is made to say what an engine said before, with eviction and without.
"""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

BUDGET, BUFFER = 64, 32
NUM_REQUESTS = 4
# Without torch.compile, whose fused operations round differently, but where graphs need it.
MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "full": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL"}},
    # Without compression: what this mode does to stock vLLM.
    "stock": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL"}},
    "unsynced": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL"}},
    "piecewise": {"compilation_config": {"mode": 3, "cudagraph_mode": "PIECEWISE"}},
    "default": {},
}


def main() -> None:
    """Run one engine, or the reference, and write its output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="made when missing")
    parser.add_argument("--mode", choices=[*MODES, "reference"], required=True)
    parser.add_argument("--backend", help="attention backend; vLLM's choice without it")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num-tokens", type=int, default=300)
    parser.add_argument("--forced", type=Path, help="an engine's result, for the reference")
    parser.add_argument("--without-graphs", action="store_true", help="on a CPU")
    args = parser.parse_args()
    make_model(args.model)
    run = run_reference if args.mode == "reference" else run_engine
    args.result.write_text(json.dumps(run(args)))


def make_model(model: Path) -> None:
    """Write the random model, whole or not at all: several children may want it at once."""
    from tests.models import random_model

    if model.exists():
        return
    scratch = model.with_name(f"{model.name}-{os.getpid()}")
    random_model(scratch, "qwen3", num_kv_heads=2, num_heads=6, head_dim=64)
    try:
        scratch.rename(model)
    except OSError:
        # Another child was faster.
        shutil.rmtree(scratch)


def prompts() -> list[list[int]]:
    """Prompts of different lengths that share 64 tokens."""
    from tests.models import random_prompt

    shared = random_prompt(64, seed=1)
    return [[*shared, *random_prompt(6 + 7 * i, seed=i)] for i in range(NUM_REQUESTS)]


def run_reference(args: argparse.Namespace) -> dict[str, Any]:
    """Log-probabilities of an engine's tokens, one request at a time."""
    import torch

    from rkv_vllm.options import ServerOptions
    from tests.reference import generate_reference

    engine = json.loads(args.forced.read_text())
    config = ServerOptions(budget=BUDGET, buffer=BUFFER)
    evicting, full = (
        [
            generate_reference(
                args.model,
                prompt,
                len(tokens),
                chosen,
                dtype=getattr(torch, args.dtype),
                forced_ids=tokens,
                unprocessed_steps=int(engine["async_scheduling"]),
            )
            for prompt, tokens in zip(prompts(), engine["token_ids"], strict=True)
        ]
        for chosen in (config, None)
    )
    return {
        "logprobs": [result.logprobs for result in evicting],
        "full_logprobs": [result.logprobs for result in full],
        "first_steps": [result.compactions[0].step for result in evicting],
        "compactions": sum(len(result.compactions) for result in evicting),
    }


def count_replays() -> list[None]:
    """A list that every replay of a captured graph makes longer by one."""
    import torch

    replays: list[None] = []
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph):
        replays.append(None)
        return replay(graph)

    torch.cuda.CUDAGraph.replay = counted
    return replays


def run_engine(args: argparse.Namespace) -> dict[str, Any]:
    """The served output."""
    from vllm import LLM, SamplingParams

    import rkv_vllm
    from tests.models import kv_cache_bytes

    replays = count_replays()
    is_stock = args.mode == "stock"
    options = {"enforce_eager": True} if args.without_graphs else MODES[args.mode]
    if args.backend:
        options = {**options, "attention_config": {"backend": args.backend}}
    llm = LLM(
        str(args.model),
        dtype=args.dtype,
        max_model_len=1024,
        max_num_seqs=8,
        kv_cache_memory_bytes=kv_cache_bytes(args.model, 8192),
        # Several of these share the device.
        gpu_memory_utilization=0.1,
        skip_tokenizer_init=True,
        seed=0,
        **options,
        **({} if is_stock else rkv_vllm.engine_args(budget=BUDGET, buffer=BUFFER)),
    )
    params = SamplingParams(
        temperature=0, max_tokens=args.num_tokens, ignore_eos=True, detokenize=False, logprobs=0
    )
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts()], params, use_tqdm=False)
    completions = [output.outputs[0] for output in outputs]
    config = llm.llm_engine.vllm_config
    return {
        "token_ids": [list(c.token_ids) for c in completions],
        "logprobs": [
            [step[token].logprob for step, token in zip(c.logprobs, c.token_ids, strict=True)]
            for c in completions
        ],
        "compactions": 0 if is_stock else rkv_vllm.stats(llm)["compactions"],
        "graph_replays": len(replays),
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        "package": rkv_vllm.__file__,
    }


if __name__ == "__main__":
    main()
