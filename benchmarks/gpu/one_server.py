"""Child of verify.py: serves one workload with one side, at one or several pool sizes in turn.

A smaller pool is had by taking blocks out of the engine's pool and keeping them: the scheduler sees
that many fewer free blocks, and while it runs asks for nothing else. That saves an engine start per
size; with `--fresh-engines` verify.py makes pools of those sizes instead, for comparison. The
engine runs in this process, on both sides, so that scheduler and compactor can be watched.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from one_engine import make_model
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

import rkv_vllm

WARM_UP_REQUESTS, WARM_UP_TOKENS = 8, 8


@dataclass(frozen=True)
class Workload:
    """Requests that arrive together; lengths in tokens.

    Attributes:
        model: folder.
        num_requests: how many.
        shared_len: tokens that all prompts begin with.
        own_len: tokens behind them, different in every prompt.
        output_len: forced output.
        budget: of the compressed side.
        buffer: of the compressed side.
        pools: tokens in the pool, largest first; 0 = all the memory that vLLM takes by default.
        engine: further arguments of `LLM`, the same on both sides.
    """

    model: str
    num_requests: int
    shared_len: int
    own_len: int
    output_len: int
    budget: int
    buffer: int
    pools: list[int]
    engine: dict[str, Any]

    def prompts(self) -> list[list[int]]:
        """Token ids, the same in every process."""
        generator = torch.Generator().manual_seed(7)

        def draw(length: int) -> list[int]:
            return torch.randint(10, 900, (length,), generator=generator).tolist()

        shared = draw(self.shared_len)
        return [[*shared, *draw(self.own_len)] for _ in range(self.num_requests)]


def main() -> None:
    """Serve at every pool size; the result grows with each, so that a crash loses only the rest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--side", choices=["stock", "rkv"], required=True)
    parser.add_argument("--workload", required=True, help="JSON")
    parser.add_argument("--make-model", action="store_true", help="a random one, when missing")
    args = parser.parse_args()
    workload = Workload(**json.loads(args.workload))
    if args.make_model:
        make_model(Path(workload.model))
    started = time.monotonic()
    llm = start(workload, args.side)
    print(f"engine started in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    watch = Watch(llm, args.side)
    warm_up(llm, workload)
    runs = []
    for pool in workload.pools:
        runs.append(serve(llm, workload, pool, watch))
        args.result.write_text(
            json.dumps(
                {"side": args.side, "package": rkv_vllm.__file__, "runs": runs, **asdict(workload)}
            )
        )
        print(json.dumps(runs[-1]), file=sys.stderr, flush=True)


def start(workload: Workload, side: str) -> LLM:
    """The engine of one side."""
    compressed = rkv_vllm.engine_args(budget=workload.budget, buffer=workload.buffer)
    return LLM(
        workload.model,
        load_format="dummy",
        skip_tokenizer_init=True,
        seed=0,
        **workload.engine,
        **(compressed if side == "rkv" else {}),
    )


def warm_up(llm: LLM, workload: Workload) -> None:
    """A few requests, one of them long enough to be compacted."""
    prompts = workload.prompts()[:WARM_UP_REQUESTS]
    until_compacted = workload.buffer + max(0, workload.budget - len(prompts[0])) + WARM_UP_TOKENS
    lengths = [min(until_compacted, workload.output_len), *[WARM_UP_TOKENS] * (len(prompts) - 1)]
    run(llm, prompts, lengths)


def empty_prefix_cache(llm: LLM) -> None:
    """Forget earlier prompts; with asynchronous scheduling a last step may still hold blocks."""
    for _ in range(5):
        if llm.reset_prefix_cache():
            return
        llm.llm_engine.step()
    raise RuntimeError("the prefix cache cannot be emptied: an earlier run left blocks behind")


def serve(llm: LLM, workload: Workload, pool_tokens: int, watch: "Watch") -> dict[str, Any]:
    """Serve the workload once.

    Returns:
        Numbers; times in milliseconds.
    """
    block_pool = watch.scheduler.kv_cache_manager.block_pool
    block_size = llm.llm_engine.vllm_config.cache_config.block_size
    usable = block_pool.num_gpu_blocks - 1
    wanted = min(pool_tokens // block_size, usable) if pool_tokens else usable
    empty_prefix_cache(llm)
    held = block_pool.get_new_blocks(usable - wanted)
    watch.reset()
    before = watch.compaction_counts()
    started = time.perf_counter()
    arrivals = run(llm, workload.prompts(), [workload.output_len] * workload.num_requests)
    seconds = time.perf_counter() - started
    after = watch.compaction_counts()
    block_pool.free_blocks(held)
    gaps = 1e3 * np.concatenate([np.diff(times) for times in arrivals.values()])
    num_tokens = sum(map(len, arrivals.values()))
    return {
        "pool_tokens": wanted * block_size,
        "seconds": seconds,
        "output_tokens": num_tokens,
        "tokens_per_s": num_tokens / seconds,
        "lost_requests": sum(len(times) != workload.output_len for times in arrivals.values()),
        "itl_p50_ms": float(np.percentile(gaps, 50)),
        "itl_p99_ms": float(np.percentile(gaps, 99)),
        **watch.counts(),
        **{name: after[name] - before[name] for name in before},
        **watch.flush_times(seconds),
    }


def run(llm: LLM, prompts: list[list[int]], lengths: list[int]) -> dict[str, list[float]]:
    """Serve prompts to their end.

    Returns:
        Request id -> arrival time of every token, in seconds.
    """
    engine = llm.llm_engine
    arrivals: dict[str, list[float]] = {}
    for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        params = SamplingParams(
            temperature=0,
            max_tokens=length,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        arrivals[str(number)] = []
        engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            arrivals[output.request_id].extend([now] * len(output.outputs[0].token_ids))
    return arrivals


class Watch:
    """Counts what the scheduler does and times what the compactor does, in this process."""

    def __init__(self, llm: LLM, side: str) -> None:
        self._llm = llm
        self._side = side
        self.scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self.reset()
        self._wrap(self.scheduler, "schedule", self._count_step)
        self._wrap(self.scheduler, "_preempt_request", self._count_preemption)
        if side == "rkv":
            self._time_flushes()

    def reset(self) -> None:
        """Forget everything so far."""
        self._steps = self._running = self._peak = self._preemptions = 0
        self._host_seconds = 0.0
        self._events: list[tuple[torch.Event, torch.Event]] = []

    def counts(self) -> dict[str, float]:
        """Running requests and preemptions since the reset."""
        return {
            "steps": self._steps,
            "mean_running": self._running / max(self._steps, 1),
            "peak_running": self._peak,
            "preemptions": self._preemptions,
        }

    def compaction_counts(self) -> dict[str, int]:
        """Counters since the engine's start."""
        names = ("compactions", "evicted_tokens", "deferred")
        stats = rkv_vllm.stats(self._llm) if self._side == "rkv" else dict.fromkeys(names, 0)
        return {name: stats[name] for name in names}

    def flush_times(self, seconds: float) -> dict[str, float | None]:
        """What flushes took on the host and on the device, and their share of the run."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            device_ms = sum(start.elapsed_time(end) for start, end in self._events)
        else:
            device_ms = 1e3 * self._host_seconds
        return {
            "flush_host_ms": 1e3 * self._host_seconds,
            "flush_device_ms": device_ms,
            "flush_share": device_ms / 1e3 / seconds,
        }

    def _count_step(self) -> None:
        running = len(self.scheduler.running)
        self._steps += running > 0
        self._running += running
        self._peak = max(self._peak, running)

    def _count_preemption(self) -> None:
        self._preemptions += 1

    @staticmethod
    def _wrap(owner: Any, name: str, then: Callable[[], None]) -> None:
        inner = getattr(owner, name)

        def counted(*args, **kwargs):
            result = inner(*args, **kwargs)
            then()
            return result

        setattr(owner, name, counted)

    def _time_flushes(self) -> None:
        from rkv_vllm.worker.flush import Compactor

        inner = Compactor.flush
        on_device = torch.cuda.is_available()

        def timed(compactor):
            started = time.perf_counter()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_device else []
            if events:
                events[0].record()
            done = inner(compactor)
            if done:
                if events:
                    events[1].record()
                    self._events.append(tuple(events))
                self._host_seconds += time.perf_counter() - started
            return done

        Compactor.flush = timed


if __name__ == "__main__":
    main()
