"""All jobs of an offline evaluation, one child process after the other, progress on stderr.

Results come through a file that the child appends to: what has ended is in the store at once, also
when the child or this process is ended. Next: engine.py, the inside of a child.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rkv_vllm.bench.offline import POLL_SECONDS
from rkv_vllm.bench.processes import ChildError, child_environment, process_group
from rkv_vllm.eval.grade import grade
from rkv_vllm.eval.plan import JOB, PROGRESS, RESULTS, EvalPlan, Task, open_tasks
from rkv_vllm.eval.question import Problem
from rkv_vllm.eval.sides import EvalSide, MethodChoice
from rkv_vllm.eval.store import RUN, SPEED, Line, ResultStore

_LOG = "engine.log"
LOG_SECONDS = 60
# The rate of which the time left is guessed: sides differ, so over a long while.
_RATE_SECONDS = 1800

# What is being done, and how many requests of the job, those under way in part.
Show = Callable[[str, float], None]


def run_offline_eval(plan: EvalPlan, store: ResultStore) -> None:
    """Carry out what is left of an evaluation.

    Args:
        plan: the evaluation.
        store: takes each result as soon as it is there.

    Raises:
        ChildError: an engine failed; none is tried after it.
    """
    if plan.is_forced:
        store.folder.mkdir(exist_ok=True)
    with progress_of(plan, store) as show:
        for number in range(plan.rounds):
            for choice, sides in plan.engines_of_round(number):
                tasks = open_tasks(plan, number, sides, store)
                if tasks:
                    _run_job(plan, choice, sides, tasks, store, show)


@contextmanager
def progress_of(plan: EvalPlan, store: ResultStore) -> Iterator[Show]:
    """A bar over all results, or a line now and then in a log; yields what moves it."""
    console = Console(stderr=True, highlight=False)
    columns = [TextColumn("{task.description}", markup=False), BarColumn(20)]
    columns += [MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
    is_live = console.is_terminal
    at_start = done_of(plan, store)
    started, next_line = time.monotonic(), 0.0
    bar = Progress(
        *columns,
        console=console,
        transient=True,
        disable=not is_live,
        speed_estimate_period=_RATE_SECONDS,
    )
    with bar:
        task = bar.add_task("starting", total=plan.num_results, completed=at_start)

        def show(what: str, under_way: float) -> None:
            nonlocal next_line
            done = done_of(plan, store) + under_way
            bar.update(task, completed=done, description=what)
            if not is_live and time.monotonic() >= next_line:
                next_line = time.monotonic() + LOG_SECONDS
                seconds = time.monotonic() - started
                left = seconds * (plan.num_results - done) / max(done - at_start, 1e-9)
                guess = f", about {left / 60:.0f} min left" if done - at_start >= 1 else ""
                console.print(
                    f"{done:.1f} of {plan.num_results} after {seconds / 60:.1f} min{guess}: {what}",
                    soft_wrap=True,
                )

        yield show


def done_of(plan: EvalPlan, store: ResultStore) -> int:
    """Results of the plan that are there."""
    places = [
        (each.problem.set, each.problem.id, sample)
        for each in plan.asked
        for sample in range(plan.samples)
    ]
    return sum(
        store.get(kind, side.name, *place) is not None
        for side in plan.sides
        for kind in plan.kinds_of(side)
        for place in places
    )


def _run_job(
    plan: EvalPlan,
    choice: MethodChoice,
    sides: list[EvalSide],
    tasks: list[Task],
    store: ResultStore,
    show: Show,
) -> None:
    """Serve the tasks of one engine in a fresh process."""
    budget = max(side.budget or 0 for side in sides)
    # A request that waits for a seat keeps more than its budget: that would be no fair side.
    seats = min(plan.max_num_seqs, sum(len(task["requests"]) for task in tasks))
    job = {
        "engine_flags": [
            *plan.engine_flags,
            *choice.flags({"seats": seats, **plan.common}, budget),
        ],
        "is_compressed": choice.name is not None,
        "is_forced": plan.is_forced,
        "sampling": plan.sampling,
        "at_once": plan.at_once,
        "tasks": tasks,
    }
    with tempfile.TemporaryDirectory(prefix="rkv-eval-", ignore_cleanup_errors=True) as made:
        folder = Path(made)
        (folder / JOB).write_text(json.dumps(job))
        command = [sys.executable, "-m", "rkv_vllm.eval.engine", str(folder)]
        # The scheduler can only be counted in the child itself.
        environment = child_environment(VLLM_ENABLE_V1_MULTIPROCESSING="0")
        reader = _ResultReader(folder / RESULTS, plan, store)
        show(f"{choice}, starting", 0.0)
        try:
            with process_group(command, folder / _LOG, environment) as process:
                while process.poll() is None:
                    reader.read()
                    show(*_progress(folder, choice, reader.num_read))
                    time.sleep(POLL_SECONDS)
        finally:
            # Also of what was ended: nothing that was finished is lost.
            reader.read()
        if process.returncode != 0:
            code = process.returncode
            raise ChildError(f"{choice}: the engine ended with exit code {code}", folder / _LOG)


def _progress(folder: Path, choice: MethodChoice, num_read: int) -> tuple[str, float]:
    if not (folder / PROGRESS).exists():
        return f"{choice}, starting", 0.0
    what, done = json.loads((folder / PROGRESS).read_text())
    return what, max(0.0, done - num_read)


class _ResultReader:
    """Moves what a child has written to the store, graded."""

    def __init__(self, path: Path, plan: EvalPlan, store: ResultStore) -> None:
        self._path, self._store, self._at = path, store, 0
        self._problems = problems_of(plan)
        self.num_read = 0

    def read(self) -> None:
        """Take the lines that are new."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._at)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._at += len(whole)
        for text in whole.splitlines():
            line = json.loads(text)
            self.num_read += line["kind"] != SPEED
            self._store.append(graded(line, self._problems))


def problems_of(plan: EvalPlan) -> dict[tuple[str, str], Problem]:
    """The problems by set and id."""
    return {(each.problem.set, each.problem.id): each.problem for each in plan.asked}


def graded(line: Line, problems: dict[tuple[str, str], Problem]) -> dict[str, Any]:
    """The line of a result with `is_correct`, where it is a text."""
    if line["kind"] != RUN:
        return line
    problem = problems[line["set"], line["problem"]]
    return {**line, "is_correct": grade(problem, line["text"])}
