"""What becomes of the results of finished runs when a later one goes wrong."""

import pytest

from rkv_vllm.bench import session
from rkv_vllm.bench.processes import ChildError
from rkv_vllm.bench.session import run_all
from rkv_vllm.bench.sides import make_schedule
from tests.bench.results import SIDES, new_workload


def run_with(monkeypatch, second_run):
    """Two runs, the second by this function; returns the results and the error."""
    results = []

    def execute(workload, side, engine_flags, folder, show):
        (folder / "offline.log").write_text(f"log of {side.name}")
        return {"tokens_per_s": 1.0} if not results else second_run(folder)

    monkeypatch.setitem(session.RUNNERS, "offline", execute)
    with pytest.raises(ChildError) as caught:
        run_all(new_workload(), make_schedule(("offline",), SIDES, 1), (), results)
    return results, caught.value


@pytest.mark.parametrize(
    ("second_run", "reason"),
    [
        (lambda folder: {}["p50_ttft_ms"], "KeyError: 'p50_ttft_ms'"),
        (lambda folder: (folder / "result.json").read_text(), "FileNotFoundError: "),
        (lambda folder: {"tokens_per_s": float("nan")}, "ValueError: "),
    ],
)
def test_an_error_of_one_run_leaves_the_others(monkeypatch, second_run, reason):
    results, error = run_with(monkeypatch, second_run)
    assert [result["side"] for result in results] == ["budget 64"]
    assert f"stock, offline: {reason}" in str(error)
    assert error.log_tail == ["log of stock"]


def test_of_several_logs_the_clients_is_shown(monkeypatch):
    def second_run(folder):
        (folder / "server.log").write_text("served")
        (folder / "client.log").write_text("asked")
        raise OSError("No space left on device")

    _, error = run_with(monkeypatch, second_run)
    assert error.log_tail == ["asked"]


def test_without_a_folder_there_is_no_log(monkeypatch):
    def no_space(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("tempfile.TemporaryDirectory", no_space)
    with pytest.raises(ChildError, match="No space left") as caught:
        run_all(new_workload(), make_schedule(("offline",), SIDES, 1), (), [])
    assert caught.value.log_tail == []
