"""Child processes that do not outlive their starter: in groups of their own, ended whole.

With one exception: a starter that is itself ended by SIGKILL cannot end anything. Knows nothing of
what the children run. Used by `rkv-vllm bench`, the demo, the tests and `benchmarks/gpu`. Next:
server.py for `vllm serve`.
"""

import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from rkv_vllm.variables import OFF, SWITCH

LOG_TAIL_LINES = 30
STOP_SECONDS = 15
# As the last line of a traceback has it, with or without a prefix of vLLM's, or a refused start.
_PYTHON_ERROR = re.compile(r"(?:\b[A-Z]\w*(?:Error|Exception)|\bvllm(?: serve)?: error): .+")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class ChildError(Exception):
    """A child that did not do its work.

    Attributes:
        log_tail: the last lines that it printed.
        reason: the first Python error that its log names, or else the problem.
    """

    def __init__(self, problem: str, log: Path | None) -> None:
        """Reads the log, if the child came as far as having one."""
        super().__init__(problem)
        text = "" if log is None else log.read_text(errors="replace")
        self.log_tail = text.splitlines()[-LOG_TAIL_LINES:]
        found = _PYTHON_ERROR.search(text)
        self.reason = found[0] if found else problem


class InterruptedBySignal(KeyboardInterrupt):
    """Ctrl-C, or another signal that ends a program.

    Attributes:
        exit_code: what shells expect of a program that the signal ended.
    """

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.exit_code = 128 + signum


def _interrupt(signum: int, _: FrameType | None) -> None:
    raise InterruptedBySignal(signum)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Turns signals that end a program into an exception; the old handlers come back after it.

    A shell starts background jobs with SIGINT ignored; it ends the program there as well. SIGHUP
    stays ignored where nohup made it so.
    """
    is_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    signums = [each for each in _SIGNALS if not (each is signal.SIGHUP and is_nohup)]
    before = {signum: signal.signal(signum, _interrupt) for signum in signums}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Lets nothing interrupt a block; the first signal that came meanwhile acts after it."""
    if threading.current_thread() is not threading.main_thread():
        # Signals interrupt the main thread alone.
        yield
        return
    came: list[int] = []
    before = {
        signum: signal.signal(signum, lambda signum, _: came.append(signum))
        for signum in _SIGNALS
        if signal.getsignal(signum) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        if came:
            signal.raise_signal(came[0])


@contextmanager
def process_group(
    command: Sequence[str], log: Path, environment: Mapping[str, str], cwd: Path | None = None
) -> Iterator[subprocess.Popen]:
    """Runs a command in a process group of its own and ends the whole group afterwards.

    Args:
        command: program and arguments.
        log: takes stdout and stderr.
        environment: the whole environment.
        cwd: folder to run in; by default that of this process.
    """
    process = None
    try:
        # A signal between the start and the assignment would leave an orphan.
        with _signals_held(), log.open("w") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, env=environment, cwd=cwd, start_new_session=True
            )
        yield process
    finally:
        if process is not None:
            with _signals_held():
                _end_group(process)


def _end_group(process: subprocess.Popen) -> None:
    """Ends the process, lets its children clean up, and kills what is left of the group."""
    process.terminate()
    _wait_until_gone(process)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    _wait_until_gone(process)


def _wait_until_gone(process: subprocess.Popen) -> None:
    deadline = time.monotonic() + STOP_SECONDS
    # Asking for its exit code also keeps the process itself from staying behind as a zombie.
    while (process.poll() is None or living(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)


def living(pgid: int) -> list:
    """Processes of a group; zombies, which nobody may be there to reap, are dead."""
    # Comes with vLLM, which other commands do without.
    import psutil

    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == pgid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def child_environment(**changes: str) -> dict[str, str]:
    """The environment of this process, with what makes vLLM quiet, offline and unbound."""
    hosts = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
    # A star means all hosts only where it stands alone.
    unproxied = hosts if hosts.strip() == "*" else ",".join(filter(None, (hosts, "127.0.0.1")))
    return {
        # vLLM would bind all threads of an engine to the first core of a small machine.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONUNBUFFERED": "1",
        **os.environ,
        # The child's command line says what it compresses, and a baseline nothing.
        SWITCH: OFF,
        # Whatever the user exported: a download would be measured with the start.
        "HF_HUB_OFFLINE": "1",
        "no_proxy": unproxied,
        "NO_PROXY": unproxied,
        **changes,
    }
