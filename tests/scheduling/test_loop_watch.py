"""A compacted request that runs into a loop is counted once, whatever else happens to it."""

from random import Random

import pytest

from rkv_vllm.scheduling import loop_watch
from rkv_vllm.scheduling.loop_watch import SECONDS_BETWEEN_LINES, LoopWatch
from rkv_vllm.scheduling.repetition import MIN_TOKENS
from rkv_vllm.scheduling.step_stats import StepStats
from tests.checkpoint_configs import LLAMA, write_config
from tests.scheduling.simulation import Group, Setting, SimulatedEngine

STEPS_AHEAD = pytest.mark.parametrize("steps_ahead", [0, 1])
PROMPT = [*range(9)]
# Of a request that repeats itself long enough to be found, and not once more.
MAX_TOKENS = MIN_TOKENS + 40
LOOP = [3, 1, 4] * MIN_TOKENS
TEXT = [*range(900)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_config(tmp_path_factory.mktemp("llama"), LLAMA)


@pytest.fixture
def lines(monkeypatch) -> list[str]:
    """What the watch has logged, as it grows."""
    said: list[str] = []
    monkeypatch.setattr(loop_watch.logger, "info", lambda text, *args: said.append(text % args))
    return said


class Monotone(Random):
    """Draws what makes a text repeat itself, and accepts no draft."""

    def randrange(self, *_) -> int:
        return 7

    def randint(self, low: int, _: int) -> int:
        return low


class LoopingEngine(SimulatedEngine):
    """Samples one token again and again for the requests in `loops`, and counts what is reported.

    Attributes:
        loops: ids, from which output token on.
        counted: requests in a loop so far.
    """

    def __init__(self, model, setting: Setting, **loops: int) -> None:
        super().__init__(model, setting)
        self.loops = loops
        self.counted = 0
        update = self.scheduler.update_from_output

        def counting(*args):
            outputs = update(*args)
            (stats,) = [o.scheduler_stats for o in outputs.values() if o.scheduler_stats]
            self.counted += StepStats.take_from(stats).looping_requests
            return outputs

        self.scheduler.update_from_output = counting

    def num_compactions(self, req_id: str) -> int:
        return sum(d.req_id == req_id for d in self.worker.carried_out)

    def step_until(self, req_id: str, num_tokens: int) -> None:
        while len(self.outputs[req_id]) < num_tokens:
            self.step()

    def _sample(self, req_id: str) -> list[int]:
        varied = self.random
        if len(self.outputs[req_id]) >= self.loops.get(req_id, 1000):
            self.random = Monotone()
        try:
            return super()._sample(req_id)
        finally:
            self.random = varied


@STEPS_AHEAD
@pytest.mark.parametrize("groups", [(Group(),), (Group(), Group(layer_budget=12))])
def test_requests_in_a_loop_are_counted_once_and_others_are_not(model, lines, steps_ahead, groups):
    engine = LoopingEngine(
        model, Setting(steps_ahead=steps_ahead, groups=groups), loop=0, late=20, off=0, kept=0
    )
    engine.add("loop", PROMPT, MAX_TOKENS + 50)
    engine.add("late", PROMPT, MAX_TOKENS + 50)
    engine.add("varied", PROMPT, MAX_TOKENS + 50)
    engine.add("off", PROMPT, MAX_TOKENS, {"kv_compression": "off"})
    engine.add("kept", PROMPT, MAX_TOKENS, {"kv_budget": 200})
    engine.run()
    compactions = {req_id: engine.num_compactions(req_id) for req_id in engine.outputs}
    assert min(compactions[req_id] for req_id in ("loop", "late", "varied")) > 40
    assert compactions["off"] == compactions["kept"] == 0
    assert engine.counted == 2
    assert len(lines) == 1
    assert lines[0].startswith("request loop ")
    engine.assert_nothing_is_left()


@STEPS_AHEAD
def test_a_loop_that_began_before_anything_was_evicted_is_not_counted(model, steps_ahead):
    engine = LoopingEngine(model, Setting(steps_ahead=steps_ahead), loop=0)
    engine.add("loop", PROMPT, 220, {"kv_budget": 150})
    engine.run()
    assert engine.num_compactions("loop") > 10
    assert engine.counted == 0


@STEPS_AHEAD
@pytest.mark.parametrize("is_aborted", [False, True])
def test_a_loop_between_the_last_compaction_and_the_end_is_counted(model, steps_ahead, is_aborted):
    engine = LoopingEngine(model, Setting(steps_ahead=steps_ahead), loop=0)
    engine.add("loop", PROMPT, MAX_TOKENS, {"kv_buffer": 120})
    engine.add("other", PROMPT, 200)
    engine.step_until("loop", MAX_TOKENS - 1)
    assert engine.num_compactions("loop") == 1
    assert engine.counted == 0
    if is_aborted:
        engine.abort("loop")
    engine.run()
    assert engine.num_compactions("loop") == 1
    assert engine.counted == 1
    engine.assert_nothing_is_left()


def test_whose_first_compaction_is_not_carried_out_is_not_counted(model):
    # The last token makes it a loop, and its compaction is due with the step that samples it.
    engine = LoopingEngine(model, Setting(), loop=MAX_TOKENS - MIN_TOKENS)
    engine.add("loop", PROMPT, MAX_TOKENS, {"kv_buffer": MAX_TOKENS - 2})
    engine.run()
    assert [d.req_id for d in engine.directives] == ["loop"]
    assert engine.num_compactions("loop") == 0
    assert engine.counted == 0
    engine.assert_nothing_is_left()


@STEPS_AHEAD
def test_preemption_neither_counts_again_nor_forgets_the_compaction(model, steps_ahead):
    engine = LoopingEngine(model, Setting(steps_ahead=steps_ahead), counted=0, loop=60)
    engine.add("counted", PROMPT, 220)
    engine.add("loop", PROMPT, 240, {"kv_buffer": 50})
    # Its next compaction will notice.
    engine.step_until("loop", 60 + MIN_TOKENS - 20)
    before = [engine.num_compactions(req_id) for req_id in ("counted", "loop")]
    assert min(before) > 1
    assert engine.counted == 1
    engine.preempt_all()
    engine.run()
    assert engine.worker.resumes == 2
    assert engine.num_compactions("counted") > before[0]
    assert engine.counted == 2
    engine.assert_nothing_is_left()


def test_who_leaves_a_loop_and_enters_another_counts_once():
    watch = LoopWatch()
    said: list[int] = []
    found = []
    for piece in (TEXT, LOOP, TEXT, [5] * MIN_TOKENS, TEXT):
        said += piece
        found.append(watch.note_compaction("a", said))
    assert found == [False, True, False, False, False]
    assert not watch.note_end("a", said + LOOP)
    # The id of a request that ended may come again.
    assert not watch.note_end("a", LOOP)
    assert not watch.note_compaction("a", TEXT)
    assert watch.note_end("a", LOOP)


def test_log_names_the_request_and_the_cure_and_does_not_flood(lines, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(loop_watch.time, "monotonic", lambda: now)
    watch = LoopWatch()
    for i in range(5):
        watch.note_compaction(f"r{i}", TEXT)
        assert watch.note_compaction(f"r{i}", LOOP)
        assert not watch.note_compaction(f"r{i}", LOOP)
    (line,) = lines
    assert line.startswith("request r0 began to repeat itself after its KV cache was compacted; ")
    for cure in ("--kv-budget", "kv_budget", "--kv-protect prompt", "kv_protect"):
        assert cure in line
    now += SECONDS_BETWEEN_LINES
    for req_id in ("late", "later"):
        watch.note_compaction(req_id, TEXT)
        assert watch.note_end(req_id, LOOP)
    assert len(lines) == 2
    assert "request late" in lines[1]
    assert "as did 4 more since the last such line" in lines[1]
