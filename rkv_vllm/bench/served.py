"""One served run: `vllm serve` as users start it, loaded by vLLM's own client `vllm bench serve`.

Throughput and latencies are the client's; counts come from /metrics, scraped while it runs, so that
peaks and means of running requests are those of the samples. Next: checks.py.
"""

import json
import math
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests

from rkv_vllm.bench.offline import Show
from rkv_vllm.bench.processes import ChildError, child_environment, process_group
from rkv_vllm.bench.prompts import PROBES
from rkv_vllm.bench.samples import Scrape, counts_of_load
from rkv_vllm.bench.server import POLL_SECONDS, Server, serving, vllm_command
from rkv_vllm.bench.sides import Side
from rkv_vllm.bench.workload import Workload

SAMPLE_SECONDS = 1.0


def run_served(
    workload: Workload, side: Side, engine_flags: Sequence[str], folder: Path, show: Show
) -> dict[str, Any]:
    """Serve the prompts once from a fresh server.

    Args:
        workload: what is asked.
        side: who is asked.
        engine_flags: further flags of every side.
        folder: empty; takes logs and the client's result.
        show: told how far it is.

    Returns:
        The counts of `offline.run`, with `ttft_ms`, `itl_ms` and the first `error`.

    Raises:
        ChildError: the server did not come up or died, or the client failed.
    """
    pool = workload.engine_flags(side.pool_tokens)
    flags = [workload.model, *pool, *engine_flags, *side.flags]
    started = time.monotonic()
    log = folder / "server.log"
    try:
        with serving(flags, log, waiting=lambda _: show("starting", 0.0)) as server:
            start_seconds = time.monotonic() - started
            model = server.ask("GET", "/v1/models").json()["data"][0]["id"]
            probe = [_completed(server, model, text, workload.probe_len) for text in PROBES]
            before = Scrape.of(server)
            client = _client_command(workload, model, server.url, folder)
            with process_group(client, folder / "client.log", child_environment()) as process:
                during = _sample(process, server, before, workload, show)
            after = _idle_scrape(server)
    except requests.RequestException as error:
        why = f"{side.name}: vllm serve stopped answering ({type(error).__name__})"
        raise ChildError(why, log) from error
    if process.returncode != 0:
        why = f"{side.name}: vllm bench serve ended with exit code {process.returncode}"
        raise ChildError(why, folder / "client.log")
    found = json.loads((folder / "client.json").read_text())
    error = next(filter(None, found["errors"]), "")
    return {
        "start_seconds": start_seconds,
        "seconds": found["duration"],
        "tokens_per_s": found["output_throughput"],
        "prompt_lens": found["input_lens"],
        "output_lens": found["output_lens"],
        "ttft_ms": {p: found[f"{p}_ttft_ms"] for p in ("p50", "p99")},
        "itl_ms": {p: found[f"{p}_itl_ms"] for p in ("p50", "p99")},
        # Of a traceback: what went wrong.
        "error": error.strip().rpartition("\n")[2],
        **counts_of_load(before, during, after),
        "probe": probe,
    }


def _completed(server: Server, model: str, text: str, max_tokens: int) -> list[int]:
    """The token ids of one greedy completion."""
    body = {"model": model, "prompt": text, "max_tokens": max_tokens, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True}
    answer = server.ask("POST", "/v1/completions", json=body, timeout=600)
    return answer.json()["choices"][0]["token_ids"]


def _client_command(workload: Workload, model: str, url: str, folder: Path) -> list[str]:
    dataset = folder / "prompts.jsonl"
    lines = [
        json.dumps({"prompt": prompt, "output_tokens": output_len}) + "\n"
        for prompt, output_len in zip(workload.prompts, workload.output_lens, strict=True)
    ]
    dataset.write_text("".join(lines))
    command = [
        *(*vllm_command(), "bench", "serve", "--base-url", url, "--backend", "openai"),
        *("--model", workload.model, "--served-model-name", model),
        *("--dataset-name", "custom", "--dataset-path", str(dataset), "--disable-shuffle"),
        # The prompts are in the chat template already.
        *("--skip-chat-template", "--num-prompts", str(len(workload.prompts))),
        *("--custom-output-len", "-1", "--ignore-eos", "--temperature", "0"),
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
    client: subprocess.Popen, server: Server, before: Scrape, workload: Workload, show: Show
) -> list[Scrape]:
    """Scrapes /metrics until the client ends; without a server it would wait for hours."""
    num_tokens = sum(workload.output_lens)
    scrapes: list[Scrape] = []
    next_sample = time.monotonic()
    while client.poll() is None and server.process.poll() is None:
        if time.monotonic() >= next_sample:
            next_sample = time.monotonic() + SAMPLE_SECONDS
            scrapes.append(Scrape.of(server))
            generated = scrapes[-1].generated_tokens - before.generated_tokens
            show("generating", min(generated / num_tokens, 1.0))
        time.sleep(POLL_SECONDS)
    return scrapes


def _idle_scrape(server: Server) -> Scrape:
    """The counters once the server's last step is in them."""
    for _ in range(50):
        scrape = Scrape.of(server)
        if scrape.running == 0:
            break
        time.sleep(POLL_SECONDS)
    return scrape
