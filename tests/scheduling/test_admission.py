"""How many requests run at once: no foreseeable preemption, and never far behind stock."""

import pytest

from tests.models import random_model
from tests.scheduling.simulation import BLOCK_SIZE, MAX_MODEL_LEN, Setting, SimulatedEngine

STEPS_AHEAD = pytest.mark.parametrize("steps_ahead", [0, 1, 2])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model"))


@STEPS_AHEAD
def test_more_requests_run_at_once_and_none_is_preempted(model, steps_ahead):
    setting = Setting(budget=8, buffer=4, window=2, num_blocks=66, steps_ahead=steps_ahead)
    long_outputs = 200
    engine = SimulatedEngine(model, setting)
    for number in range(12):
        engine.add(f"request-{number}", [number] * 5, long_outputs)
    engine.run()
    full_length_requests = setting.num_blocks * BLOCK_SIZE // (5 + long_outputs)
    assert full_length_requests == 1
    assert engine.max_running >= 10
    assert engine.worker.resumes == 0
    assert engine.worker.compactions > 12 * 40


def test_admission_keeps_room_for_what_each_running_request_asked_for(model):
    """One request of 52 blocks at its peak leaves room for three of 4."""
    setting = Setting(budget=200, buffer=4, window=2, num_blocks=66)
    mixed, small = SimulatedEngine(model, setting), SimulatedEngine(model, setting)
    mixed.add("large", [99] * 5, 240)
    for number in range(10):
        for engine in (mixed, small):
            engine.add(f"request-{number}", [number] * 5, 240, {"kv_budget": 8})
    while "large" not in mixed.finished:
        mixed.step()
    assert mixed.max_running == 4
    mixed.run()
    small.run()
    assert mixed.worker.resumes == 0
    assert (small.max_running, small.worker.resumes) == (10, 0)
    assert {d.budget for d in mixed.directives} == {8, 200}


def test_short_answers_with_a_large_max_tokens_are_soon_admitted_as_by_stock(model):
    setting = Setting(budget=60, buffer=4, num_blocks=120)
    engine = SimulatedEngine(model, setting)
    engine.stop_after = 12
    for wave in range(5):
        engine.max_running = 0
        for number in range(12):
            engine.add(f"wave-{wave}-{number}", [wave * 12 + number] * 5, 200)
        engine.run()
        if wave == 0:
            cautious = engine.max_running
    assert cautious < 12
    assert engine.max_running == 12
    assert engine.directives == []


def test_a_request_that_can_never_be_due_is_not_reserved_for(model):
    # max_tokens beyond max_model_len: the text ends before budget + buffer.
    setting = Setting(budget=MAX_MODEL_LEN, buffer=4, num_blocks=80)
    engine = SimulatedEngine(model, setting)
    for number in range(12):
        engine.add(f"request-{number}", [number] * 5, 1000)
    for _ in range(3):
        engine.step()
    assert len(engine.scheduler.running) == 12


def steps_until_it_runs(engine: SimulatedEngine, req_id: str, most: int) -> int:
    for steps in range(most):
        if any(request.request_id == req_id for request in engine.scheduler.running):
            return steps
        engine.step()
    raise AssertionError(f"{req_id} does not run after {most} steps")


def eight_long_requests(model, **changes) -> SimulatedEngine:
    """Eight requests on their way to a peak of 25 blocks, 130 blocks free."""
    setting = Setting(budget=80, buffer=16, num_blocks=206, **changes)
    engine = SimulatedEngine(model, setting)
    for number in range(8):
        engine.add(f"long-{number}", [number] * 20, 230)
    while engine.pool.get_num_free_blocks() > 130:
        engine.step()
    assert len(engine.scheduler.running) == 8
    return engine


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_a_short_request_is_admitted_at_once_beside_long_ones_that_will_fill_the_pool(
    model, policy
):
    engine = eight_long_requests(model, policy=policy)
    engine.add("short", [99] * 8, 4)
    # Stock admits it in the next step. All it could cost the others is a block each.
    assert steps_until_it_runs(engine, "short", most=10) <= 2
    engine.run()
    assert engine.worker.resumes == 0
    assert len(engine.directives) > 8


def test_a_long_newcomer_still_waits_where_its_growth_would_end_in_preemptions(model):
    engine = eight_long_requests(model)
    engine.add("long", [99] * 8, 230)
    with pytest.raises(AssertionError, match="does not run"):
        steps_until_it_runs(engine, "long", most=20)
    engine.run()
    assert engine.worker.resumes == 0


def test_a_more_important_request_does_not_wait_for_what_it_may_displace(model):
    engine = eight_long_requests(model, policy="priority")
    engine.add("urgent", [99] * 8, 230, priority=-1)
    assert steps_until_it_runs(engine, "urgent", most=10) <= 2
    engine.add("patient", [98] * 8, 230, priority=1)
    with pytest.raises(AssertionError, match="does not run"):
        steps_until_it_runs(engine, "patient", most=20)
    engine.run()


