"""What both runners do around a step: reports, the progress line, memory that vLLM must count."""

import logging
from collections import deque
from types import SimpleNamespace

import pytest
import torch

from rkv_vllm.worker import runner as runner_module
from rkv_vllm.worker.flush import SCRATCH_BYTES, Compactor
from rkv_vllm.worker.group import CompressedGroup
from rkv_vllm.worker.runner import CompressionRunner
from tests.worker.test_flush import directive, make_rkv, new_layer_set


class Base:
    """A model runner of vLLM."""

    def profile_run(self):
        self.profiled = True


class Runner(CompressionRunner, Base):
    _follow_physical_positions = _exchange_rows = None

    def __init__(self) -> None:
        group = CompressedGroup(0, 32, [new_layer_set()], make_rkv)
        self.compactor = Compactor({0: group}, 8)
        self.finished_reports = deque()
        self.cache_config = SimpleNamespace(block_size=32)
        self.device = torch.device("cpu")
        self._logged_at = 0.0
        self.live = ["a", "b"]

    def _live_ids(self):
        return self.live

    def _lengths(self, req_id):
        return 30, 11, 1


def output(finished=()):
    return SimpleNamespace(
        finished_req_ids=set(finished),
        scheduled_new_reqs=[],
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=[]),
    )


def test_requests_that_vllm_warms_up_with_are_not_reported():
    runner = Runner()
    runner.live = ["_warmup_0_"]
    runner._admit_and_forget(output(["_warmup_0_"]), is_warm_up=True)
    assert not runner.finished_reports
    runner.live = ["a"]
    runner.compactor.groups[0].note(directive("a"))
    runner._admit_and_forget(output(["a"]), is_warm_up=False)
    (report,) = runner.finished_reports
    assert (report["req_id"], report["logical_len"], report["physical_len"]) == ("a", 41, 21)
    assert runner.compactor.groups[0].num_evicted("a") == 0


@pytest.mark.parametrize(
    ("is_first_tp", "is_last_pp"), [(True, True), (True, False), (False, True)]
)
def test_one_rank_logs_the_progress_of_all(monkeypatch, caplog, is_first_tp, is_last_pp):
    monkeypatch.setattr(
        runner_module, "get_tp_group", lambda: SimpleNamespace(is_first_rank=is_first_tp)
    )
    monkeypatch.setattr(
        runner_module, "get_pp_group", lambda: SimpleNamespace(is_last_rank=is_last_pp)
    )
    runner = Runner()
    runner.compactor.groups[0].note(directive("a"))
    with caplog.at_level(logging.INFO, "vllm"):
        runner._log_progress()
        runner._log_progress()
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("KV compression:")]
    assert len(lines) == (is_first_tp and is_last_pp)
    assert all(line.endswith("2 requests hold 62 of 82 tokens") for line in lines)


def test_the_temporaries_of_a_flush_are_allocated_where_vllm_measures_the_peak(monkeypatch):
    allocated = []
    empty = torch.empty

    def noting(size, **kwargs):
        allocated.append((size, kwargs["dtype"].itemsize))
        return empty(0)

    runner = Runner()
    monkeypatch.setattr(torch, "empty", noting)
    runner.profile_run()
    assert runner.profiled
    assert allocated == [(SCRATCH_BYTES, 1)]
