"""`vllm serve` as users start it: its own process, flags only, looked at through HTTP alone.

Works without `tests/engine.py`: nothing of vLLM is imported here.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import requests
from prometheus_client.parser import text_string_to_metric_families

from tests.models import kv_cache_bytes

BLOCK_SIZE = 32
# A compiled start beside another test takes four minutes on two busy cores.
START_SECONDS = 480
STOP_SECONDS = 15
LOG_TAIL_LINES = 60
# Later flags win, so a test overrides any of these by repeating it.
DEFAULT_FLAGS = (
    "--dtype=float32",
    "--enforce-eager",
    "--max-model-len=1024",
    "--max-num-seqs=16",
    f"--block-size={BLOCK_SIZE}",
    "--seed=0",
)
DEFAULT_ENVIRONMENT = {
    # POST /collective_rpc, the only way to the workers' counters, is a development endpoint.
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    # Otherwise every server of this machine computes on core 0, and two ranks are refused.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@dataclass
class Server:
    """A running server.

    Attributes:
        base_url: without a trailing slash and without "/v1".
        model: name that requests give.
        process: the `vllm serve` process, leader of its process group.
        log_file: its stdout and stderr.
        client: synchronous client that never retries.
    """

    base_url: str
    model: str
    process: subprocess.Popen
    log_file: Path
    client: openai.OpenAI

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.base_url}/v1", api_key="none", max_retries=0, timeout=240
        )

    def health(self) -> int:
        """Status code of /health."""
        return requests.get(f"{self.base_url}/health", timeout=30).status_code

    def metrics(self) -> Counter[str]:
        """Samples of /metrics by name without the prefix "vllm:", summed over their labels."""
        sums: Counter[str] = Counter()
        answer = requests.get(f"{self.base_url}/metrics", timeout=30)
        answer.raise_for_status()
        for family in text_string_to_metric_families(answer.text):
            for sample in family.samples:
                sums[sample.name.removeprefix("vllm:")] += sample.value
        return sums

    def rpc(self, method: str) -> list[Any]:
        """What the worker's method returns, one entry per rank."""
        answer = requests.post(
            f"{self.base_url}/collective_rpc", json={"method": method}, timeout=60
        )
        answer.raise_for_status()
        return answer.json()["results"]

    def stats(self) -> dict[str, int]:
        """Counters of compression; the ranks must agree."""
        first, *others = self.rpc("kv_compression_stats")
        assert all(other == first for other in others)
        return first

    def report(self, response_id: str) -> dict[str, int | str]:
        """Lengths and blocks of the one request behind an OpenAI response."""
        reports = self.rpc("kv_compression_requests")[0]
        (report,) = [r for r in reports if response_id in r["req_id"]]
        return report

    def complete(self, prompt: list[int] | str, max_tokens: int, **options: Any) -> Any:
        """One greedy completion of exactly `max_tokens` tokens."""
        extra = {"ignore_eos": True, "return_token_ids": True, **options.pop("extra_body", {})}
        return self.client.completions.create(
            model=self.model,
            prompt=prompt,
            max_tokens=max_tokens,
            extra_body=extra,
            **{"temperature": 0, **options},
        )


@contextmanager
def serving(
    model: Path, *flags: str, num_blocks: int = 256, env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Starts `vllm serve`, waits until it is healthy, and leaves no process behind.

    Args:
        model: folder of a model.
        flags: further flags; they win over `DEFAULT_FLAGS`.
        num_blocks: blocks of the pool, the null block included.
        env: further environment variables.
    """
    port = free_port()
    pool = f"--kv-cache-memory-bytes={kv_cache_bytes(model, num_blocks * BLOCK_SIZE)}"
    command = [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        str(model),
        "--host=127.0.0.1",
        f"--port={port}",
        *DEFAULT_FLAGS,
        pool,
        *flags,
    ]
    inherited = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    environment = {**inherited, **DEFAULT_ENVIRONMENT, **(env or {})}
    with tempfile.TemporaryDirectory(prefix="served-") as scratch:
        log_file = Path(scratch) / "server.log"
        with log_file.open("w") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        base_url = f"http://127.0.0.1:{port}"
        client = openai.OpenAI(
            base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=240
        )
        server = Server(base_url, str(model), process, log_file, client)
        try:
            _wait_until_healthy(server)
            yield server
        finally:
            client.close()
            segments = shared_memory(process.pid)
            stop_group(process)
            for segment in segments:
                segment.unlink(missing_ok=True)


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def living_processes(pgid: int) -> list[psutil.Process]:
    """Processes of the group; zombies, which nobody may be there to reap, are dead."""
    living = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == pgid and process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
    return living


def shared_memory(pgid: int) -> set[Path]:
    """Segments of the ranks' collectives; vLLM itself leaves them behind, 8 MiB per server."""
    paths: set[str] = set()
    for process in living_processes(pgid):
        with suppress(psutil.NoSuchProcess):
            paths |= {mapped.path for mapped in process.memory_maps()}
    return {Path(path) for path in paths if path.startswith("/dev/shm/vllm_dist_")}


def stop_group(process: subprocess.Popen) -> None:
    """Ends the process and its whole group, politely first."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    # Its children clean up behind themselves when they see it go.
    if _wait_until_gone(process.pid, STOP_SECONDS):
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if not _wait_until_gone(process.pid, STOP_SECONDS):
        raise TimeoutError(f"these survive SIGKILL: {living_processes(process.pid)}")


def _wait_until_gone(pgid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while living_processes(pgid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _wait_until_healthy(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        if server.process.poll() is not None:
            problem = f"vllm serve ended with code {server.process.returncode}"
            break
        with suppress(requests.ConnectionError):
            if server.health() == 200:
                return
        if time.monotonic() > deadline:
            problem = f"vllm serve is not healthy after {START_SECONDS} s"
            break
        time.sleep(0.25)
    tail = "\n".join(server.log.splitlines()[-LOG_TAIL_LINES:])
    raise RuntimeError(f"{problem}; its log ends with:\n{tail}")
