"""What an engine step did arrives at the API server whole, and vLLM's own loggers do not see it."""

import logging

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics import loggers
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from rkv_vllm.scheduling.directive import EvictionDirective, StepPlan
from rkv_vllm.scheduling.step_stats import StepStats
from tests.checkpoint_configs import LLAMA, write_config
from tests.scheduling.simulation import BLOCK_SIZE, MAX_MODEL_LEN, Setting, SimulatedEngine

# The least that vLLM takes: one request of the maximal length.
SMALL_POOL = MAX_MODEL_LEN // BLOCK_SIZE + 2
STEP = StepStats(
    evicted_tokens=[33, 70],
    freed_blocks=3,
    deferred_for_seat=2,
    deferred_for_blocks=1,
    looping_requests=4,
    logical_tokens=900,
    physical_tokens=700,
    seats_in_use=5,
    swapped_out=3,
    swapped_in=2,
    recomputed={"space": 1},
    swap_bytes=4096,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_config(tmp_path_factory.mktemp("llama"), LLAMA)


def test_message_survives_vllms_own_encoding():
    sent = SchedulerStats(num_running_reqs=7, num_kv_fetch_reqs_by_stage={"in_progress": 4})
    STEP.attach_to(sent)
    frames = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=sent))
    received = MsgpackDecoder(EngineCoreOutputs).decode(frames).scheduler_stats
    assert StepStats.take_from(received) == STEP
    assert received == SchedulerStats(
        num_running_reqs=7, num_kv_fetch_reqs_by_stage={"in_progress": 4}
    )
    assert StepStats.take_from(received) is None


def test_stats_of_others_hold_no_message():
    stats = SchedulerStats(num_kv_fetch_reqs_by_stage={"in_progress": 4, "waiting_to_start": 0})
    assert StepStats.take_from(stats) is None
    assert stats.num_kv_fetch_reqs_by_stage == {"in_progress": 4, "waiting_to_start": 0}


