"""Public failures of eviction engines, and of vLLM under pressure, on the simulated worker.

Lengths are those of the report where blocks of 4 tokens allow it, else a quarter of them. What each
report said went wrong is in docs/tests.md; engines re-enact it in tests/test_bugs_of_ports.py and
tests/test_bugs_of_vllm.py.
"""

import pytest
from vllm import SamplingParams
from vllm.v1.request import Request

from tests.models import random_model
from tests.scheduling.simulation import (
    BLOCK_SIZE,
    MAX_BLOCK_SIZE,
    Setting,
    SimulatedEngine,
)

STEPS_AHEAD = pytest.mark.parametrize("steps_ahead", [0, 1, 2])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model"))


def poison(engine: SimulatedEngine) -> int:
    """Empty the cells of all blocks that no row holds: whoever reads one fails.

    Returns:
        Cells emptied.
    """
    worker, pool = engine.worker, engine.pool
    held = {i for request in worker.requests.values() for row in request.block_ids for i in row}
    held |= {i for directive in worker.pending for i in directive.new_block_ids}
    for block in pool.blocks:
        if block.ref_cnt or block.block_hash is not None:
            held.add(block.block_id)
    dead = [cell for cell in worker.cells if cell // MAX_BLOCK_SIZE not in held]
    for cell in dead:
        del worker.cells[cell]
    return len(dead)


def run_poisoned(engine: SimulatedEngine) -> int:
    """Run to the end with poison after every step; returns the cells emptied."""
    emptied = 0
    while engine.scheduler.has_requests():
        engine.step()
        emptied += poison(engine)
    engine.drain()
    return emptied


def assert_all_said(engine: SimulatedEngine, wanted: dict[str, int]) -> None:
    """Everybody said all he asked for, and left nothing behind."""
    assert {req_id: len(engine.outputs[req_id]) for req_id in wanted} == wanted
    assert engine.pool.get_num_free_blocks() == engine.setting.num_blocks - 1
    engine.assert_nothing_is_left()


@STEPS_AHEAD
@pytest.mark.parametrize(("budget", "buffer"), [(16, 4), (20, 4), (18, 6)])
def test_the_token_in_flight_is_never_in_a_freed_block(model, steps_ahead, budget, buffer):
    """Each event left one garbage vector behind: the step's token lay in a freed block.

    https://github.com/SalesforceAIResearch/Random-Attention scripts/vllm_rp_bench, 1.
    """
    setting = Setting(
        budget=budget, buffer=buffer, prefix_caching=False, steps_ahead=steps_ahead, num_blocks=120
    )
    engine = SimulatedEngine(model, setting)
    wanted = {f"r{i}": 100 for i in range(4)}
    for number, req_id in enumerate(wanted):
        engine.add(req_id, [number] * 5, 100)
    assert run_poisoned(engine) > 0
    assert_all_said(engine, wanted)
    assert engine.worker.compactions >= 4 * 13
    for req_id in wanted:
        lengths = [directive.settled_logical_len for directive in engine.directives_of(req_id)]
        assert lengths == list(range(budget + buffer, lengths[-1] + 1, buffer))
    # Those in flight are kept beside the budget, and have a block.
    in_flight = {d.total_len - d.settled_len for d in engine.directives}
    assert in_flight == {1 + steps_ahead}
    for directive in engine.directives:
        kept = budget + 1 + steps_ahead
        assert len(directive.new_block_ids) == -(-kept // BLOCK_SIZE)


@STEPS_AHEAD
def test_the_block_of_a_boundary_is_there_in_the_step_that_writes_it(model, steps_ahead):
    """A count advanced ahead made each allocation late by 1 + the depth of the queue.

    https://github.com/SalesforceAIResearch/Random-Attention scripts/vllm_rp_bench, 2.
    """
    setting = Setting(budget=64, buffer=16, prefix_caching=False, steps_ahead=steps_ahead)
    engine = SimulatedEngine(model, setting)
    budgets = {f"budget-{budget}": budget for budget in (63, 64, 65, 79, 80)}
    for number, (req_id, budget) in enumerate(budgets.items()):
        engine.add(req_id, [number] * 20, 200, {"kv_budget": budget})
    slots = []
    slot_of = engine.worker.slot

    def noting(block_ids: list[int], physical: int, block_size: int = BLOCK_SIZE) -> int:
        # A late allocation ends in an IndexError, the null block in an assertion.
        slots.append(slot_of(block_ids, physical, block_size))
        return slots[-1]

    engine.worker.slot = noting
    run_poisoned(engine)
    assert_all_said(engine, dict.fromkeys(budgets, 200))
    assert len(slots) > 5 * 200 * 60
    assert not [slot for slot in slots if slot < MAX_BLOCK_SIZE], "slots in block 0"
    for req_id, budget in budgets.items():
        last_settled = 20 + 200 - 2 - steps_ahead
        assert len(engine.directives_of(req_id)) == (last_settled - budget) // 16


def abort(engine: SimulatedEngine) -> None:
    engine.abort("due")


def preempt(engine: SimulatedEngine) -> None:
    engine.preempt("due")


@STEPS_AHEAD
@pytest.mark.parametrize("prompt_len", [15, 16, 17, 24])
@pytest.mark.parametrize("event", [abort, preempt])
def test_whoever_leaves_in_the_step_of_his_compaction_harms_nobody(
    model, steps_ahead, prompt_len, event
):
    """An event past the queue's drain, and a prompt as long as the budget, ended the engine.

    https://github.com/SalesforceAIResearch/Random-Attention scripts/vllm_rp_bench, 3 and 4.
    """
    setting = Setting(
        budget=16, buffer=4, prefix_caching=False, steps_ahead=steps_ahead, num_blocks=40
    )
    engine = SimulatedEngine(model, setting)
    engine.add("due", [1] * prompt_len, 60)
    engine.add("beside", [2] * prompt_len, 60)
    while not engine.last_plan or "due" not in {d.req_id for d in engine.last_plan.directives}:
        engine.step()
    event(engine)
    poison(engine)
    engine.add("newcomer", [3] * 30, 30)
    for _ in range(1 + steps_ahead):
        engine.step()
    assert engine.worker.skipped == 1
    run_poisoned(engine)
    wanted = {"beside": 60, "newcomer": 30} | ({"due": 60} if event is preempt else {})
    assert_all_said(engine, wanted)
    assert engine.worker.compactions >= 10


@STEPS_AHEAD
@pytest.mark.parametrize("prompt_len", [15, 16, 17, 24])
@pytest.mark.parametrize("how", ["length", "stop"])
def test_a_last_token_at_any_distance_from_a_compaction(model, steps_ahead, prompt_len, how):
    """The same events, with the end of a request, which is not known ahead, in that step.

    https://github.com/SalesforceAIResearch/Random-Attention scripts/vllm_rp_bench, 3 and 4.
    """
    setting = Setting(budget=16, buffer=4, prefix_caching=False, steps_ahead=steps_ahead)
    ends_beside_a_compaction = 0
    for num_tokens in range(20, 20 + setting.buffer):
        engine = SimulatedEngine(model, setting)
        engine.stop_after = num_tokens if how == "stop" else None
        engine.add("ends", [1] * prompt_len, num_tokens if how == "length" else 60)
        engine.add("beside", [2] * prompt_len, num_tokens + 3 if how == "length" else 60)
        run_poisoned(engine)
        assert len(engine.outputs["ends"]) == num_tokens
        assert engine.worker.compactions >= 4
        ends_beside_a_compaction += engine.worker.skipped > 0
        engine.assert_nothing_is_left()
        assert engine.pool.get_num_free_blocks() == setting.num_blocks - 1
    if how == "stop" or not steps_ahead:
        assert ends_beside_a_compaction, "no request ended in the step of its compaction"


class Preemptions:
    """Notes what each preemption of an engine gives back."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self.freed: list[int] = []
        self.victims: list[str] = []
        preempt_request = engine.scheduler._preempt_request

        def noting(request, *args, **kwargs) -> None:
            before = engine.pool.get_num_free_blocks()
            preempt_request(request, *args, **kwargs)
            self.freed.append(engine.pool.get_num_free_blocks() - before)
            self.victims.append(request.request_id)

        engine.scheduler._preempt_request = noting

    def most_per_request(self) -> int:
        return max(map(self.victims.count, self.victims), default=0)


@STEPS_AHEAD
def test_preempted_requests_start_over_and_leave_no_anchor_behind(model, steps_ahead):
    """The port "corrupts on vLLM preemption".

    https://github.com/SalesforceAIResearch/Random-Attention scripts/vllm_rp_bench, caveats.
    """
    setting = Setting(
        budget=32,
        buffer=16,
        num_blocks=41,
        steps_ahead=steps_ahead,
        reserves_prompts=False,
        prefix_caching=False,
    )
    engine = SimulatedEngine(model, setting)
    preemptions = Preemptions(engine)
    wanted = {f"r{i}": 128 for i in range(8)}
    for number, req_id in enumerate(wanted):
        engine.add(req_id, [number] * 5, 128)
    while not engine.directives:
        engine.step()
    for number in range(3):
        wanted[f"long-{number}"] = 20
        engine.add(f"long-{number}", [10 + number] * 50, 20)
    run_poisoned(engine)
    assert_all_said(engine, wanted)
    assert len(preemptions.victims) >= 3
    assert engine.worker.compactions >= 8 * 3


@pytest.mark.parametrize("steps_ahead", [1, 2])
def test_pressure_and_a_reset_in_flight_end_no_engine(model, steps_ahead):
    """`num_output_placeholders >= 0` failed when a step in flight was preempted.

    https://github.com/vllm-project/vllm/pull/48245 and 47900, 46066.
    """
    setting = Setting(
        budget=64, buffer=16, num_blocks=96, steps_ahead=steps_ahead, reserves_prompts=False
    )
    engine = SimulatedEngine(model, setting)
    preemptions = Preemptions(engine)
    wanted = {f"r{i}": 200 for i in range(6)}
    for number, req_id in enumerate(wanted):
        engine.add(req_id, [number] * (30 + 5 * number), 200)
    for _ in range(60):
        engine.step()
    assert len(engine.queue) == steps_ahead, "nothing is in flight"
    by_pressure = len(preemptions.victims)
    assert by_pressure
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.run()
    assert_all_said(engine, wanted)
    assert engine.worker.compactions >= 6 * 5


@pytest.mark.parametrize("steps_ahead", [1, 2])
@pytest.mark.parametrize("host_blocks", [0, 100])
def test_each_preemption_returns_blocks_in_its_own_step(model, steps_ahead, host_blocks):
    """Victims whose blocks were fenced fell one after the other: 0 tokens per second.

    https://github.com/vllm-project/vllm/issues/49674 and vllm-ascend 16315.
    """
    setting = Setting(
        budget=16,
        buffer=4,
        num_blocks=34,
        steps_ahead=steps_ahead,
        reserves_prompts=False,
        host_blocks=host_blocks,
    )
    engine = SimulatedEngine(model, setting)
    preemptions = Preemptions(engine)
    wanted = {f"r{i}": 110 for i in range(12)}
    for number, req_id in enumerate(wanted):
        engine.add(req_id, [number] * (5 + number), 110)
    after_a_compaction = 0
    while engine.scheduler.has_requests():
        compacted = bool(engine.last_plan and engine.last_plan.directives)
        before = len(preemptions.victims)
        in_flight = sum(output.total_num_scheduled_tokens for output in engine.queue)
        engine.step()
        after_a_compaction += compacted and len(preemptions.victims) > before
        is_over = not engine.scheduler.has_unfinished_requests()
        assert in_flight or engine.last_output.total_num_scheduled_tokens or is_over
    engine.drain()
    assert after_a_compaction, "no allocation failed in the step after a compaction"
    assert min(preemptions.freed) >= 1
    assert_all_said(engine, wanted)
    assert engine.worker.compactions >= 12 * 10


@STEPS_AHEAD
@pytest.mark.parametrize("when", ["always", "pressure"])
@pytest.mark.parametrize(("buffer", "num_blocks"), [(4, 48), (16, 48), (4, 40)])
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_nobody_is_preempted_again_and_again_in_his_prefill(
    model, steps_ahead, when, buffer, num_blocks, prefix_caching
):
    """Resumed, a chunk prefilled, preempted again, for ever.

    https://github.com/vllm-project/vllm/issues/25538 and 37307. Stock never ends here: not even one
    of these requests fits whole.
    """
    setting = Setting(
        budget=16,
        buffer=buffer,
        num_blocks=num_blocks,
        max_num_batched_tokens=16,
        max_num_seqs=3,
        steps_ahead=steps_ahead,
        reserves_prompts=False,
        prefix_caching=prefix_caching,
        when=when,
    )
    engine = SimulatedEngine(model, setting)
    preemptions = Preemptions(engine)
    wanted = {f"r{i}": 75 for i in range(3)}
    for number, req_id in enumerate(wanted):
        engine.add(req_id, [number] * 128, 75)
    engine.run(max_steps=400)
    assert_all_said(engine, wanted)
    assert preemptions.most_per_request() <= 2
    assert engine.worker.compactions >= 4


@pytest.mark.parametrize("stock", [False, True])
def test_stock_is_preempted_more_often_with_room_for_one(model, stock):
    """The same load, where stock gets through: 12 preemptions of a request against 2.

    https://github.com/vllm-project/vllm/issues/25538 and 37307.
    """
    setting = Setting(
        budget=16,
        buffer=16,
        num_blocks=53,
        max_num_batched_tokens=16,
        max_num_seqs=3,
        steps_ahead=2,
        reserves_prompts=False,
        stock=stock,
    )
    engine = SimulatedEngine(model, setting)
    preemptions = Preemptions(engine)
    for number in range(3):
        engine.add(f"r{number}", [number] * 128, 75)
    engine.run()
    assert len(engine.finished) == 3
    assert (preemptions.most_per_request() > 5) == stock
    assert (engine.worker.compactions >= 9) != stock


@STEPS_AHEAD
@pytest.mark.parametrize("budget", [64, 240])
def test_a_request_that_fills_the_pool_ends_beside_another(model, steps_ahead, budget):
    """Fits into max_model_len and not into the pool: the scheduler hung.

    https://github.com/vllm-project/vllm/issues/39734; the refusal of a pool that is smaller than
    --max-model-len is in tests/fit/test_refusals.py.
    """
    setting = Setting(budget=budget, buffer=16, num_blocks=65, steps_ahead=steps_ahead)
    engine = SimulatedEngine(model, setting)
    engine.add("fills", [1] * 10, 245)
    engine.add("second", [2] * 10, 245)
    engine.run(max_steps=800)
    assert_all_said(engine, {"fills": 245, "second": 245})
    assert bool(engine.worker.compactions) == (budget == 64)


def send(engine: SimulatedEngine, token_ids: list[int], resumable: bool = True) -> None:
    """One input of a streaming session, or its end; steps until it is answered."""
    params = SamplingParams(max_tokens=1, ignore_eos=True, temperature=0)
    params.update_from_generation_config({}, 0)
    hasher = engine.hasher
    request = Request("session", token_ids, params, None, block_hasher=hasher, resumable=resumable)
    engine.scheduler.add_request(request)
    num_said = len(engine.outputs["session"])
    for _ in range(6):
        engine.step()
    assert len(engine.outputs["session"]) == num_said + resumable


@STEPS_AHEAD
def test_a_session_leaves_no_stale_hash_and_neither_does_a_compaction(model, steps_ahead):
    """A rebuilt session published its block under what it had said before.

    https://github.com/vllm-project/vllm/issues/49449. Whoever hits a block reads every cell of it.
    """
    # Before its second compaction a row has one block more than the text had at its first.
    engine = SimulatedEngine(model, Setting(budget=9, buffer=3, steps_ahead=steps_ahead))
    prompt, second, third = [10] * 3, 11, 13
    engine.outputs["session"] = []
    engine.take_for_granted("session")
    engine.is_off["session"] = True
    send(engine, [*prompt])
    first = engine.outputs["session"][0]
    send(engine, [second])
    send(engine, [0], resumable=False)

    def num_computed(req_id: str, text: list[int]) -> int:
        engine.add(req_id, text, 1)
        engine.step()
        scheduled = engine.last_output.num_scheduled_tokens[req_id]
        engine.run()
        return scheduled

    assert first != second
    assert num_computed("stale", [*prompt, first, third]) == 5
    assert num_computed("right", [*prompt, second, third]) == 1
    assert engine.directives == []

    engine.add("compacted", [20] * 5, 40)
    engine.run()
    text = [20] * 5 + engine.outputs["compacted"]
    # Three full blocks at the first compaction, of 12 settled tokens.
    assert num_computed("behind", [*text[:36], third]) == 37 - 12
    assert engine.directives[0].settled_len == 12
    assert len(engine.directives_of("compacted")) >= 7
