"""Host time of a scheduler step: vLLM's scheduler against ours, side by side, no model, no worker.

Both are the real classes on pools of their own, fed with made-up outputs, and take turns; time is
that of the thread on its CPU, so that other processes of a busy machine hardly count. One step
admits all requests. First they are far from due: the price of watching. Then each side runs through
several compactions: the price of booking them. The run fails unless every compaction that is due
was booked, so that a scheduler that does nothing cannot win. Prints a card, a table, and as its
last line JSON.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from random import Random
from statistics import mean, median
from typing import Any

# Read when vLLM is imported; standard output is for the answer.
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"

import measure
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from rkv_vllm.bench.workload import num_compactions
from rkv_vllm.options import CONFIG_KEY, ServerOptions
from rkv_vllm.policy import Terms
from rkv_vllm.scheduling.directive import STEP_PLAN_ATTRIBUTE
from rkv_vllm.scheduling.scheduler import make_scheduler
from rkv_vllm.scheduling.spec import CompressedAttentionSpec

BLOCK_SIZE = 16
SHAPE = {"block_size": BLOCK_SIZE, "num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}
MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 256,
    "max_position_embeddings": 1 << 17,
}


class SteppedScheduler:
    """One scheduler with its requests, stepped by hand.

    Attributes:
        admission_us: of the first step, which admits all requests.
        microseconds: of each timed step, (schedule, update_from_output).
        booked: compactions so far.
    """

    def __init__(
        self, vllm_config: VllmConfig, prompts: list[list[int]], max_tokens: int, in_flight: int
    ) -> None:
        is_ours = CONFIG_KEY in vllm_config.additional_config
        stock = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
        spec = CompressedAttentionSpec(**SHAPE) if is_ours else FullAttentionSpec(**SHAPE)
        kv_cache_config = KVCacheConfig(
            num_blocks=vllm_config.cache_config.num_gpu_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        )
        self._scheduler = (make_scheduler if is_ours else stock)(
            vllm_config=vllm_config,
            kv_cache_config=kv_cache_config,
            structured_output_manager=StructuredOutputManager(vllm_config),
            block_size=BLOCK_SIZE,
            log_stats=True,
        )
        self._in_flight = in_flight
        self._queue: deque = deque()
        # A request that repeats itself is looked at no more.
        self._random = Random(0)
        self.microseconds: list[tuple[float, float]] = []
        self.booked = 0
        hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0)
        params.update_from_generation_config({}, 0)
        for i, prompt in enumerate(prompts):
            self._scheduler.add_request(Request(f"r{i}", prompt, params, None, block_hasher=hasher))
        # Prefill all of them.
        self.step()
        assert len(self._scheduler.running) == len(prompts), "not all requests run at once"
        self.admission_us = self.microseconds[0][0]
        self.microseconds.clear()

    def step(self) -> None:
        """Schedule a step; take the outputs of the one that is `in_flight - 1` older."""
        started = time.thread_time()
        output = self._scheduler.schedule()
        scheduled = time.thread_time()
        if plan := getattr(output, STEP_PLAN_ATTRIBUTE, None):
            self.booked += len(plan.directives)
        self._queue.append(output)
        updating = 0.0
        if len(self._queue) == self._in_flight:
            done = self._queue.popleft()
            ids = list(done.num_scheduled_tokens)
            sampled = [[self._random.randrange(256)]] * len(ids)
            result = ModelRunnerOutput(ids, {r: i for i, r in enumerate(ids)}, sampled)
            updated = time.thread_time()
            self._scheduler.update_from_output(done, result)
            updating = time.thread_time() - updated
        self.microseconds.append((1e6 * (scheduled - started), 1e6 * updating))


def engine_config(
    folder: Path, args: argparse.Namespace, num_requests: int, compression: dict[str, Any]
) -> VllmConfig:
    """The config that both schedulers read; `compression` is empty for the stock one."""
    (folder / "config.json").write_text(json.dumps(MODEL_CONFIG))
    longest = args.prompt_len + args.buffer + args.steps + 2
    config = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        max_model_len=2 * longest,
        max_num_batched_tokens=num_requests * longest,
        max_num_seqs=num_requests,
        enforce_eager=True,
        dtype="float32",
    ).create_engine_config()
    # The CPU platform switches it off; the scheduler classes do not mind.
    config.scheduler_config.async_scheduling = args.in_flight > 1
    # Twice what they can fill.
    config.cache_config.num_gpu_blocks = 2 * num_requests * (longest // BLOCK_SIZE + 2)
    if compression:
        config.additional_config[CONFIG_KEY] = ServerOptions(**compression).to_dict()
    return config


def compare(
    folder: Path, args: argparse.Namespace, num_requests: int, is_due: bool
) -> dict[str, Any]:
    """Times both schedulers in turns and checks the compactions that ours booked."""
    never = 1 << 16 if args.when == "always" else args.prompt_len
    budget, buffer = args.prompt_len if is_due else never, args.buffer
    # Spread over a buffer, so that every step of the due phase books its share of the compactions.
    lengths = [args.prompt_len + (i % args.buffer if is_due else 0) for i in range(num_requests)]
    prompts = [[i % 256, i // 256, *[1] * (length - 2)] for i, length in enumerate(lengths)]
    options = {"budget": budget, "buffer": buffer, "seats": num_requests, "when": args.when}
    sides = {
        name: SteppedScheduler(
            engine_config(folder, args, num_requests, compression),
            prompts,
            args.steps + 2,
            args.in_flight,
        )
        for name, compression in (("stock", {}), ("ours", options))
    }
    # As vLLM's engine does before it serves.
    gc.collect()
    gc.freeze()
    phase = "compacting" if is_due else "far from due" if args.when == "always" else "with room"
    label = f"{num_requests} requests, {phase}"
    for _ in track(range(args.steps // args.round), label, console=Console(stderr=True)):
        for side in sides.values():
            for _ in range(args.round):
                side.step()
    gc.unfreeze()
    num_steps = 1 + len(sides["ours"].microseconds)
    terms = Terms(budget, buffer)
    due = [num_compactions(length, num_steps, terms, args.in_flight) for length in lengths]
    if args.when == "pressure":
        due = [0] * num_requests
    found: dict[str, Any] = {"requests": num_requests, "phase": label.split(", ")[1]}
    for name, side in sides.items():
        # The first steps of a run have no outputs to take in.
        times = side.microseconds[args.in_flight :]
        totals = [sum(each) for each in times]
        schedule, update = (median(part) for part in zip(*times, strict=True))
        found[name] = {"schedule_us": schedule, "update_us": update, "step_us": median(totals)}
        found[name] |= {"step_mean_us": mean(totals), "compactions": side.booked}
        found[name]["admission_us"] = side.admission_us
    found["wanted_compactions"] = sum(due)
    problems = []
    if sides["ours"].booked != sum(due):
        problems.append(f"{label}: {sides['ours'].booked} compactions booked, wanted {sum(due)}")
    if is_due and not sum(due):
        problems.append(f"{label}: nothing was due; raise --steps")
    ratio = found["ours"]["step_us"] / found["stock"]["step_us"]
    return {**found, "ratio": None if problems else ratio, "problems": problems}


def main() -> None:
    """Run what the command line asks for; the exit code is 1 when a check fails."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: .venv/bin/python benchmarks/bench_scheduler.py --requests 256",
    )
    add = parser.add_argument
    add("--requests", type=int, nargs="+", default=[256, 1024], help="running (default: 256 1024)")
    add("--prompt-len", type=int, default=256, help="tokens; the budget when due (default: 256)")
    add("--buffer", type=int, default=128, help="tokens between compactions (default: 128)")
    add("--steps", type=int, default=320, help="of each scheduler and phase (default: 320)")
    add("--round", type=int, default=16, help="steps until the other's turn (default: 16)")
    add("--in-flight", type=int, choices=[1, 2], default=2, help="2: asynchronous (default)")
    add("--when", choices=["always", "pressure"], default="always", help="pressure: with room only")
    args = parser.parse_args()
    init_none_hash(sha256)
    card = measure.card(torch.device("cpu"))
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for num_requests in args.requests:
            for is_due in (False, True) if args.when == "always" else (False,):
                cases.append(compare(Path(folder), args, num_requests, is_due))
    problems = [problem for case in cases for problem in case["problems"]]
    print("  ".join(f"{name}: {value}" for name, value in card.items()))
    print_table(cases)
    print("\n".join(f"FAILED: {problem}" for problem in problems), end="\n" if problems else "")
    print(json.dumps({"card": card, "options": vars(args), "cases": cases, "failed": problems}))
    sys.exit(bool(problems))


def print_table(cases: list[dict[str, Any]]) -> None:
    """Median microseconds per step, stock -> ours; no ratio where a check failed."""
    table = Table(title="microseconds per step, stock -> ours (medians)", title_justify="left")
    headings = ("requests", "phase", "admit all", "schedule", "update", "step", "mean step")
    for heading in (*headings, "compactions"):
        table.add_column(heading, justify="left" if heading == "phase" else "right")
    table.add_column("ours / stock", justify="right")
    for case in cases:
        keys = ("admission_us", "schedule_us", "update_us", "step_us", "step_mean_us")
        pairs = [f"{case['stock'][key]:,.0f} -> {case['ours'][key]:,.0f}" for key in keys]
        booked = f"{case['ours']['compactions']} of {case['wanted_compactions']}"
        ratio = "-" if case["ratio"] is None else f"{case['ratio']:.2f}"
        table.add_row(str(case["requests"]), case["phase"], *pairs, booked, ratio)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
