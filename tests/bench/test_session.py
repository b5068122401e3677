"""What becomes of the results of finished runs when a later one goes wrong."""

import pytest

from rkv_vllm.bench import session
from rkv_vllm.bench.checks import Measured
from rkv_vllm.bench.processes import ChildError
from rkv_vllm.bench.session import run_all
from rkv_vllm.bench.sides import Side, make_schedule
from tests.bench.results import SIDES, new_workload


def run_with(monkeypatch, second_run):
    """Two runs, the second by this function; returns the results and the error."""
    measured = Measured()

    def execute(workload, side, engine_flags, folder, show):
        (folder / "offline.log").write_text(f"log of {side.name}")
        return {"tokens_per_s": 1.0} if not measured.results else second_run(folder)

    monkeypatch.setitem(session.RUNNERS, "offline", execute)
    with pytest.raises(ChildError) as caught:
        run_all(new_workload(), make_schedule(("offline",), SIDES, 1), (), measured)
    return measured.results, caught.value


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


FP8_SIDE = Side(None, (), "fp8", may_refuse=True)


def run_with_baseline(monkeypatch, fails):
    """Three runs of stock and of a baseline that fails in these of its runs, counted from 1."""
    measured, started = Measured(), []

    def execute(workload, side, engine_flags, folder, show):
        started.append(side.name)
        if side is FP8_SIDE and started.count(side.name) in fails:
            log = folder / "offline.log"
            log.write_text(
                "INFO Loading\nERROR [core.py] ValueError: no fp8 here\nRuntimeError: see above\n"
            )
            raise ChildError("stock, fp8: the process ended with exit code 1", log)
        return {"tokens_per_s": 1.0}

    monkeypatch.setitem(session.RUNNERS, "offline", execute)
    schedule = make_schedule(("offline",), (SIDES[0], FP8_SIDE), 3)
    return measured, started, lambda: run_all(new_workload(), schedule, (), measured)


def test_a_baseline_that_does_not_start_is_reported_with_its_reason(monkeypatch):
    measured, started, go = run_with_baseline(monkeypatch, fails={1, 2, 3})
    go()
    assert measured.refusals == {("offline", "stock, fp8"): "ValueError: no fp8 here"}
    assert started == ["stock, fp8", "stock", "stock", "stock"]
    assert [result["side"] for result in measured.results] == ["stock"] * 3


def test_a_baseline_that_worked_once_must_work_again(monkeypatch):
    measured, _, go = run_with_baseline(monkeypatch, fails={2})
    with pytest.raises(ChildError, match="exit code 1"):
        go()
    assert measured.refusals == {}
    assert [result["side"] for result in measured.results] == ["stock, fp8", "stock", "stock"]


def test_the_reason_without_a_python_error_is_the_problem(tmp_path):
    (tmp_path / "log").write_text("killed\n")
    assert ChildError("it ended", tmp_path / "log").reason == "it ended"


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
        run_all(new_workload(), make_schedule(("offline",), SIDES, 1), (), Measured())
    assert caught.value.log_tail == []
