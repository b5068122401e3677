"""All runs of one benchmark, one after the other, each in an empty folder of its own.

Next: offline.py and served.py.
"""

import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rkv_vllm.bench.checks import Result
from rkv_vllm.bench.offline import Progress, run_offline
from rkv_vllm.bench.processes import ChildError
from rkv_vllm.bench.progress import RunProgress
from rkv_vllm.bench.served import run_served
from rkv_vllm.bench.sides import Run
from rkv_vllm.bench.workload import Workload

RUNNERS = {"offline": run_offline, "served": run_served}
# In a run's folder; the process that was started last comes first.
_LOGS = ("client.log", "server.log", "offline.log")


def run_all(
    workload: Workload, schedule: Sequence[Run], engine_flags: Sequence[str], results: list[Result]
) -> None:
    """Carry the runs out.

    Args:
        workload: what is asked.
        schedule: the runs in their order.
        engine_flags: further flags of every side.
        results: takes the result of each run as soon as it is over, so that those of finished runs
            are there when a later one fails or is interrupted.

    Raises:
        ChildError: a run failed; none is tried after it.
    """
    with RunProgress(schedule) as progress:
        for run in schedule:
            progress.begin(run)
            numbers = _carry_out(workload, run, engine_flags, progress.show)
            names = {"mode": run.mode, "side": run.side.name, "budget": run.side.budget}
            results.append({**names, "repeat": run.repeat, **numbers})
            progress.end()


def _carry_out(
    workload: Workload, run: Run, engine_flags: Sequence[str], show: Progress
) -> dict[str, Any]:
    """One run; whatever goes wrong with it leaves the results of the runs before it."""
    folder = None
    with ExitStack() as stack:
        try:
            made = tempfile.TemporaryDirectory(prefix="rkv-bench-", ignore_cleanup_errors=True)
            folder = Path(stack.enter_context(made))
            numbers = RUNNERS[run.mode](workload, run.side, engine_flags, folder, show)
            # Refuses what the document could not hold.
            json.dumps(numbers, allow_nan=False)
        except (OSError, LookupError, ValueError) as error:
            problem = f"{run.side.name}, {run.mode}: {type(error).__name__}: {error}"
            raise ChildError(problem, _last_log(folder)) from error
    return numbers


def _last_log(folder: Path | None) -> Path | None:
    if folder is None:
        return None
    return next((folder / name for name in _LOGS if (folder / name).exists()), None)
