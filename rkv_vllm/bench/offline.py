"""One offline run: a child process with an engine inside, whose scheduler is counted step by step.

`run_offline` is the outside. The inside, `python -m rkv_vllm.bench.offline FOLDER`, reads
`job.json` there, writes `result.json`, and `progress` while it works. Next: checks.py.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rkv_vllm
from rkv_vllm.bench.processes import ChildError, child_environment, process_group
from rkv_vllm.bench.prompts import PROBES
from rkv_vllm.bench.sides import Side
from rkv_vllm.bench.workload import Workload

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

POLL_SECONDS = 0.2
PROGRESS_SECONDS = 1.0

# What a run does now, and which share of its output exists.
Show = Callable[[str, float], None]


def run_offline(
    workload: Workload, side: Side, engine_flags: Sequence[str], folder: Path, show: Show
) -> dict[str, Any]:
    """Generate for all prompts at once in a fresh process.

    Args:
        workload: what is asked.
        side: who is asked.
        engine_flags: further flags of every side.
        folder: empty; takes the child's files.
        show: told how far it is.

    Returns:
        What `run_job` counted.

    Raises:
        ChildError: the process ended without a result.
    """
    job = {
        "engine_flags": [
            *(f"--model={workload.model}", *workload.engine_flags(), *engine_flags, *side.flags)
        ],
        "is_compressed": side.budget is not None,
        "probes": PROBES,
        "probe_len": workload.probe_len,
        "loads": [{"prompts": workload.prompts, "output_len": workload.output_len}],
    }
    (folder / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "rkv_vllm.bench.offline", str(folder)]
    # The scheduler can only be counted in the child itself.
    environment = child_environment(VLLM_ENABLE_V1_MULTIPROCESSING="0")
    log = folder / "offline.log"
    with process_group(command, log, environment) as process:
        while process.poll() is None:
            if (folder / "progress").exists():
                show("generating", float((folder / "progress").read_text()))
            time.sleep(POLL_SECONDS)
    if process.returncode != 0:
        code = process.returncode
        raise ChildError(f"{side.name}, offline: the process ended with exit code {code}", log)
    return json.loads((folder / "result.json").read_text())


def run_job(job: dict[str, Any], show: Callable[[float], None]) -> Iterator[dict[str, Any]]:
    """Start an engine, ask the probes one by one, then the prompts of each load at once, and count.

    Args:
        job: `engine_flags` as for `vllm serve`, `is_compressed`, `probes`, `probe_len`, `loads`:
            each with `prompts` (texts or token ids), `output_len`, and with `pool_blocks` where it
            is to run in a smaller pool than the engine's.
        show: told which share of a load's output exists, about once per second.

    Yields:
        The numbers of each load.
    """
    from vllm import SamplingParams

    started = time.monotonic()
    llm = make_engine(job["engine_flags"])
    start_seconds = time.monotonic() - started
    # Without a tokenizer there is no text.
    greedy = {"temperature": 0, "ignore_eos": True}
    greedy["detokenize"] = not llm.llm_engine.vllm_config.model_config.skip_tokenizer_init
    params = SamplingParams(max_tokens=job["probe_len"], **greedy)
    probe = []
    for text in job["probes"]:
        (output,) = llm.generate(text, params, use_tqdm=False)
        probe.append(list(output.outputs[0].token_ids))
    counts = SchedulerCounts(llm)
    for load in job["loads"]:
        prompts = [
            text if isinstance(text, str) else {"prompt_token_ids": text}
            for text in load["prompts"]
        ]
        num_tokens = len(prompts) * load["output_len"]
        params = SamplingParams(max_tokens=load["output_len"], **greedy)
        before = rkv_vllm.stats(llm) if job["is_compressed"] else {}
        with counts.of_load(load.get("pool_blocks"), lambda done, all=num_tokens: show(done / all)):
            started = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - started
        after = rkv_vllm.stats(llm) if job["is_compressed"] else {}
        output_lens = [len(output.outputs[0].token_ids) for output in outputs]
        yield {
            "start_seconds": start_seconds,
            "seconds": seconds,
            "tokens_per_s": sum(output_lens) / seconds,
            "prompt_lens": [len(output.prompt_token_ids) for output in outputs],
            "output_lens": output_lens,
            **counts.numbers(),
            **{n: after.get(n, 0) - before.get(n, 0) for n in ("compactions", "deferred")},
            "probe": probe,
        }


def make_engine(flags: list[str]) -> "LLM":
    """Returns the offline engine that flags of `vllm serve` describe."""
    from vllm import LLM

    return LLM.from_engine_args(read_engine_args(flags))


def read_engine_args(flags: list[str]) -> "EngineArgs":
    """Returns the arguments of an offline engine that flags of `vllm serve` describe."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # Our own flags are a plugin's.
    load_general_plugins()
    # The usage would be longer than the part of the log that is shown.
    parser = FlexibleArgumentParser(prog="flags for vLLM", usage="-- ENGINE_FLAGS")
    EngineArgs.add_cli_args(parser)
    engine_args = EngineArgs.from_cli_args(parser.parse_args(flags))
    # As `LLM(...)` has it by default; the flags' default is that of a server.
    engine_args.disable_log_stats = True
    return engine_args


