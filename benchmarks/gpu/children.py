"""Runs the children of verify.py: each with a time limit, a log and a result file of its own."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rkv_vllm.bench.processes import child_environment, process_group

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
_LOG_TAIL_LINES = 12


@dataclass(frozen=True)
class Child:
    """What became of one child.

    Attributes:
        name: its log is called so.
        rc: exit status, None when it was stopped at its time limit.
        seconds: how long it ran.
        result: what it wrote, also before it failed; None without any.
        file: where the result stands, in the folder of all children.
        tail: last lines of the log of one that failed.
    """

    name: str
    rc: int | None
    seconds: float
    result: dict[str, Any] | None
    file: Path
    tail: str = ""

    @property
    def problem(self) -> str | None:
        """Why it cannot be trusted, None when it ended well."""
        if self.rc is None:
            return f"{self.name}: stopped after {self.seconds:.0f} s: {self.tail}"
        if self.rc:
            return f"{self.name}: exit status {self.rc}: {self.tail}"
        if self.result is None:
            return f"{self.name}: no result"
        # What is installed here, or lies in the checkout, is not what verify.py prepared.
        package = self.result.get("package")
        if package and not Path(package).is_relative_to(self.file.parent):
            return f"{self.name}: imported {package}, wanted the copy in {self.file.parent}"
        return None


@dataclass
class Launcher:
    """Starts children, and knows how much time is left for them.

    Attributes:
        folder: for logs and results.
        env: what their environment has beyond this process's.
        deadline: monotonic time at which everything has to end.
    """

    folder: Path
    env: dict[str, str]
    deadline: float
    logs: list[Path] = field(default_factory=list)

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.deadline - time.monotonic()

    def run(
        self,
        name: str,
        script: Path,
        args: Sequence[str],
        limit: float,
        *,
        env: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> Child:
        """Run a Python script to its end or its limit.

        Args:
            name: for its files.
            script: takes `--result FILE` and writes JSON there, or prints JSON as its last line.
            args: further arguments.
            limit: seconds, cut to what is left.
            env: further variables.
            prefix: a command that runs Python, such as a memory checker.
        """
        result, log = (self.folder / f"{name}.{kind}" for kind in ("json", "log"))
        command = [*prefix, sys.executable, str(script), *args]
        if script.parent == HERE:
            command += ["--result", str(result)]
        environment = child_environment(**{**self.env, **(env or {})})
        self.logs.append(log)
        started = time.monotonic()
        with process_group(command, log, environment, cwd=self.folder) as process:
            try:
                rc = process.wait(max(1.0, min(limit, self.seconds_left)))
            except subprocess.TimeoutExpired:
                rc = None
        lines = log.read_text(errors="replace").splitlines()
        found = _parse(result.read_text() if result.exists() else "".join(lines[-1:]))
        # Lines of vLLM's own progress never explain a failure.
        telling = [line for line in lines if line.strip() and " INFO " not in line]
        tail = "" if rc == 0 else " | ".join(telling[-_LOG_TAIL_LINES:])
        return Child(name, rc, time.monotonic() - started, found, result, tail[-1500:])


def _parse(text: str) -> dict[str, Any] | None:
    """The JSON object that this is, None when it is none: half a file, or a line of a log."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
