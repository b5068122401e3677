"""Seats of the query ring: held no longer than a window takes, and handed round."""

import pytest

from rkv_vllm.policy import EveryBuffer, Terms
from rkv_vllm.scheduling.booking import ScheduledRequest
from rkv_vllm.scheduling.directive import StepPlan
from rkv_vllm.scheduling.planner import GroupPlanner, Seats
from tests.leftovers import container_sizes
from tests.models import random_model
from tests.scheduling.simulation import Setting, SimulatedEngine

WINDOW = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model"))


class Books:
    """Endless blocks."""

    def __init__(self) -> None:
        self.num_evicted: dict[str, int] = {}

    def evict(self, req_id, num_evict, total_len, prefix_len):
        self.num_evicted[req_id] = self.num_evicted.get(req_id, 0) + num_evict
        return [1], [1]


def compactions(terms: list[Terms], num_seats: int, steps: int, in_flight: int = 1) -> list[int]:
    """Compactions of requests that decode one token per step, each from a prompt of 10."""
    books = Books()
    planner = GroupPlanner(0, books, EveryBuffer(WINDOW), Seats(num_seats, WINDOW))
    counts = [0] * len(terms)
    for number, each in enumerate(terms):
        planner.begin(str(number), each, 10)
    for step in range(1, steps):
        plan = StepPlan()
        planner.plan_step(lambda r, n=10 + step: ScheduledRequest(r, n, 1, in_flight), plan)
        for directive in plan.directives:
            counts[int(directive.req_id)] += 1
    return counts


@pytest.mark.parametrize("in_flight", [1, 2])
def test_requests_with_a_buffer_as_short_as_the_window_do_not_keep_the_seats(in_flight):
    terms = [Terms(16, WINDOW)] * 2 + [Terms(16, 64)] * 4
    counts = compactions(terms, num_seats=2, steps=2000, in_flight=in_flight)
    # Before, the first two took the seats for life: 247 compactions each, the others none.
    assert min(counts) >= 2000 // 64 // 2, counts
    # Nothing is lost where seats suffice.
    assert (
        compactions(terms, num_seats=6, steps=2000, in_flight=in_flight)[:2]
        == [(2000 - 16 - in_flight) // WINDOW] * 2
        or min(compactions(terms, 6, 2000, in_flight)[:2]) >= 245
    )


def test_all_requests_that_share_one_seat_are_compacted_equally_often():
    counts = compactions([Terms(16, WINDOW)] * 5, num_seats=1, steps=3000)
    assert max(counts) - min(counts) <= 1
    assert min(counts) > 50


@pytest.mark.parametrize("steps_ahead", [0, 1, 2])
def test_a_request_is_watched_for_its_window_and_the_steps_in_flight_and_no_longer(
    model, steps_ahead
):
    setting = Setting(budget=20, buffer=20, window=4, steps_ahead=steps_ahead)
    engine = SimulatedEngine(model, setting)
    engine.add("a", [1] * 5, 20 + 20 * 5)
    engine.run()
    assert len(engine.directives) == 5
    # From the window's first token until the step whose scheduling sees the last one settled.
    assert engine.worker.watched_steps == 5 * (setting.window + steps_ahead)


def test_a_method_without_queries_takes_no_seat_and_never_waits_for_a_window():
    books = Books()
    planner = GroupPlanner(0, books, EveryBuffer(WINDOW), Seats(0, WINDOW))
    for number in range(100):
        planner.begin(str(number), Terms(16, 10), 10)
    plan = StepPlan()
    for step in range(1, 18):
        planner.plan_step(lambda r, n=10 + step: ScheduledRequest(r, n, 1, 1), plan)
    # Due with 26 settled tokens, all in one step.
    assert len(plan.directives) == 100
    assert {directive.seat for directive in plan.directives} == {-1}
    assert plan.watched == {0: {}}
    assert plan.num_deferred == 0


def test_a_step_looks_at_no_request_that_is_far_from_due():
    planner = GroupPlanner(0, Books(), EveryBuffer(WINDOW), Seats(64, WINDOW))
    for number in range(1000):
        planner.begin(str(number), Terms(16, 500), 10)
    looked_at = []

    def lookup(req_id):
        looked_at.append(req_id)

    for _ in range(490):
        planner.plan_step(lookup, StepPlan())
    assert looked_at == []


def test_the_calendar_forgets_requests_that_left_and_no_others():
    planner = GroupPlanner(0, Books(), EveryBuffer(WINDOW), Seats(64, WINDOW))
    stays = [f"stays-{number}" for number in range(10)]
    for number in range(500):
        if number % 50 == 0:
            planner.begin(stays[number // 50], Terms(16, 500), 10)
        planner.begin("leaves", Terms(16, 10**6), 10)
        planner.forget("leaves")
        entries = container_sizes(planner)["GroupPlanner._calendar"]
        assert number // 50 < entries <= 2 * (number // 50 + 1)
    looked_at = set()
    for _ in range(510):
        planner.plan_step(lambda req_id: looked_at.add(req_id), StepPlan())
    assert looked_at == set(stays)


def test_a_compaction_that_waits_for_a_seat_and_then_for_blocks_counts_as_both(model):
    setting = Setting(budget=8, buffer=8, window=4, seats=1, num_blocks=80)
    engine = SimulatedEngine(model, setting)
    for number in range(2):
        engine.add(f"request-{number}", [9] * 16 + [number], 60)
    engine.add("keeps the prefix shared", [9] * 16 + [7], 60, {"kv_compression": "off"})
    plans = []
    while not engine.directives:
        engine.step()
        plans.append(engine.last_plan)
    assert sum(plan.num_waiting_for_seat for plan in plans) == 1
    # The other one has the seat now; its window is warm after four tokens.
    for _ in range(4):
        engine.step()
        assert engine.last_plan.watched == {0: {"request-1": 0}}
    held = engine.pool.get_new_blocks(engine.pool.get_num_free_blocks() - 2)
    engine.allow_foreign_blocks = True
    for _ in range(2):
        engine.step()
        plans.append(engine.last_plan)
    assert sum(plan.num_waiting_for_blocks for plan in plans) == 1
    engine.pool.free_blocks(reversed(held))
    engine.allow_foreign_blocks = False
    engine.run()
    assert len(engine.directives) > 2