def forget_prompts(llm: "LLM") -> None:
    """Empty the prefix cache; with asynchronous scheduling a last step may hold blocks.

    Raises:
        RuntimeError: blocks are held although no request is left.
    """
    for _ in range(5):
        if llm.reset_prefix_cache():
            return
        llm.llm_engine.step()
    raise RuntimeError("the prefix cache cannot be emptied: an earlier load left blocks behind")


class SchedulerCounts:
    """Counts what the scheduler of an engine in this process does, one load at a time."""

    def __init__(self, llm: "LLM") -> None:
        self._llm = llm
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self._pool = scheduler.kv_cache_manager.block_pool
        self._schedule, self._preempt = scheduler.schedule, scheduler._preempt_request
        scheduler.schedule, scheduler._preempt_request = self._count_step, self._count_preemption

    @contextmanager
    def of_load(self, pool_blocks: int | None, show: Callable[[int], None]) -> Iterator[None]:
        """Count what happens in this block.

        Args:
            pool_blocks: the pool that the load gets; the others are taken out of the engine's for
                as long. None leaves it all.
            show: takes the tokens scheduled so far, about once per second.
        """
        self._steps = self._running = self._running_peak = self._preempted = self._held_peak = 0
        self._show, self._shown_at = show, time.monotonic()
        self._usable = self._pool.num_gpu_blocks - 1
        taken = []
        forget_prompts(self._llm)
        if pool_blocks is not None and pool_blocks < self._usable:
            taken = self._pool.get_new_blocks(self._usable - pool_blocks)
            self._usable = pool_blocks
        yield
        self._pool.free_blocks(taken)

    def numbers(self) -> dict[str, float]:
        """Of the last load."""
        return {
            "running_mean": self._running / max(self._steps, 1),
            "running_peak": self._running_peak,
            "preemptions": self._preempted,
            "peak_blocks": self._held_peak,
            "engines": 1,
            "pool_blocks": self._usable,
        }

    def _count_step(self, *args: Any, **kwargs: Any) -> Any:
        output = self._schedule(*args, **kwargs)
        running = len(output.num_scheduled_tokens)
        self._steps += running > 0
        self._running += running
        self._running_peak = max(self._running_peak, running)
        free = self._pool.get_num_free_blocks()
        self._held_peak = max(self._held_peak, self._usable - free)
        if time.monotonic() > self._shown_at + PROGRESS_SECONDS:
            self._shown_at = time.monotonic()
            self._show(self._running)
        return output

    def _count_preemption(self, *args: Any, **kwargs: Any) -> Any:
        self._preempted += 1
        return self._preempt(*args, **kwargs)


def main() -> None:
    """Do the job in the folder named on the command line."""
    folder = Path(sys.argv[1])

    def show(share: float) -> None:
        # Renamed into place: the reader never sees half a number.
        (folder / "progress.new").write_text(str(min(share, 1.0)))
        os.replace(folder / "progress.new", folder / "progress")

    (result,) = run_job(json.loads((folder / "job.json").read_text()), show)
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
