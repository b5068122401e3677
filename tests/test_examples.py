"""The examples and the demo do what they promise, and the demo cleans up behind itself."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
import vllm
from transformers import AutoTokenizer
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

from rkv_vllm.kernels.select.naive import largest
from rkv_vllm.methods import get_method
from rkv_vllm.options import ServerOptions
from tests import reference

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SUMMARY = re.compile(r"^(\d+) compactions evicted (\d+) tokens$", re.MULTILINE)
WAIT_SECONDS = 200


@pytest.fixture(scope="module")
def model(random_model_dir) -> Path:
    return random_model_dir("qwen3", 3)


def run_example(
    name: str,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    seconds: float = WAIT_SECONDS,
) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    environment = {**os.environ, **(env or {})}
    run = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.fixture
def run_here(model, monkeypatch, capfd) -> Iterator[Callable[[str], str]]:
    """Runs an example on the model in this process; its engine computes in float32.

    So its text can be compared with the reference's, and starting it is quicker.
    """
    monkeypatch.setattr(vllm, "LLM", partial(vllm.LLM, dtype="float32"))
    monkeypatch.syspath_prepend(EXAMPLES)
    engines = []

    def run(name: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, str(model)])
        engines.append(runpy.run_path(str(EXAMPLES / name), run_name="__main__")["llm"])
        return capfd.readouterr().out

    yield run
    for llm in engines:
        llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def test_offline_batch_compacts_every_prompt(model):
    options = ["--budget=64", "--buffer=32", "--max-tokens=200"]
    printed = run_example("offline_batch.py", f"--model={model}", *options)
    # Three prompts shorter than the budget: due at 96 tokens and every 32 later, up to 200.
    assert SUMMARY.findall(printed) == [(str(3 * 4), str(3 * 4 * 32))]


def keep_first_and_newest(
    keys: torch.Tensor, queries: torch.Tensor, budget: int, **_: float
) -> torch.Tensor:
    """What examples/keep_most_recent.py promises, written a second time."""
    num_heads, n, _ = keys.shape
    return torch.tensor([[*range(4), *range(n - budget + 4, n)]] * num_heads)


def test_method_of_ones_own_says_what_explicit_eviction_says(model, run_here, monkeypatch):
    printed = run_here("keep_most_recent.py")
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = ServerOptions(budget=128, buffer=64)
    prompt = tokenizer("Once upon a time").input_ids
    monkeypatch.setattr(reference, "keep_indices", keep_first_and_newest)
    expected = reference.generate_reference(model, prompt, 300, config)
    # Due at 192 tokens and at 256.
    assert SUMMARY.findall(printed) == [("2", "128")]
    assert len(expected.compactions) == 2
    assert tokenizer.decode(expected.token_ids) in printed


def test_method_of_ones_own_keeps_the_window_whatever_the_budget(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    cls = get_method("keep_most_recent.KeepMostRecent")
    method = cls(cls.Options(), None, None)
    scores = method.score_dense(torch.zeros(2, 20, 8), torch.zeros(2, 20, 8), None, 0, None)
    for budget, kept in ((9, [3]), (20, [*range(12)]), (13, [*range(4), 11])):
        assert largest(scores[:, :12], budget - 8).tolist() == [kept] * 2


@pytest.mark.parametrize("name", [path.name for path in EXAMPLES.glob("*.py")])
def test_example_is_short_and_says_how_to_run_it(name):
    lines = (EXAMPLES / name).read_text().splitlines()
    assert name == "demo.py" or len(lines) < 40
    assert any(line.startswith((f"python examples/{name}", "`make demo`")) for line in lines)


def test_every_request_gets_the_budget_that_it_asks_for(run_here):
    printed = run_here("per_request_budgets.py")
    # Prompts of 21, 13 and 12 tokens; the last of 300 output tokens is never computed.
    assert re.findall(r"^(.*): (\d+) compactions evicted (\d+), kept (\d+)$", printed, re.M) == [
        ("None", "2", "128", "193"),
        ("{'kv_budget': 192, 'kv_buffer': 32}", "3", "96", "217"),
        ("{'kv_compression': 'off'}", "0", "0", "312"),
    ]
    assert SUMMARY.findall(printed) == [("5", "224")]


# Five processes that import vLLM or Ray: 68 to 175 s, measured on two busy cores.
@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_ray_data_job_writes_what_was_evicted_and_ends_its_cluster(model, tmp_path):
    # Not tmp_path: names of Ray's sockets may have 107 characters.
    session = tempfile.mkdtemp(prefix="ray-")
    env = {
        "RAY_TMPDIR": session,
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(80 * 2**20),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    try:
        arguments = (str(model), str(tmp_path / "answers"))
        printed = run_example("ray_data_batch.py", *arguments, env=env, seconds=500)
        assert any(Path(session).rglob("raylet*"))
        assert not processes_of(session)
    finally:
        for survivor in processes_of(session):
            survivor.kill()
        shutil.rmtree(session)
    assert SUMMARY.findall(printed) == [(str(12 * 2), str(12 * 2 * 64))]
    files = (tmp_path / "answers").glob("*.json")
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == len(rows) == 12
    for row in rows:
        assert len(row["answer"]) > 300
        assert (row["compactions"], row["evicted_tokens"]) == (2, 128)


def processes_of(session: str) -> list[psutil.Process]:
    """Processes of a Ray cluster, whose command lines name its folder; zombies are dead."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(session in argument for argument in process.cmdline()):
                found.append(process)
    return found


