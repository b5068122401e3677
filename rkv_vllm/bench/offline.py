"""One offline run from outside: starts `offline_side.py`, waits for it, reads its result.

Next: checks.py.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rkv_vllm.bench.processes import ChildError, child_environment, process_group
from rkv_vllm.bench.prompts import PROBES
from rkv_vllm.bench.sides import Side
from rkv_vllm.bench.workload import Workload

POLL_SECONDS = 0.2

# What a run does now, and which share of its output exists.
Progress = Callable[[str, float], None]


def run_offline(
    workload: Workload, side: Side, engine_flags: Sequence[str], folder: Path, show: Progress
) -> dict[str, Any]:
    """Generate for all prompts at once in a fresh process.

    Args:
        workload: what is asked.
        side: who is asked.
        engine_flags: further flags of every side.
        folder: empty; takes the child's files.
        show: told how far it is.

    Returns:
        What `offline_side.run` counted.

    Raises:
        ChildError: the process ended without a result.
    """
    flags = [f"--model={workload.model}", *workload.engine_flags(), *engine_flags, *side.flags]
    job = {
        "engine_flags": flags,
        "is_compressed": side.budget is not None,
        "prompts": workload.prompts,
        "output_len": workload.output_len,
        "probes": PROBES,
        "probe_len": workload.probe_len,
    }
    (folder / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "rkv_vllm.bench.offline_side", str(folder)]
    # The scheduler can only be counted in the child itself.
    environment = child_environment(VLLM_ENABLE_V1_MULTIPROCESSING="0")
    log = folder / "offline.log"
    with process_group(command, log, environment) as process:
        while process.poll() is None:
            _show_progress(folder / "progress", show)
            time.sleep(POLL_SECONDS)
    if process.returncode != 0:
        raise ChildError(
            f"{side.name}, offline: the process ended with exit code {process.returncode}", log
        )
    return json.loads((folder / "result.json").read_text())


def _show_progress(file: Path, show: Progress) -> None:
    if file.exists():
        show("generating", float(file.read_text()))
    else:
        show("starting", 0.0)
