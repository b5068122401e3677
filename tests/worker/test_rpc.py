"""Sleep: what is pending is carried out before, nobody is watched after."""

import pytest
import torch

from rkv_vllm.worker.lengths import GroupRows
from rkv_vllm.worker.query_ring import RingMemory
from rkv_vllm.worker.rpc import CompressionRPC
from rkv_vllm.worker.runner import CompressionRunner


class Worker:
    """vLLM's, as far as sleep goes."""

    def __init__(self, calls) -> None:
        self.calls = calls

    def sleep(self, level=1):
        self.calls.append(("sleep", level))

    def wake_up(self, tags=None):
        self.calls.append(("wake_up", tags))


class SleepyWorker(CompressionRPC, Worker):
    pass


class Runner(CompressionRunner):
    _follow_physical_positions = _exchange_rows = _live_ids = _lengths = None

    def __init__(self, calls) -> None:
        self.calls = calls
        self.rows = {0: GroupRows(2, 8, 9, torch.device("cpu"))}
        self._ring_memory = RingMemory(1, 9, 2, torch.float32, torch.device("cpu"))

    def flush_compaction(self, gone=()):
        self.calls.append(("flush", gone))


def new_worker() -> SleepyWorker:
    worker = SleepyWorker(calls := [])
    worker.model_runner = Runner(calls)
    return worker


def test_pending_compactions_are_carried_out_while_there_is_a_cache():
    worker = new_worker()
    worker.sleep(2)
    assert worker.calls == [("flush", ()), ("sleep", 2)]


@pytest.mark.parametrize(
    ("tags", "forgets"), [(None, True), (["weights"], True), (["kv_cache"], False)]
)
def test_after_a_deep_sleep_no_token_is_recorded_anywhere(tags, forgets):
    """Level 2 discards what was allocated with the model; a dummy batch may come first."""
    worker = new_worker()
    runner = worker.model_runner
    runner.rows[0].token_rows.fill_(2**30)
    runner._ring_memory.elements.fill_(torch.nan)
    worker.wake_up(tags)
    assert worker.calls == [("wake_up", tags)]
    assert (runner.rows[0].token_rows == -1).all() == forgets
    assert (runner._ring_memory.elements == 0).all() == forgets
