"""One side, offline, once: the child process that `offline.py` starts.

`python -m rkv_vllm.bench.offline_side FOLDER` reads `job.json` there and writes `result.json`, and
`progress` while it works. The engine runs in this process, so that its scheduler can be counted.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rkv_vllm

if TYPE_CHECKING:
    from vllm import LLM

PROGRESS_SECONDS = 1.0


def main() -> None:
    """Do the job in the folder named on the command line."""
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    result = run(job, folder / "progress")
    (folder / "result.json").write_text(json.dumps(result))


def run(job: dict[str, Any], progress: Path) -> dict[str, Any]:
    """Start an engine, ask the probes one by one, then all prompts at once, and count.

    Args:
        job: `engine_flags`, `is_compressed`, `prompts`, `output_len`, `probes`, `probe_len`.
        progress: file that says which share of the output exists.
    """
    from vllm import SamplingParams

    started = time.monotonic()
    llm = make_engine(job["engine_flags"])
    start_seconds = time.monotonic() - started
    greedy = {"temperature": 0, "ignore_eos": True}
    params = SamplingParams(max_tokens=job["probe_len"], **greedy)
    probe = []
    for text in job["probes"]:
        (output,) = llm.generate(text, params, use_tqdm=False)
        probe.append(list(output.outputs[0].token_ids))
    num_tokens = len(job["prompts"]) * job["output_len"]
    counts = watch(llm, lambda done: _show(progress, done / num_tokens))
    params = SamplingParams(max_tokens=job["output_len"], **greedy)
    started = time.perf_counter()
    outputs = llm.generate(job["prompts"], params, use_tqdm=False)
    seconds = time.perf_counter() - started
    output_lens = [len(output.outputs[0].token_ids) for output in outputs]
    compression = rkv_vllm.stats(llm) if job["is_compressed"] else {}
    return {
        "start_seconds": start_seconds,
        "seconds": seconds,
        "tokens_per_s": sum(output_lens) / seconds,
        "prompt_lens": [len(output.prompt_token_ids) for output in outputs],
        "output_lens": output_lens,
        "running_mean": counts["running_sum"] / counts["steps"],
        "running_peak": counts["running_peak"],
        "preemptions": counts["preemptions"],
        "peak_blocks": counts["peak_blocks"],
        "engines": 1,
        "pool_blocks": _block_pool(llm).num_gpu_blocks - 1,
        "compactions": compression.get("compactions", 0),
        "deferred": compression.get("deferred", 0),
        "probe": probe,
    }


def make_engine(flags: list[str]) -> "LLM":
    """Returns the offline engine that flags of `vllm serve` describe."""
    from vllm import LLM
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
    return LLM.from_engine_args(engine_args)


def watch(llm: "LLM", show: Callable[[int], None]) -> dict[str, int]:
    """Count what the scheduler of this process does.

    Args:
        llm: the engine.
        show: takes the tokens scheduled so far, about once per second.

    Returns:
        The counts, kept up to date from now on.
    """
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pool = _block_pool(llm)
    counts = {"steps": 0, "running_sum": 0, "running_peak": 0, "peak_blocks": 0, "preemptions": 0}
    schedule, preempt = scheduler.schedule, scheduler._preempt_request
    shown_at = time.monotonic()

    def counting_schedule(*args: Any, **kwargs: Any) -> Any:
        nonlocal shown_at
        output = schedule(*args, **kwargs)
        running = len(output.num_scheduled_tokens)
        held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        counts["steps"] += running > 0
        counts["running_sum"] += running
        counts["running_peak"] = max(counts["running_peak"], running)
        counts["peak_blocks"] = max(counts["peak_blocks"], held)
        if time.monotonic() > shown_at + PROGRESS_SECONDS:
            shown_at = time.monotonic()
            show(counts["running_sum"])
        return output

    def counting_preempt(*args: Any, **kwargs: Any) -> Any:
        counts["preemptions"] += 1
        return preempt(*args, **kwargs)

    scheduler.schedule, scheduler._preempt_request = counting_schedule, counting_preempt
    return counts


def _block_pool(llm: "LLM") -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool


def _show(progress: Path, share: float) -> None:
    # Renamed into place: the reader never sees half a number.
    written = progress.with_suffix(".new")
    written.write_text(str(min(share, 1.0)))
    os.replace(written, progress)


if __name__ == "__main__":
    main()
