"""The examples and the demo do what they promise, and the demo cleans up behind itself."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SUMMARY = re.compile(r"^(\d+) compactions evicted (\d+) tokens$", re.MULTILINE)
WAIT_SECONDS = 200


@pytest.fixture(scope="module")
def model(random_model_dir) -> Path:
    return random_model_dir("qwen3", 3)


def run_example(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def test_offline_batch_compacts_every_prompt(model):
    options = ["--budget=64", "--buffer=32", "--max-tokens=200"]
    printed = run_example("offline_batch.py", f"--model={model}", *options)
    # Three prompts shorter than the budget: due at 96 tokens and every 32 later, up to 200.
    assert SUMMARY.findall(printed) == [(str(3 * 4), str(3 * 4 * 32))]


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


def test_ctrl_c_during_a_chat_leaves_no_process_behind(model, tmp_path):
    with running_demo(model, tmp_path, "--max-tokens=3000") as demo:
        demo.wait_for("Tell me a long story")
        assert demo.interrupt() == 130


def test_ctrl_c_while_the_server_starts_leaves_no_process_behind(model, tmp_path):
    with running_demo(model, tmp_path) as demo:
        # The API server, multiprocessing's resource tracker, the engine that still imports.
        demo.wait_until(lambda: len(demo.servers()) >= 3)
        assert "serving at" not in demo.printed
        assert demo.interrupt() == 130


def test_demo_without_a_compaction_fails(model, tmp_path):
    with running_demo(model, tmp_path, "--max-tokens=3") as demo:
        assert demo.process.wait(WAIT_SECONDS) == 1
    assert "no compaction happened" in demo.printed


def test_demo_shows_the_log_of_a_server_that_does_not_come_up(model, tmp_path):
    with running_demo(model, tmp_path, "--buffer=4") as demo:
        assert demo.process.wait(WAIT_SECONDS) == 1
    assert "--kv-buffer" in demo.printed
    assert "vllm serve did not come up" in demo.printed
