"""One offline run: a child process with an engine inside, whose scheduler is counted step by step.

`run_offline` is the outside. The inside, `python -m rkv_vllm.bench.offline FOLDER`, reads
`job.json` there, writes `result.json`, and `progress` while it works. Next: counts.py.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rkv_vllm
from rkv_vllm.bench.counts import SchedulerCounts
from rkv_vllm.bench.latencies import latencies_of
from rkv_vllm.bench.processes import ChildError, child_environment, process_group
from rkv_vllm.bench.prompts import PROBES
from rkv_vllm.bench.sides import Side
from rkv_vllm.bench.workload import Workload

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

POLL_SECONDS = 0.2

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
            f"--model={workload.model}",
            *workload.engine_flags(side.pool_tokens),
            *engine_flags,
            *side.flags,
        ],
        "is_compressed": side.budget is not None,
        "probes": PROBES,
        "probe_len": workload.probe_len,
        "loads": [
            {
                "prompts": workload.prompts,
                "output_lens": workload.output_lens,
                "priorities": workload.priorities,
            }
        ],
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
            each with `prompts` (texts or token ids), `output_lens` and `priorities` (of each, or
            empty), and with `pool_blocks` where it is to run in a smaller pool than the engine's.
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
        num_tokens = sum(load["output_lens"])
        params = [SamplingParams(max_tokens=length, **greedy) for length in load["output_lens"]]
        # vLLM refuses priorities, also equal ones, without its policy of that name.
        more = {"priority": load["priorities"]} if load["priorities"] else {}
        before = rkv_vllm.stats(llm) if job["is_compressed"] else {}
        with counts.of_load(load.get("pool_blocks"), lambda done, all=num_tokens: show(done / all)):
            started = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False, **more)
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
            **latencies_of(counts.times, load["priorities"]),
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
