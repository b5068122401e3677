"""Stock vLLM against KV cache compression: same prompts, same pool, separate processes in turn.

Two scenarios: `ample`, where memory never lacks and compression can only cost, and `starved`,
where it decides how many requests run at once. Every run is a fresh process, so that neither side
inherits the other's threads or caches; the sides take turns, so that a slow minute of a shared
machine hits both. Prints a card, a table and, on the last line, one JSON document; no ratio is
printed when a check fails. Prompts: prompts.py.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from prompts import chat_prompts

ROOT = Path(__file__).resolve().parent.parent
BLOCK_SIZE = 32


@dataclass(frozen=True)
class Scenario:
    """One workload; lengths in tokens.

    Attributes:
        num_requests: requests, all at once.
        output_len: forced output tokens per request.
        pool_tokens: tokens that the pool of blocks holds.
        budget: `--kv-budget` of the compressed side.
        buffer: `--kv-buffer` of the compressed side.
    """

    num_requests: int
    output_len: int
    pool_tokens: int
    budget: int = 256
    buffer: int = 128


SCENARIOS = {
    "ample": Scenario(num_requests=8, output_len=512, pool_tokens=16384),
    "starved": Scenario(num_requests=16, output_len=1024, pool_tokens=4608),
}


def main() -> None:
    """Run what the command line asks for; the exit code is 1 when a check fails."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: .venv/bin/python benchmarks/bench_serving.py --scenario starved",
    )
    parser.add_argument("--model", default=str(ROOT / ".models" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--scenario", choices=SCENARIOS, action="append", help="default: both")
    parser.add_argument("--repeats", type=int, default=3, help="runs per side (default: 3)")
    parser.add_argument("--child", choices=["stock", "rkv"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = args.scenario or list(SCENARIOS)
    if args.child:
        print(json.dumps(run_side(args.model, SCENARIOS[names[0]], args.child)))
        return
    print_card(args)
    results = [compare(args, name) for name in names]
    print(json.dumps({"card": card(args), "results": results}))
    sys.exit(any(result["failed_checks"] for result in results))


def run_side(model: str, scenario: Scenario, side: str) -> dict[str, float | int | list[int]]:
    """Serve the workload once in this process and count."""
    from transformers import AutoConfig
    from vllm import LLM, SamplingParams

    import rkv_vllm

    compressed = side == "rkv"
    options = (
        rkv_vllm.engine_args(budget=scenario.budget, buffer=scenario.buffer) if compressed else {}
    )
    config = AutoConfig.from_pretrained(model)
    head_size = config.hidden_size // config.num_attention_heads
    bytes_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size * 2
    llm = LLM(
        model,
        dtype="bfloat16",
        # Compiling takes longer than the workload here, and both sides would have to.
        enforce_eager=True,
        max_model_len=2048,
        max_num_seqs=scenario.num_requests,
        block_size=BLOCK_SIZE,
        kv_cache_memory_bytes=scenario.pool_tokens * bytes_per_token,
        disable_log_stats=True,
        **options,
    )
    params = SamplingParams(temperature=0, max_tokens=scenario.output_len, ignore_eos=True)
    llm.generate(chat_prompts(1), SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    counts = watch(llm)
    started = time.perf_counter()
    outputs = llm.generate(chat_prompts(scenario.num_requests), params, use_tqdm=False)
    seconds = time.perf_counter() - started
    lengths = [len(output.outputs[0].token_ids) for output in outputs]
    return {
        "seconds": seconds,
        "tokens_per_s": sum(lengths) / seconds,
        "output_lens": lengths,
        **counts,
        "mean_running": counts["running_sum"] / counts["steps"],
        "compactions": rkv_vllm.stats(llm)["compactions"] if compressed else 0,
        "deferred": rkv_vllm.stats(llm)["deferred"] if compressed else 0,
    }


def watch(llm) -> dict[str, int]:
    """Count what the scheduler of this process does; the dict is filled while it runs."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    counts = {"steps": 0, "running_sum": 0, "peak_running": 0, "peak_blocks": 0, "preemptions": 0}
    schedule, preempt = scheduler.schedule, scheduler._preempt_request

    def counting_schedule(*args, **kwargs):
        output = schedule(*args, **kwargs)
        running = len(output.num_scheduled_tokens)
        held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        counts["steps"] += running > 0
        counts["running_sum"] += running
        counts["peak_running"] = max(counts["peak_running"], running)
        counts["peak_blocks"] = max(counts["peak_blocks"], held)
        return output

    def counting_preempt(*args, **kwargs):
        counts["preemptions"] += 1
        return preempt(*args, **kwargs)

    scheduler.schedule, scheduler._preempt_request = counting_schedule, counting_preempt
    return counts


def compare(args: argparse.Namespace, name: str) -> dict:
    """Run both sides in turn and print their table."""
    scenario = SCENARIOS[name]
    runs: dict[str, list[dict]] = {"stock": [], "rkv": []}
    for repeat in range(args.repeats):
        # The side that starts alternates as well.
        for side in ("stock", "rkv") if repeat % 2 == 0 else ("rkv", "stock"):
            print(f"{name}: run {repeat + 1}/{args.repeats}, {side} ...", file=sys.stderr)
            runs[side].append(spawn(args.model, name, side))
    failed = failed_checks(scenario, runs)
    ratios = [
        ours["tokens_per_s"] / stock["tokens_per_s"]
        for ours, stock in zip(runs["rkv"], runs["stock"], strict=True)
    ]
    print_table(name, scenario, runs, ratios, failed)
    return {
        "scenario": name,
        **asdict(scenario),
        "runs": runs,
        "failed_checks": failed,
        "ratios": None if failed else ratios,
    }


def spawn(model: str, scenario: str, side: str) -> dict:
    """One side in a fresh process; its last line of output is its result."""
    command = [sys.executable, __file__, "--model", model, "--scenario", scenario, "--child", side]
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        # vLLM would bind two threads to the first core of a small machine.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{side} failed with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def failed_checks(scenario: Scenario, runs: dict[str, list[dict]]) -> list[str]:
    """Names of the checks that forbid a ratio."""
    failed = []
    for side, results in runs.items():
        for result in results:
            if result["output_lens"] != [scenario.output_len] * scenario.num_requests:
                failed.append(f"{side}: requests lost or cut short")
            if (result["compactions"] > 0) != (side == "rkv"):
                failed.append(f"{side}: {result['compactions']} compactions")
    return failed


def print_table(
    name: str, scenario: Scenario, runs: dict, ratios: list[float], failed: list[str]
) -> None:
    """Medians of both sides, then the ratio of each pair of runs."""
    blocks = scenario.pool_tokens // BLOCK_SIZE - 1
    print(
        f"\n{name}: {scenario.num_requests} requests x {scenario.output_len} output tokens, pool "
        f"{scenario.pool_tokens} tokens, budget {scenario.budget}, buffer {scenario.buffer}"
    )
    columns = ("tokens_per_s", "peak_running", "mean_running", "preemptions", "peak_blocks")
    print(f"{'':8}" + "".join(f"{column:>14}" for column in (*columns, "compactions")))
    for side, results in runs.items():
        medians = [
            statistics.median(run[column] for run in results)
            for column in (*columns, "compactions")
        ]
        print(f"{side:8}" + "".join(f"{value:14.1f}" for value in medians))
    print(f"blocks in the pool: {blocks}")
    if failed:
        print("no ratio: " + "; ".join(sorted(set(failed))))
        return
    pairs = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"rkv / stock, tokens/s: median {statistics.median(ratios):.2f} (pairs: {pairs})")


def card(args: argparse.Namespace) -> dict[str, str | int]:
    """What the numbers depend on."""
    from importlib.metadata import version

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "vllm": version("vllm"),
        "torch": version("torch"),
        "rkv_vllm": version("rkv-vllm"),
        "commit": commit,
        "model": Path(args.model).name,
        "repeats": args.repeats,
    }


def print_card(args: argparse.Namespace) -> None:
    """The card, one line per entry."""
    for key, value in card(args).items():
        print(f"{key:9} {value}")


if __name__ == "__main__":
    main()
