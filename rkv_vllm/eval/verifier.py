"""Compares two answers as mathematics with math-verify, in a process of its own.

sympy can hang where no signal reaches it (`9^{9^{9}}`), take all memory, or crash; and
math-verify's own timeouts only work in a main thread. So it runs in a child, which the kernel ends
when one comparison takes too much processor time or memory; the next one starts another child.
Processor time, not a clock: a busy machine must not change a grade.

Next: grade.py, which finds the answers.
"""

import contextlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from functools import cache
from importlib.util import find_spec
from typing import Any

# For one comparison; the slowest answers of MATH-500 take 0.3 s.
CPU_SECONDS = 5
_MEMORY_BYTES = 8 << 30
_READY = "ready"


class Verifier:
    """The parent's end: starts the child at the first question, and after its death another."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None
        # One question at a time, whatever thread asks.
        self._lock = threading.Lock()

    def compare(self, reference: str, answer: str) -> bool | None:
        """Returns whether two answers mean the same; None where that cannot be said.

        Args:
            reference: the right answer, in LaTeX that math-verify finds: in a box.
            answer: the same, or text that ends with an answer.

        Raises:
            ValueError: math-verify is not installed.
            RuntimeError: the child does not start.
        """
        with self._lock:
            if self._child is None:
                self._child = _start()
            try:
                self._child.stdin.write(json.dumps([reference, answer]) + "\n")
                self._child.stdin.flush()
                reply = self._child.stdout.readline()
            except BrokenPipeError:
                reply = ""
            if not reply:
                self._end()
                return None
            return json.loads(reply)

    def close(self) -> None:
        """End the child, if there is one."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._child is None:
            return
        self._child.kill()
        # What it no longer reads cannot be flushed.
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        self._child.stdout.close()
        self._child.wait()
        self._child = None


def require_math_verify() -> None:
    """Raise ValueError where math-verify is missing."""
    if find_spec("math_verify") is None:
        raise ValueError(
            "eval: got an installation without math-verify, wanted it to grade answers; run: "
            "pip install 'rkv-vllm[eval]'"
        )


def _start() -> "subprocess.Popen[str]":
    require_math_verify()
    child = subprocess.Popen(
        [sys.executable, "-m", __spec__.name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        errors="surrogatepass",
    )
    if child.stdout.readline().strip() != _READY:
        child.kill()
        raise RuntimeError(
            f"eval: the process that grades answers ended with exit code {child.wait()} at its "
            f"start; see what `{sys.executable} -m {__spec__.name}` prints"
        )
    return child


@cache
def _parsed(reference: str) -> list[Any]:
    from math_verify import parse

    return parse(reference, parsing_timeout=None, raise_on_error=True)


def _compare(reference: str, answer: str) -> bool | None:
    from math_verify import parse, verify

    wanted = _parsed(reference)
    got = parse(answer, parsing_timeout=None, raise_on_error=True)
    if not wanted or not got:
        return None
    return verify(wanted, got, timeout_seconds=None, raise_on_error=True)


def _serve() -> None:
    """The child: a line with two texts in, a line with the verdict out, until the input ends."""
    # Whatever else prints must not come between the replies.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # Ctrl-C is for the parent, which ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # It warns that its timeouts are off.
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard_memory = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, hard_memory))
    _, hard_cpu = resource.getrlimit(resource.RLIMIT_CPU)
    import math_verify  # noqa: F401  slow, and not the first question's fault

    print(_READY, file=replies, flush=True)
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + 1 + CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (limit, hard_cpu))
        try:
            verdict = _compare(*json.loads(line))
        # Not only of math-verify: sympy and the parser raise whatever odd input makes them raise.
        except Exception:
            verdict = None
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    _serve()
