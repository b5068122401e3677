"""Children end with their whole group, whatever happens."""

import os
import signal
import sys
import threading
import time
from contextlib import nullcontext

import psutil
import pytest

from rkv_vllm.bench.processes import (
    ChildError,
    InterruptedBySignal,
    child_environment,
    ended_by_signals,
    process_group,
)

# A child with a child of its own, which ignores the polite signal.
FAMILY = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
time.sleep(600)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(1, flush=True)
time.sleep(600)
"""
COMMAND = (sys.executable, "-c", FAMILY, STUBBORN)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("rkv_vllm.bench.processes.STOP_SECONDS", 0.5)


def wait_for_grandchild(process, log):
    deadline = time.monotonic() + 30
    while log.read_text() != "1\n":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [process.pid, *(child.pid for child in psutil.Process(process.pid).children())]


def is_alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_whole_group_is_gone_after_the_block(tmp_path, error):
    log = tmp_path / "log"
    pids = []

    def run() -> None:
        with process_group(COMMAND, log, os.environ) as process:
            pids.extend(wait_for_grandchild(process, log))
            if error is not None:
                raise error

    with nullcontext() if error is None else pytest.raises(error):
        run()
    assert len(pids) == 2
    assert not any(map(is_alive, pids))


ENDING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT]


@pytest.fixture
def at_default(request):
    """The signal with its default action, also where the tests run under nohup."""
    before = signal.signal(request.param, signal.SIG_DFL)
    yield request.param
    signal.signal(request.param, before)


@pytest.mark.parametrize("at_default", ENDING, indirect=True)
def test_signals_interrupt_and_give_the_exit_code_of_shells(at_default):
    def run() -> None:
        with ended_by_signals():
            os.kill(os.getpid(), at_default)
            time.sleep(5)

    with pytest.raises(InterruptedBySignal) as caught:
        run()
    assert caught.value.exit_code == 128 + at_default
    assert signal.getsignal(at_default) is signal.SIG_DFL


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
    except InterruptedBySignal:
        pytest.fail("SIGHUP interrupted")
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_while_children_end_acts_when_they_have(tmp_path, monkeypatch):
    log = tmp_path / "log"
    # The grandchild makes the end of the group take that long.
    monkeypatch.setattr("rkv_vllm.bench.processes.STOP_SECONDS", 1.5)
    pids = []

    def run() -> None:
        with ended_by_signals():
            with process_group(COMMAND, log, os.environ) as process:
                pids.extend(wait_for_grandchild(process, log))
                threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            pytest.fail("the signal was lost")

    with pytest.raises(InterruptedBySignal):
        run()
    assert len(pids) == 2
    assert not any(map(is_alive, pids))


@pytest.mark.parametrize(
    ("exported", "unproxied"),
    [
        ({}, "127.0.0.1"),
        ({"NO_PROXY": "a.org"}, "a.org,127.0.0.1"),
        # As for everybody who reads both, the small letters win.
        ({"NO_PROXY": "a.org", "no_proxy": "b.org"}, "b.org,127.0.0.1"),
        ({"no_proxy": "*"}, "*"),
    ],
)
def test_children_reach_the_server_without_a_proxy(monkeypatch, exported, unproxied):
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    for name, value in exported.items():
        monkeypatch.setenv(name, value)
    environment = child_environment()
    assert (environment["NO_PROXY"], environment["no_proxy"]) == (unproxied, unproxied)


def test_children_are_offline_whatever_is_exported(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert child_environment()["HF_HUB_OFFLINE"] == "1"


def test_an_error_carries_the_end_of_the_log(tmp_path):
    log = tmp_path / "log"
    log.write_text("".join(f"line {i}\n" for i in range(100)))
    assert ChildError("problem", log).log_tail == [f"line {i}" for i in range(70, 100)]
