"""A request that asks hears what was done to it, whatever becomes of it; others cost nothing."""

import json
from dataclasses import replace

import pytest

from rkv_vllm.scheduling.request_reports import RequestReports, logger
from tests.models import random_model
from tests.scheduling.simulation import Group, Setting, SimulatedEngine

STEPS_AHEAD = pytest.mark.parametrize("steps_ahead", [0, 1, 2])
SETTING = Setting(budget=8, buffer=4, window=2)
ASKS = {"kv_report": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model"))


class Listener:
    """What the clients of an engine get, in order, by request; and its log."""

    def __init__(self, engine: SimulatedEngine, log: list[str]) -> None:
        self.reports: dict[str, list[dict]] = {}
        self._log = log
        update = engine.scheduler.update_from_output

        def listening(*args):
            by_client = update(*args)
            for item in by_client[0].outputs if 0 in by_client else ():
                self.reports.setdefault(item.request_id, []).append(item.kv_transfer_params)
            return by_client

        engine.scheduler.update_from_output = listening

    def final(self, req_id: str) -> dict:
        return self.reports[req_id][-1]["kv_report"]

    def logged(self) -> dict[str, dict]:
        assert all(line.startswith("kv_report: ") for line in self._log)
        lines = [json.loads(line.removeprefix("kv_report: ")) for line in self._log]
        assert len({line["request_id"] for line in lines}) == len(lines), "one line a request"
        return {line["request_id"]: line for line in lines}


@pytest.fixture
def log(monkeypatch) -> list[str]:
    """The lines that the reports write."""
    lines: list[str] = []
    monkeypatch.setattr(logger, "info", lambda text, *args: lines.append(text % args))
    return lines


def done_to(engine: SimulatedEngine, req_id: str) -> tuple[int, int]:
    """Compactions and evicted tokens of a request, as the workers carried them out."""
    evicted = [d.num_evict for d in engine.worker.carried_out if d.req_id == req_id]
    return len(evicted), sum(evicted)


@STEPS_AHEAD
@pytest.mark.parametrize("groups", [(Group(),), (Group(layer_budget=8), Group(layer_budget=13))])
def test_a_report_is_what_the_workers_did_and_nobody_else_gets_one(model, log, steps_ahead, groups):
    engine = SimulatedEngine(model, replace(SETTING, steps_ahead=steps_ahead, groups=groups))
    listener = Listener(engine, log)
    engine.add("a", [1] * 5, 50, ASKS)
    engine.add("b", [2] * 9, 40)
    engine.add("whole", [3] * 9, 40, {**ASKS, "kv_compression": "off"})
    engine.run()
    compactions, evicted = done_to(engine, "a")
    assert compactions >= 8 * len(groups)
    assert listener.final("a") == {
        "request_id": "a",
        "compactions": compactions,
        "evicted_tokens": evicted,
        "kept_tokens": 5 + 50 - 1 - evicted // len(groups),
        "preemptions": 0,
    }
    assert listener.final("whole")["compactions"] == 0
    assert listener.final("whole")["kept_tokens"] == 9 + 40 - 1
    # A stop string ends a request in the API server, which answers with the output it has then.
    assert all(each["kv_report"]["request_id"] == "a" for each in listener.reports["a"])
    assert set(listener.reports["b"]) == {None}
    assert done_to(engine, "b")[0] >= 6 * len(groups)
    assert listener.logged().keys() == {"a", "whole"}
    assert listener.logged()["a"] == {**listener.final("a"), "finish_reason": "length"}
    assert not engine.scheduler._reports


@STEPS_AHEAD
@pytest.mark.parametrize("host_blocks", [0, 200])
def test_a_preempted_request_counts_on(model, log, steps_ahead, host_blocks):
    setting = replace(SETTING, steps_ahead=steps_ahead, host_blocks=host_blocks)
    for preempt_after in range(17, 23):
        log.clear()
        engine = SimulatedEngine(model, setting)
        listener = Listener(engine, log)
        engine.add("a", [1] * 5, 50, ASKS)
        for _ in range(preempt_after):
            engine.step()
        engine.preempt("a")
        engine.run()
        compactions, evicted = done_to(engine, "a")
        final = listener.final("a")
        assert (final["compactions"], final["evicted_tokens"]) == (compactions, evicted)
        assert final["preemptions"] == 1
        # What was evicted before the preemption came back with the text, unless it was swapped.
        last = engine.worker.carried_out[-1]
        missing = last.num_evicted_before + last.num_evict
        assert final["kept_tokens"] == 5 + 50 - 1 - missing
        assert (evicted == missing) == bool(host_blocks)
        assert listener.logged().keys() == {"a"}


@STEPS_AHEAD
def test_whoever_is_gone_is_in_the_log(model, log, steps_ahead):
    engine = SimulatedEngine(model, replace(SETTING, steps_ahead=steps_ahead))
    listener = Listener(engine, log)
    for req_id in ("running", "preempted", "stays"):
        engine.add(req_id, [1] * 5, 50, ASKS)
    for _ in range(30):
        engine.step()
    engine.preempt("preempted")
    engine.abort("preempted")
    engine.abort("running")
    engine.add("waiting", [1] * 5, 50, ASKS)
    engine.abort("waiting")
    engine.run()
    lines = listener.logged()
    assert {name: line["finish_reason"] for name, line in lines.items()} == {
        "running": "abort",
        "preempted": "abort",
        "waiting": "abort",
        "stays": "length",
    }
    for req_id, line in lines.items():
        assert (line["compactions"], line["evicted_tokens"]) == done_to(engine, req_id)
    assert lines["running"]["compactions"] >= 3
    assert 8 <= lines["running"]["kept_tokens"] <= 8 + 4 + 1 + steps_ahead
    assert lines["preempted"]["kept_tokens"] == lines["waiting"]["kept_tokens"] == 0
    assert "waiting" not in listener.reports
    assert not engine.scheduler._reports


def test_without_anybody_who_asks_nothing_is_counted(model, monkeypatch):
    def never(*_):
        raise AssertionError("somebody asked")

    for name in ("begin", "note_compactions", "attach", "_report"):
        monkeypatch.setattr(RequestReports, name, never)
    engine = SimulatedEngine(model, SETTING)
    engine.add("a", [1] * 5, 50, {"kv_report": 0})
    engine.add("b", [2] * 9, 40)
    engine.run()
    assert engine.worker.compactions >= 14
