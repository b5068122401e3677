"""Which run of how many, how far, how long still: on stderr, live or one line per run."""

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from rkv_vllm.bench.sides import Run


class RunProgress:
    """Shows the progress of all runs; a context manager."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._num_runs = len(runs)
        self._num_done = 0
        self._started = time.monotonic()
        self._name = ""
        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[times]}", markup=False),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=float(self._num_runs), times="")

    def __enter__(self) -> "RunProgress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def begin(self, run: Run) -> None:
        """The next run starts."""
        self._name = f"run {self._num_done + 1} of {self._num_runs}: {run.side.name}, {run.mode}"
        if not self._console.is_terminal:
            self._console.print(f"{self._name} ({self._times(0.0)})", soft_wrap=True)
        self.show("starting", 0.0)

    def show(self, phase: str, share: float) -> None:
        """The run is this far: its phase, and which share of the output exists."""
        self._bar.update(
            self._task,
            description=f"{self._name}, {phase} {share:.0%}" if share else f"{self._name}, {phase}",
            completed=self._num_done + share,
            times=self._times(share),
        )

    def end(self) -> None:
        """The run is over."""
        self._num_done += 1

    def _times(self, share: float) -> str:
        """Time so far, and an estimate of the rest once a run is over."""
        elapsed = time.monotonic() - self._started
        text = f"{_minutes(elapsed)} so far"
        if self._num_done:
            done = self._num_done + share
            text += f", about {_minutes(elapsed / done * (self._num_runs - done))} to go"
        return text


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
