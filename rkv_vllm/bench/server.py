"""`vllm serve` as users start it, on a free port of this machine, gone when its block ends.

HTTP to it never goes through a proxy that the environment names. Next: served.py.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

from rkv_vllm.bench.processes import (
    ChildError,
    child_environment,
    free_port,
    living,
    process_group,
)

START_SECONDS = 900
HTTP_SECONDS = 60
POLL_SECONDS = 0.2


def vllm_command() -> tuple[str, ...]:
    """The `vllm` command of the environment that this process runs in."""
    return sys.executable, "-m", "vllm.entrypoints.cli.main"


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: without a trailing slash and without "/v1".
        process: the leader of its process group.
        log: its stdout and stderr.
    """

    url: str
    process: subprocess.Popen
    log: Path

    def ask(self, method: str, path: str, **settings: Any) -> requests.Response:
        """An answer, which is no error.

        Args:
            method: "GET" or "POST".
            path: behind `url`.
            settings: as for `requests.request`.

        Raises:
            requests.RequestException: no answer, or its status is that of an error.
        """
        answer = local_request(method, self.url + path, **settings)
        answer.raise_for_status()
        return answer

    def is_healthy(self) -> bool:
        """Whether /health says so."""
        with suppress(requests.ConnectionError, requests.Timeout):
            return local_request("GET", f"{self.url}/health", timeout=5).status_code == 200
        return False


def local_request(method: str, url: str, **settings: Any) -> requests.Response:
    """Ask a server on this machine."""
    with requests.Session() as session:
        session.trust_env = False
        return session.request(method, url, **{"timeout": HTTP_SECONDS, **settings})


@contextmanager
def serving(
    flags: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    port: int = 0,
    waiting: Callable[[float], None] = lambda seconds: None,
) -> Iterator[Server]:
    """Starts `vllm serve`, waits until it is healthy, and leaves no process behind.

    Args:
        flags: the model and the flags of `vllm serve`.
        log: takes its output.
        environment: changes to `child_environment()`.
        port: to listen on; 0 picks a free one.
        waiting: told the seconds so far while it starts.

    Raises:
        ChildError: it did not come up.
    """
    port = port or free_port()
    command = [*vllm_command(), "serve", *flags, "--host=127.0.0.1", f"--port={port}"]
    # The first is set by some for offline engines; the server would ask every request for the key.
    inherited = child_environment()
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_API_KEY"):
        inherited.pop(name, None)
    segments: set[Path] = set()
    try:
        with process_group(command, log, {**inherited, **(environment or {})}) as process:
            server = Server(f"http://127.0.0.1:{port}", process, log)
            try:
                _wait_until_healthy(server, waiting)
                yield server
            finally:
                segments = _shared_memory(process.pid)
    finally:
        for segment in segments:
            segment.unlink(missing_ok=True)


def _wait_until_healthy(server: Server, waiting: Callable[[float], None]) -> None:
    problem = "vllm serve did not come up"
    started = time.monotonic()
    while (seconds := time.monotonic() - started) < START_SECONDS:
        if (code := server.process.poll()) is not None:
            raise ChildError(f"{problem}, it ended with exit code {code}", server.log)
        if server.is_healthy():
            return
        waiting(seconds)
        time.sleep(POLL_SECONDS)
    raise ChildError(f"{problem} within {START_SECONDS} s", server.log)


def _shared_memory(pgid: int) -> set[Path]:
    """Segments of the ranks' collectives; vLLM itself leaves them behind, 8 MiB per server."""
    paths: set[str] = set()
    for process in living(pgid):
        with suppress(psutil.Error):
            paths |= {mapped.path for mapped in process.memory_maps()}
    return {Path(path) for path in paths if path.startswith("/dev/shm/vllm_dist_")}
