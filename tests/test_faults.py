"""What users see when a client, the engine, a worker or the server is killed amid its work."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import openai
import psutil
import pytest

from rkv_vllm.bench.processes import living
from tests.models import random_prompt
from tests.server import Server, serving
from tests.test_pressure_served import settled_metrics

pytestmark = [pytest.mark.engine, pytest.mark.nightly, pytest.mark.timeout(1200)]

FLAGS = ("--kv-compression=rkv", "--kv-budget=32", "--kv-buffer=16", "--max-model-len=4096")
# Tokens of an answer that is still under way when a signal comes: some ten seconds.
ANSWER_LEN = 3500
NUM_CLIENTS = 4
# Of a machine that does other things as well.
PATIENCE = 120
# Reads a long answer as it comes.
CLIENT = """
import json, sys, urllib.request
url, body = sys.argv[1:]
request = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
for line in opener.open(request):
    print(line, flush=True)
"""


@pytest.fixture(scope="module")
def model(random_model_dir) -> Path:
    return random_model_dir("qwen3", 3)


def asking_processes(server: Server) -> list[subprocess.Popen]:
    """Clients that read endless answers, each in a process of its own."""

    clients = []
    for number in range(NUM_CLIENTS):
        body = {
            "model": server.model,
            "prompt": random_prompt(20, seed=number),
            "max_tokens": ANSWER_LEN,
            "ignore_eos": True,
            "stream": True,
            "temperature": 0,
        }
        command = [sys.executable, "-c", CLIENT, f"{server.base_url}/v1/completions"]
        clients.append(subprocess.Popen([*command, json.dumps(body)], stdout=subprocess.DEVNULL))
    return clients


def wait_for_load(server: Server) -> None:
    """Return once all clients run and some are compacted."""
    deadline = time.monotonic() + PATIENCE
    # Nobody else has asked before.
    while (
        server.metrics()["num_requests_running"] < NUM_CLIENTS or not server.stats()["compactions"]
    ):
        assert time.monotonic() < deadline, server.metrics()
        time.sleep(0.05)


def under_load(server: Server, pool: ThreadPoolExecutor) -> list[Future]:
    """Long answers on their way, half of them streamed; what becomes of each is its future's."""

    def ask(number: int) -> int:
        streams = number % 2 == 0
        answer = server.complete(random_prompt(20, seed=number), ANSWER_LEN, stream=streams)
        if not streams:
            return answer.usage.completion_tokens
        return sum(len(choice.token_ids or ()) for chunk in answer for choice in chunk.choices)

    asked = [pool.submit(ask, number) for number in range(NUM_CLIENTS)]
    wait_for_load(server)
    return asked


def assert_nobody_is_left(server: Server) -> None:
    """Every process of the server is gone, by itself."""
    deadline = time.monotonic() + PATIENCE
    while found := living(server.running.process.pid):
        assert time.monotonic() < deadline, f"still there: {found}"
        time.sleep(0.1)


def assert_nobody_hangs(asked: list[Future]) -> None:
    """Every client hears that its answer breaks off; none takes a part for the whole."""
    for each in asked:
        error = each.exception(timeout=PATIENCE)
        # A stream that ends early and silently would be a short answer.
        assert error is not None or each.result() < ANSWER_LEN
        assert (
            error is None or isinstance(error, (openai.APIError, OSError)) or "peer" in str(error)
        )


def test_killed_clients_leave_an_empty_pool_and_a_server_that_answers(model):
    with serving(model, *FLAGS) as server:
        clients = asking_processes(server)
        try:
            wait_for_load(server)
        finally:
            for client in clients:
                client.kill()
                client.wait()
        metrics = settled_metrics(server)
        for gauge in ("kv_cache_usage_perc", "kv_compression_logical_tokens"):
            assert metrics[gauge] == 0
        before = server.stats()["compactions"]
        assert server.complete(random_prompt(20, seed=9), 100).usage.completion_tokens == 100
        # At 48 settled tokens and every 16 from there on; the last token is never computed.
        assert server.stats()["compactions"] - before == (20 + 100 - 2 - 32) // 16
        assert "Traceback" not in server.log


def process_of(server: Server, title: str) -> psutil.Process:
    """The one process of the server with this title."""
    (found,) = (
        process
        for process in living(server.running.process.pid)
        if "".join(process.cmdline()).startswith(title)
    )
    return found


def wait_for_end(process: psutil.Process) -> None:
    """Whoever ended counts as gone, also where its parent never asks."""
    deadline = time.monotonic() + PATIENCE
    with suppress(psutil.NoSuchProcess):
        while process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, process
            time.sleep(0.1)


@pytest.mark.parametrize("victim", ["VLLM::EngineCore", "VLLM::Worker"])
def test_whoever_of_the_engine_is_killed_the_server_ends_and_says_so(model, victim):
    with serving(model, *FLAGS) as server, ThreadPoolExecutor(NUM_CLIENTS) as pool:
        asked = under_load(server, pool)
        process_of(server, victim).kill()
        assert_nobody_hangs(asked)
        # vLLM 0.32 takes a dead engine for a reason to end in good order.
        assert server.running.process.wait(PATIENCE) == 0
        assert_nobody_is_left(server)
        assert "died" in server.log or "exited unexpectedly" in server.log
        # Nothing of ours is what failed.
        assert "rkv_vllm" not in server.log[server.log.rfind("Traceback") :]


def test_clients_of_a_killed_server_hear_it_and_its_engine_waits_to_be_killed(model):
    """Stock vLLM's engine survives its API server as well, idle: whoever kills takes the group."""
    with serving(model, *FLAGS) as server, ThreadPoolExecutor(NUM_CLIENTS) as pool:
        asked = under_load(server, pool)
        engine = process_of(server, "VLLM::EngineCore")
        server.running.process.kill()
        assert_nobody_hangs(asked)
        assert server.running.process.wait(PATIENCE) == -signal.SIGKILL
        os.killpg(server.running.process.pid, signal.SIGKILL)
        wait_for_end(engine)
        assert_nobody_is_left(server)
        assert "Traceback" not in server.log


def test_sigterm_under_load_ends_the_engine_at_once_and_the_server_with_its_clients(model):
    """vLLM 0.32 may kill its engine before that has told the clients, who then wait."""
    with serving(model, *FLAGS) as server:
        clients = asking_processes(server)
        try:
            wait_for_load(server)
            engine = process_of(server, "VLLM::EngineCore")
            server.running.process.terminate()
            wait_for_end(engine)
        finally:
            for client in clients:
                client.kill()
                client.wait()
        assert server.running.process.wait(PATIENCE) == 0
        assert_nobody_is_left(server)
        assert "rkv_vllm" not in server.log[server.log.rfind("Traceback") :]


def test_sigterm_with_a_shutdown_timeout_loses_no_token(model):
    with serving(model, *FLAGS, "--shutdown-timeout=300") as server:
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            asked = under_load(server, pool)
            server.running.process.terminate()
            assert [each.result(timeout=PATIENCE) for each in asked] == [ANSWER_LEN] * NUM_CLIENTS
        assert server.running.process.wait(PATIENCE) == 0
        assert_nobody_is_left(server)
        # vLLM itself may log one when its output handler finds the engine gone.
        assert "rkv_vllm" not in server.log[server.log.rfind("Traceback") :]