@dataclass
class Demo:
    """A running demo and what it has printed so far."""

    process: psutil.Popen
    printed_file: Path

    @property
    def printed(self) -> str:
        return self.printed_file.read_text(errors="replace")

    def servers(self) -> list[psutil.Process]:
        return self.process.children(recursive=True)

    def wait_for(self, text: str) -> None:
        self.wait_until(lambda: text in self.printed)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert self.process.poll() is None, self.printed
            assert time.monotonic() < deadline, self.printed
            time.sleep(0.1)

    def interrupt(self) -> int:
        """Presses Ctrl-C; returns the exit code once every process of the demo is gone."""
        servers = self.servers()
        assert servers, "the demo runs no server"
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(60)
        _, survivors = psutil.wait_procs(servers, timeout=2)
        survivors = [p for p in survivors if p.status() != psutil.STATUS_ZOMBIE]
        for survivor in survivors:
            survivor.kill()
        assert not survivors
        return code


@contextmanager
def running_demo(model: Path, folder: Path, *options: str) -> Iterator[Demo]:
    """Starts the demo in `folder` and, should the test fail, ends what it started."""
    command = [sys.executable, "-u", str(EXAMPLES / "demo.py"), f"--model={model}"]
    printed_file = folder / "printed"
    with printed_file.open("w") as printed:
        process = psutil.Popen(
            [*command, "--budget=64", "--buffer=32", *options],
            cwd=folder,
            stdout=printed,
            stderr=printed,
        )
    try:
        yield Demo(process, printed_file)
    finally:
        if process.is_running():
            for leftover in [*process.children(recursive=True), process]:
                leftover.kill()
            process.wait()


def test_demo_shows_the_books_and_serves_others_until_ctrl_c(model, tmp_path):
    with running_demo(model, tmp_path, "--max-tokens=150", "--keep") as demo:
        demo.wait_for("goes on serving")
        url = re.search(r"serving at (\S+)", demo.printed).group(1)
        client_printed = run_example(
            "openai_client.py", f"--url={url}", "--max-tokens=150", "tell me a story"
        )
        assert demo.interrupt() == 0
    rows = re.findall(r"^ (\S.{15})((?: +\d+){8}) *$", demo.printed, re.MULTILINE)
    assert len(rows) == 6
    for _, numbers in rows:
        prompt, output, logical, physical, compactions, evicted, held, stock = map(
            int, numbers.split()
        )
        assert output == 150
        assert logical == prompt + output == physical + evicted
        assert compactions >= 2
        assert held < stock == -(-logical // 32)
    (in_demo,) = re.findall(r"^(\d+) compactions of 6 requests", demo.printed, re.MULTILINE)
    ((in_all, _),) = SUMMARY.findall(client_printed)
    # The client's prompt is shorter than the budget: due at 96 and at 128 tokens, maybe at 160.
    assert 2 <= int(in_all) - int(in_demo) <= 3
    assert len(SUMMARY.sub("", client_printed).strip()) > 150


@pytest.mark.nightly
def test_ctrl_c_during_a_chat_leaves_no_process_behind(model, tmp_path):
    with running_demo(model, tmp_path, "--max-tokens=3000") as demo:
        demo.wait_for("Tell me a long story")
        assert demo.interrupt() == 130


@pytest.mark.nightly
def test_ctrl_c_while_the_server_starts_leaves_no_process_behind(model, tmp_path):
    with running_demo(model, tmp_path) as demo:
        # The API server, multiprocessing's resource tracker, the engine that still imports.
        demo.wait_until(lambda: len(demo.servers()) >= 3)
        assert "serving at" not in demo.printed
        assert demo.interrupt() == 130


@pytest.mark.nightly
def test_demo_without_a_compaction_fails(model, tmp_path):
    with running_demo(model, tmp_path, "--max-tokens=3") as demo:
        assert demo.process.wait(WAIT_SECONDS) == 1
    assert "no compaction happened" in demo.printed


@pytest.mark.nightly
def test_demo_shows_the_log_of_a_server_that_does_not_come_up(model, tmp_path):
    with running_demo(model, tmp_path, "--buffer=4") as demo:
        assert demo.process.wait(WAIT_SECONDS) == 1
    assert "--kv-buffer" in demo.printed
    assert "vllm serve did not come up" in demo.printed