@pytest.mark.parametrize("aggregated", [False, True])
def test_vllms_log_line_does_not_show_a_message_that_nobody_took(model, caplog, aggregated):
    config = EngineArgs(model=model, skip_tokenizer_init=True).create_engine_config()
    lines = []
    for with_message in (False, True):
        stats = SchedulerStats(num_running_reqs=3)
        if with_message:
            STEP.attach_to(stats)
        if aggregated:
            stat_logger = loggers.AggregatedLoggingStatLogger(config, [0])
        else:
            stat_logger = loggers.LoggingStatLogger(config)
        stat_logger.record(stats, None)
        caplog.clear()
        with (
            caplog.at_level(logging.DEBUG, "vllm.v1.metrics.loggers"),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr(loggers.logger, "propagate", True)
            patch.setattr(logging.getLogger("vllm"), "propagate", True)
            stat_logger.log()
        lines.append([record.getMessage() for record in caplog.records])
    assert "Running: 3 reqs" in lines[0][0]
    assert lines[0] == lines[1]


def directive(num_evict: int, num_freed: int) -> EvictionDirective:
    return EvictionDirective(
        req_id="a",
        group_id=0,
        num_evicted_before=0,
        prefix_len=0,
        settled_len=50,
        total_len=50,
        num_evict=num_evict,
        seat=0,
        prompt_len=9,
        seed=0,
        method_options=None,
        old_block_ids=list(range(9)),
        new_block_ids=list(range(9 - num_freed)),
    )


def test_plans_add_up():
    step = StepStats()
    step.add_waits(StepPlan(num_waiting_for_seat=2, num_waiting_for_blocks=1))
    step.add_waits(StepPlan(num_waiting_for_seat=1))
    step.add_compactions([directive(20, 2), directive(9, 0)])
    step.add_compactions([directive(7, 1)])
    assert step == StepStats(
        [20, 9, 7], 3, deferred_for_seat=3, deferred_for_blocks=1, reasons={"buffer": 3}
    )


class Onlooker:
    """Receives what the scheduler of a simulated engine reports, and checks its gauges."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self.steps: list[StepStats] = []
        self.short_of_blocks = 0
        self._engine = engine
        self._update = engine.scheduler.update_from_output
        engine.scheduler.update_from_output = self._update_from_output

    def _update_from_output(self, output, result):
        outputs = self._update(output, result)
        (stats,) = [o.scheduler_stats for o in outputs.values() if o.scheduler_stats is not None]
        step = StepStats.take_from(stats)
        running = self._engine.scheduler.running
        (track,) = self._engine.tracks.values()
        assert step.logical_tokens == sum(r.num_computed_tokens for r in running)
        assert step.physical_tokens == sum(
            r.num_computed_tokens - track.books.num_evicted.get(r.request_id, 0) for r in running
        )
        seats = {progress.seat for progress in track.planner._progress.values()} - {None}
        assert step.seats_in_use == len(seats)
        self.steps.append(step)
        return outputs


SEEN = {"seat": 0, "preempted": 0, "compactions": 0, "skipped": 0}


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def run_and_compare(model, data):
    setting = Setting(
        seats=data.draw(st.sampled_from([1, 2, 64])),
        num_blocks=data.draw(st.sampled_from([SMALL_POOL, 1000])),
        steps_ahead=data.draw(st.sampled_from([0, 1])),
    )
    engine = SimulatedEngine(model, setting, data.draw(st.integers(0, 99)))
    onlooker = Onlooker(engine)
    shared = list(range(data.draw(st.sampled_from([0, 12]))))
    for i in range(data.draw(st.integers(1, 12))):
        engine.add(f"{i}", [*shared, *range(50 + i, 55 + 2 * i)], data.draw(st.integers(1, 60)))
    for _ in range(data.draw(st.integers(0, 20))):
        engine.step()
    if data.draw(st.booleans()):
        engine.preempt_all()
    if "0" not in engine.finished and data.draw(st.booleans()):
        engine.abort("0")
    engine.run()
    engine.worker.flush()

    evicted = [tokens for step in onlooker.steps for tokens in step.evicted_tokens]
    carried_out = engine.worker.carried_out
    assert evicted == [d.num_evict for d in carried_out]
    freed = sum(step.freed_blocks for step in onlooker.steps)
    assert freed == sum(d.num_freed_blocks for d in carried_out)
    SEEN["skipped"] += engine.worker.skipped
    for_seat = sum(step.deferred_for_seat for step in onlooker.steps)
    for_blocks = sum(step.deferred_for_blocks for step in onlooker.steps)
    assert for_seat + for_blocks == engine.num_deferred
    if setting.num_blocks == 1000:
        assert for_blocks == 0
    if setting.seats == 64:
        assert for_seat == 0
    SEEN["seat"] += for_seat
    SEEN["compactions"] += len(evicted)
    SEEN["preempted"] += engine.worker.resumes
    last = onlooker.steps[-1]
    assert last.logical_tokens == last.physical_tokens == last.seats_in_use == 0


def test_reports_add_up_to_what_the_worker_did(model):
    run_and_compare(model)
    assert SEEN["compactions"] > 100, SEEN
    assert SEEN.pop("skipped") > 2, SEEN
    assert min(SEEN.values()) > 10, SEEN


def test_waiting_for_blocks_is_told_from_waiting_for_a_seat(model):
    engine = SimulatedEngine(model, Setting(budget=8, buffer=4, window=2, num_blocks=SMALL_POOL))
    onlooker = Onlooker(engine)
    for name in ("owner", "sharer"):
        engine.add(name, [9] * 16 + [len(name)], 60)
    while not engine.num_seats_in_use:
        engine.step()
    # Room for the next tokens, not for private copies of the two shared blocks.
    held = engine.pool.get_new_blocks(engine.pool.get_num_free_blocks() - 2)
    engine.allow_foreign_blocks = True
    for _ in range(6):
        engine.step()
    assert sum(step.deferred_for_blocks for step in onlooker.steps) == engine.num_deferred >= 1
    assert sum(step.deferred_for_seat for step in onlooker.steps) == 0
    engine.pool.free_blocks(reversed(held))
    engine.allow_foreign_blocks = False
    engine.run()


def test_a_compaction_that_nobody_is_left_to_carry_out_for_is_not_reported(model):
    # Due when 12 tokens are settled: 4 of the prompt, 9 sampled, of which the last is not computed.
    engine = SimulatedEngine(model, Setting(budget=8, buffer=4))
    onlooker = Onlooker(engine)
    engine.add("a", list(range(4)), 10)
    engine.run()
    assert len(engine.directives) == engine.worker.skipped == 1
    assert not any(step.evicted_tokens for step in onlooker.steps)
    assert len(engine.outputs["a"]) == 10


def test_without_statistics_nothing_is_collected(model):
    engine = SimulatedEngine(model, Setting())
    engine.scheduler.log_stats = False
    engine.add("a", list(range(5)), 40)
    engine.run()
    assert engine.worker.compactions > 3
    assert engine.scheduler.make_stats() is None
    assert engine.scheduler._step_stats == StepStats()
