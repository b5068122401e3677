"""All runs of one benchmark, one after the other, each in an empty folder, progress on stderr.

Next: offline.py and served.py.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rkv_vllm.bench.checks import Measured
from rkv_vllm.bench.offline import Show, run_offline
from rkv_vllm.bench.processes import ChildError
from rkv_vllm.bench.served import run_served
from rkv_vllm.bench.sides import Run
from rkv_vllm.bench.workload import Workload

# What the checks ask about a side.
_OF_SIDE = ("budget", "when", "pool_tokens", "is_exact")
RUNNERS = {"offline": run_offline, "served": run_served}
# In a run's folder; the process that was started last comes first.
_LOGS = ("client.log", "server.log", "offline.log")


def run_all(
    workload: Workload, schedule: Sequence[Run], engine_flags: Sequence[str], measured: Measured
) -> None:
    """Carry the runs out.

    Args:
        workload: what is asked.
        schedule: the runs in their order.
        engine_flags: further flags of every side.
        measured: takes the result of each run as soon as it is over, so that those of finished runs
            are there when a later one fails or is interrupted; and why a side that may refuse did
            not start. It is not tried again.

    Raises:
        ChildError: a run failed; none is tried after it.
    """
    console = Console(stderr=True, highlight=False)
    columns = [TextColumn("{task.description}", markup=False), BarColumn(20)]
    columns += [TimeElapsedColumn(), TimeRemainingColumn(elapsed_when_finished=True)]
    started = time.monotonic()
    is_live = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not is_live) as bar:
        task = bar.add_task("", total=len(schedule))

        def show(done: int, name: str, phase: str, share: float) -> None:
            how_far = f", {share:.0%}" if share else ""
            bar.update(task, completed=done + share, description=f"{name}, {phase}{how_far}")

        for number, run in enumerate(schedule):
            side = run.side
            if (run.mode, side.name) in measured.refusals:
                continue
            name = f"run {number + 1} of {len(schedule)}: {run.side.name}, {run.mode}"
            if not is_live:
                seconds = time.monotonic() - started
                console.print(f"{name} ({seconds:.0f} s so far)", soft_wrap=True)
            try:
                numbers = _carry_out(workload, run, engine_flags, partial(show, number, name))
            except ChildError as error:
                # A side that worked once is available: then it is a failure like any other.
                if not side.may_refuse or run.repeat > 1:
                    raise
                measured.refusals[run.mode, side.name] = error.reason
                continue
            names = {"mode": run.mode, "side": side.name, "repeat": run.repeat}
            more = {each: getattr(side, each) for each in _OF_SIDE}
            measured.results.append({**names, **more, **numbers})


def _carry_out(
    workload: Workload, run: Run, engine_flags: Sequence[str], show: Show
) -> dict[str, Any]:
    """One run; whatever goes wrong with it leaves the results of the runs before it."""
    logs: list[Path] = []
    with ExitStack() as stack:
        try:
            made = tempfile.TemporaryDirectory(prefix="rkv-bench-", ignore_cleanup_errors=True)
            folder = Path(stack.enter_context(made))
            logs = [folder / name for name in _LOGS]
            show("starting", 0.0)
            numbers = RUNNERS[run.mode](workload, run.side, engine_flags, folder, show)
            # Refuses what the document could not hold.
            json.dumps(numbers, allow_nan=False)
        except (OSError, LookupError, ValueError) as error:
            problem = f"{run.side.name}, {run.mode}: {type(error).__name__}: {error}"
            raise ChildError(problem, next(filter(Path.exists, logs), None)) from error
    return numbers
