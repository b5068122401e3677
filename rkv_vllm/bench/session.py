"""All runs of one benchmark, one after the other, each in an empty folder of its own.

Next: offline.py and served.py.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from rkv_vllm.bench.checks import Result
from rkv_vllm.bench.offline import run_offline
from rkv_vllm.bench.progress import RunProgress
from rkv_vllm.bench.served import run_served
from rkv_vllm.bench.sides import Run
from rkv_vllm.bench.workload import Workload

RUNNERS = {"offline": run_offline, "served": run_served}


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
            with tempfile.TemporaryDirectory(prefix="rkv-bench-") as folder:
                execute = RUNNERS[run.mode]
                numbers = execute(workload, run.side, engine_flags, Path(folder), progress.show)
            names = {"mode": run.mode, "side": run.side.name, "budget": run.side.budget}
            results.append({**names, "repeat": run.repeat, **numbers})
            progress.end()
