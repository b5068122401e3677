"""One served run: `vllm serve` as users start it, loaded by vLLM's own client `vllm bench serve`.

Throughput and latencies are the client's; counts come from /metrics, scraped while it runs, so that
peaks and means of running requests are those of the samples. Next: checks.py.
"""

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import requests

from rkv_vllm.bench.local_http import answer, request
from rkv_vllm.bench.offline import Progress
from rkv_vllm.bench.processes import ChildError, child_environment, free_port, process_group
from rkv_vllm.bench.prompts import PROBES
from rkv_vllm.bench.samples import Samples, Scrape
from rkv_vllm.bench.sides import Side
from rkv_vllm.bench.workload import Workload

START_SECONDS = 900
POLL_SECONDS = 0.2
SAMPLE_SECONDS = 1.0


def run_served(
    workload: Workload, side: Side, engine_flags: Sequence[str], folder: Path, show: Progress
) -> dict[str, Any]:
    """Serve the prompts once from a fresh server.

    Args:
        workload: what is asked.
        side: who is asked.
        engine_flags: further flags of every side.
        folder: empty; takes logs and the client's result.
        show: told how far it is.

    Returns:
        The counts of `offline_side.run`, with `ttft_ms`, `itl_ms` and the first `error`.

    Raises:
        ChildError: the server did not come up or died, or the client failed.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [*_vllm(), "serve", workload.model, "--host=127.0.0.1", f"--port={port}"]
    command += [*workload.engine_flags(), *engine_flags, *side.flags]
    environment = child_environment()
    # Set by some for offline engines; a server's engine is a process of its own.
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    # The server would ask every request for it.
    environment.pop("VLLM_API_KEY", None)
    log = folder / "server.log"
    started = time.monotonic()
    answering = _failing_with(log, side)
    with process_group(command, log, environment) as server, answering:
        _wait_until_healthy(server, url, side, log, show)
        start_seconds = time.monotonic() - started
        served_name = answer("GET", f"{url}/v1/models").json()["data"][0]["id"]
        probe = [_ask(url, served_name, text, workload.probe_len) for text in PROBES]
        samples = Samples(Scrape.of(url))
        client = _client_command(workload, served_name, url, folder)
        with process_group(client, folder / "client.log", environment) as process:
            _sample(process, server, url, samples, workload, show)
        after = _idle_scrape(url)
    if process.returncode != 0:
        raise ChildError(
            f"{side.name}: vllm bench serve ended with exit code {process.returncode}",
            folder / "client.log",
        )
    return {
        "start_seconds": start_seconds,
        **_client_numbers(json.loads((folder / "client.json").read_text())),
        **samples.counts(after),
        "probe": probe,
    }


def _vllm() -> tuple[str, ...]:
    """The `vllm` command of the environment that this process runs in."""
    return sys.executable, "-m", "vllm.entrypoints.cli.main"


@contextmanager
def _failing_with(log: Path, side: Side) -> Iterator[None]:
    """Turns a broken connection to the server into an error with its log."""
    try:
        yield
    except requests.RequestException as error:
        problem = f"{side.name}: vllm serve stopped answering ({type(error).__name__})"
        raise ChildError(problem, log) from error


def _wait_until_healthy(
    server: subprocess.Popen, url: str, side: Side, log: Path, show: Progress
) -> None:
    problem = f"{side.name}: vllm serve did not come up"
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise ChildError(f"{problem}, it ended with exit code {server.returncode}", log)
        with suppress(requests.ConnectionError, requests.Timeout):
            if request("GET", f"{url}/health", timeout=5).status_code == 200:
                return
        show("starting", 0.0)
        time.sleep(POLL_SECONDS)
    raise ChildError(f"{problem} within {START_SECONDS} s", log)


def _ask(url: str, model: str, text: str, max_tokens: int) -> list[int]:
    """The token ids of one greedy completion."""
    body: Mapping[str, Any] = {
        "model": model,
        "prompt": text,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    completion = answer("POST", f"{url}/v1/completions", json=body, timeout=600).json()
    return completion["choices"][0]["token_ids"]


def _client_command(workload: Workload, served_name: str, url: str, folder: Path) -> list[str]:
    dataset = folder / "prompts.jsonl"
    lines = [json.dumps({"prompt": prompt}) for prompt in workload.prompts]
    dataset.write_text("\n".join(lines) + "\n")
    command = [
        *(*_vllm(), "bench", "serve", "--base-url", url, "--backend", "openai"),
        *("--model", workload.model, "--served-model-name", served_name),
        *("--dataset-name", "custom", "--dataset-path", str(dataset), "--disable-shuffle"),
        # The prompts are in the chat template already.
        *("--skip-chat-template", "--num-prompts", str(len(workload.prompts))),
        *("--custom-output-len", str(workload.output_len), "--ignore-eos", "--temperature", "0"),
        *("--seed", str(workload.seed), "--disable-tqdm", "--metric-percentiles", "50,99"),
        *("--save-result", "--save-detailed", "--result-dir", str(folder)),
        *("--result-filename", "client.json"),
    ]
    if math.isfinite(workload.request_rate):
        command += ["--request-rate", str(workload.request_rate)]
    if workload.max_concurrency is not None:
        command += ["--max-concurrency", str(workload.max_concurrency)]
    return command


def _sample(
    client: subprocess.Popen,
    server: subprocess.Popen,
    url: str,
    samples: Samples,
    workload: Workload,
    show: Progress,
) -> None:
    """Scrapes /metrics until the client ends; without a server it would wait for hours."""
    num_tokens = len(workload.prompts) * workload.output_len
    next_sample = time.monotonic()
    while client.poll() is None and server.poll() is None:
        if time.monotonic() >= next_sample:
            next_sample = time.monotonic() + SAMPLE_SECONDS
            samples.add(Scrape.of(url))
            show("generating", min(samples.generated_tokens / num_tokens, 1.0))
        time.sleep(POLL_SECONDS)


def _idle_scrape(url: str) -> Scrape:
    """The counters once the server's last step is in them."""
    for _ in range(50):
        scrape = Scrape.of(url)
        if scrape.running == 0:
            break
        time.sleep(POLL_SECONDS)
    return scrape


def _client_numbers(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "seconds": found["duration"],
        "tokens_per_s": found["output_throughput"],
        "prompt_lens": found["input_lens"],
        "output_lens": found["output_lens"],
        "ttft_ms": {"p50": found["p50_ttft_ms"], "p99": found["p99_ttft_ms"]},
        "itl_ms": {"p50": found["p50_itl_ms"], "p99": found["p99_itl_ms"]},
        "error": _last_line(next(filter(None, found["errors"]), "")),
    }


def _last_line(text: str) -> str:
    """Of a traceback: what went wrong."""
    return text.strip().rpartition("\n")[2]