def test_requests_given_up_while_they_queue_say_nothing_about_the_others(model):
    # Twelve blocks each at their peak: five run at once.
    setting = Setting(budget=40, buffer=8, num_blocks=66)
    engine = SimulatedEngine(model, setting)
    for number in range(5):
        engine.add(f"long-{number}", [number] * 5, 200)
    for _ in range(3):
        engine.step()
    for number in range(30):
        engine.add(f"given-up-{number}", [50 + number] * 5, 200)
    engine.step()
    assert len(engine.scheduler.running) == 5
    for number in range(30):
        engine.abort(f"given-up-{number}")
    engine.run()
    for number in range(12):
        engine.add(f"later-{number}", [number] * 5, 200)
    engine.run()
    assert engine.worker.resumes == 0
    assert len(engine.directives) > 17 * 15


def test_a_huge_budget_of_its_own_keeps_a_request_no_longer_out_than_the_servers_would(model):
    setting = Setting(budget=8, buffer=4, num_blocks=66)
    engine = SimulatedEngine(model, setting)
    for number in range(6):
        engine.add(f"running-{number}", [number] * 5, 200)
    for _ in range(20):
        engine.step()
    # Compacted once, just before its end: 60 blocks, which are never free at once.
    engine.add("huge", [99] * 5, 240, {"kv_budget": 230})
    engine.add("behind", [98] * 5, 40)
    assert steps_until_it_runs(engine, "huge", most=10) <= 2
    engine.run()
    assert {d.budget for d in engine.directives} == {8, 230}


def test_with_few_spare_blocks_nobody_is_preempted_where_stock_preempts(model, monkeypatch):
    setting = Setting(budget=40, buffer=8, num_blocks=140)

    def preemptions() -> int:
        engine = SimulatedEngine(model, setting)
        for number in range(16):
            engine.add(f"request-{number}", [number] * 16, 230)
        engine.run()
        assert len(engine.directives) > 16 * 20
        return engine.worker.resumes

    assert preemptions() == 0
    # As stock admits: whoever's tokens so far fit.
    monkeypatch.setattr(
        "rkv_vllm.scheduling.admission.Admission.required",
        lambda self, newcomer, num_blocks, running, num_free: num_blocks,
    )
    assert preemptions() > 10


def test_a_refusal_is_weighed_again_when_blocks_come_free_by_themselves(model):
    """As sliding-window layers give theirs back in the middle of a request."""
    engine = eight_long_requests(model)
    held = engine.pool.get_new_blocks(engine.pool.get_num_free_blocks() - 40)
    engine.allow_foreign_blocks = True
    engine.add("short", [99] * 8, 30)
    with pytest.raises(AssertionError, match="does not run"):
        steps_until_it_runs(engine, "short", most=3)
    engine.pool.free_blocks(held)
    assert steps_until_it_runs(engine, "short", most=10) <= 2
    engine.allow_foreign_blocks = False
    engine.run()
    assert len(engine.directives) > 8


def test_a_refusal_is_not_weighed_again_until_somebody_leaves(model, monkeypatch):
    engine = eight_long_requests(model)
    weighed = []
    original = engine.scheduler._admission._expected_growth
    monkeypatch.setattr(
        engine.scheduler._admission,
        "_expected_growth",
        lambda request, horizon: weighed.append(request) or original(request, horizon),
    )
    engine.add("long", [99] * 8, 230)
    for _ in range(20):
        engine.step()
    # Once when it came, by all eight, and for the bound that did not do; not again in twenty steps
    # in which nobody leaves.
    assert len(weighed) == 2 * 8
    engine.run()
    assert len(engine.outputs["long"]) == 230


@pytest.mark.parametrize("seats", [8, 1], ids=["compacted in time", "compacted late"])
def test_a_remembered_refusal_keeps_nobody_out_longer_than_weighing_in_every_step(model, seats):
    """Who ends before it is due again, or had outgrown its peak, will not grow back."""

    def waited(forgetful: bool) -> int:
        engine = SimulatedEngine(model, Setting(40, 32, seats=seats, num_blocks=48))
        for number in range(2):
            engine.add(f"running-{number}", [number] * 20, 160)
        for _ in range(60):
            engine.step()
        engine.add("new", [99] * 20, 60)
        steps = 0
        while all(request.request_id != "new" for request in engine.scheduler.running):
            if forgetful:
                engine.scheduler._admission._refused = None
            engine.step()
            steps += 1
        engine.run()
        assert engine.worker.resumes == 0
        return steps

    assert waited(forgetful=False) == waited(forgetful=True) > 80
