"""Preempted requests that were compacted go on as if they had never left: the scheduler's side."""

from dataclasses import replace
from random import Random

import pytest

from rkv_vllm.scheduling.planner import GroupPlanner
from rkv_vllm.scheduling.swap import SwapSpace
from tests.models import random_model
from tests.scheduling.simulation import (
    MAX_MODEL_LEN,
    Group,
    Setting,
    SimulatedEngine,
    SimulatedWorker,
)
from tests.scheduling.test_properties import prompt_of, random_setting

STEPS_AHEAD = pytest.mark.parametrize("steps_ahead", [0, 1, 2])
SETTING = Setting(budget=8, buffer=4, window=2, host_blocks=200)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model"))


def play(model, setting: Setting, preempt_after: int | None = None) -> SimulatedEngine:
    """One request beside another, preempted after so many steps or not at all."""
    engine = SimulatedEngine(model, setting)
    engine.add("a", [1] * 5, 50)
    engine.add("b", [2] * 9, 40)
    step = 0
    while engine.scheduler.has_requests():
        engine.step()
        step += 1
        if step == preempt_after:
            engine.preempt("a")
    engine.drain()
    engine.assert_nothing_is_left()
    return engine


def compactions_of(engine: SimulatedEngine) -> list[tuple[int, ...]]:
    """Of request "a": group, settled logical length, tokens behind it, evicted before and now."""
    return [
        (d.group_id, d.settled_logical_len, d.total_len, d.num_evicted_before, d.num_evict)
        for d in engine.worker.carried_out
        if d.req_id == "a"
    ]


@STEPS_AHEAD
@pytest.mark.parametrize("groups", [(Group(),), (Group(layer_budget=8), Group(layer_budget=13))])
def test_a_preempted_request_is_compacted_as_if_it_had_never_left(model, steps_ahead, groups):
    setting = replace(SETTING, steps_ahead=steps_ahead, groups=groups)
    undisturbed = compactions_of(play(model, setting))
    assert len(undisturbed) >= 8
    booked = 0
    # From the first compaction of any group on, at every place between two of them.
    for preempt_after in range(16, 45):
        engine = play(model, setting, preempt_after)
        assert compactions_of(engine) == undisturbed, preempt_after
        assert engine.worker.swapped_in == engine.worker.resumes == 1
        assert engine.num_deferred == 0
        booked += engine.worker.carried_out_before_a_save
    # Some left with a compaction booked.
    assert booked >= 5


def num_computed(model, setting: Setting, preempt_after: int | None) -> int:
    """Tokens that a request's steps compute."""
    engine = SimulatedEngine(model, setting)
    engine.add("a", [1] * 5, 50)
    computed = step = 0
    while engine.scheduler.has_requests():
        engine.step()
        computed += engine.last_output.total_num_scheduled_tokens
        step += 1
        if step == preempt_after:
            engine.preempt("a")
    return computed


@STEPS_AHEAD
def test_no_token_is_computed_again(model, steps_ahead):
    setting = replace(SETTING, steps_ahead=steps_ahead)
    undisturbed = num_computed(model, setting, None)
    assert num_computed(model, setting, 25) == undisturbed


def test_a_request_that_was_never_compacted_is_computed_again_as_by_stock(model):
    engine = SimulatedEngine(model, SETTING)
    engine.add("a", [1] * 5, 50)
    engine.step()
    engine.step()
    engine.preempt("a")
    engine.run()
    assert (engine.worker.resumes, engine.worker.swapped_in) == (1, 0)
    assert sum(engine.scheduler._swap.fallbacks.values()) == 0


def test_without_room_a_request_is_computed_again_and_counted(model):
    engine = play(model, replace(SETTING, host_blocks=2), preempt_after=30)
    assert engine.scheduler._swap.fallbacks == {
        "space": 1,
        "groups": 0,
        "prompt_logprobs": 0,
        "reset": 0,
    }
    assert (engine.worker.resumes, engine.worker.swapped_in) == (1, 0)
    assert engine.num_recomputed == 1
    again = [d for d in engine.directives if d.req_id == "a" and not d.num_evicted_before]
    assert len(again) == 2


@pytest.mark.parametrize("other", ["sliding", "state"])
def test_beside_layers_of_other_kinds_a_request_is_computed_again_and_counted(model, other):
    setting = replace(SETTING, groups=(Group(), Group(other)), prefix_caching=False)
    engine = play(model, setting, preempt_after=30)
    assert engine.scheduler._swap.fallbacks["groups"] == 1
    assert (engine.worker.resumes, engine.worker.swapped_in) == (1, 0)
    assert engine.worker.compactions > 10


def test_a_request_that_wants_every_prompt_token_computed_gets_it(model):
    engine = SimulatedEngine(model, SETTING)
    engine.add("a", [1] * 5, 50)
    engine.scheduler.requests["a"].skip_reading_prefix_cache = True
    for _ in range(25):
        engine.step()
    engine.preempt("a")
    engine.run()
    assert engine.scheduler._swap.fallbacks["prompt_logprobs"] == 1
    assert engine.worker.swapped_in == 0


def test_a_reset_of_the_cache_makes_void_what_is_swapped_out(model):
    engine = SimulatedEngine(model, SETTING)
    for name in "abc":
        engine.add(name, [ord(name)] * 5, 50)
    for _ in range(25):
        engine.step()
    engine.preempt("c")
    assert engine.scheduler._swap.bytes_in_use > 0
    engine.preempt_all()
    assert engine.scheduler._swap.bytes_in_use == 0
    assert engine.scheduler._swap.fallbacks["reset"] == 3
    engine.run()
    assert (engine.worker.resumes, engine.worker.swapped_in) == (3, 0)


@STEPS_AHEAD
def test_without_a_seat_at_its_return_the_window_starts_anew(model, steps_ahead):
    setting = replace(SETTING, steps_ahead=steps_ahead, seats=1, buffer=6, max_num_seqs=2)
    engine = SimulatedEngine(model, setting)
    engine.add("a", [1] * 5, 60)
    while engine.tracks[0].planner.num_seats_in_use == 0 or not engine.directives:
        engine.step()
    engine.preempt("a")
    # Somebody else gets the seat, and keeps it until he is compacted.
    planner = engine.tracks[0].planner
    taken = planner._free_seats.pop()
    for _ in range(2 + 2 * steps_ahead):
        engine.step()
    assert engine.worker.swapped_in == 1 or steps_ahead
    for _ in range(12):
        engine.step()
    assert engine.num_deferred == 1
    before = len(engine.directives)
    planner._free_seats.append(taken)
    engine.run()
    assert len(engine.directives) > before
    assert len(engine.outputs["a"]) == 60


@STEPS_AHEAD
def test_a_thousand_aborts_leak_no_host_memory(model, steps_ahead):
    engine = SimulatedEngine(model, replace(SETTING, steps_ahead=steps_ahead, host_blocks=60))
    random = Random(steps_ahead)
    aborted_while_away = number = 0
    # The audit looks at every host block after each of these steps.
    while aborted_while_away < 1000:
        while len(engine.scheduler.requests) < 12:
            engine.add(f"{number}", [number % 90] * random.randint(1, 12), 60)
            number += 1
        engine.step()
        compacted = [
            r.request_id for r in engine.scheduler.running if engine.num_evicted(r.request_id)
        ]
        victims = random.sample(compacted, min(len(compacted), 6))
        for victim in victims:
            engine.preempt(victim)
        if random.random() < 0.5:
            engine.step()
        for victim in list(engine.scheduler._swap._absent):
            if random.random() < 0.8:
                engine.abort(victim)
                aborted_while_away += 1
        engine.outputs = {r: engine.outputs[r] for r in engine.scheduler.requests}
    for req_id in list(engine.scheduler.requests):
        engine.abort(req_id)
    engine.step()
    engine.drain()
    engine.assert_nothing_is_left()
    assert engine.scheduler._swap.num_swapped_out > 1000


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@STEPS_AHEAD
def test_a_starved_pool_swaps_and_everybody_finishes(model, steps_ahead, policy):
    setting = replace(
        SETTING,
        steps_ahead=steps_ahead,
        policy=policy,
        num_blocks=MAX_MODEL_LEN // 4 + 2,
        host_blocks=400,
        prefix_caching=False,
    )
    engine = SimulatedEngine(model, setting)
    # Without vLLM's gate on whole prompts nothing reserves for growth either: requests crowd in.
    engine.scheduler.scheduler_reserve_full_isl = False
    for number in range(12):
        # The first two grow and grow, at the cost of those that vLLM preempts first.
        own = {"kv_compression": "off"} if number < 2 else {"kv_budget": 20}
        engine.add(f"{number}", [number] * (3 + number), 110, own, priority=int(number >= 2))
    engine.run()
    assert engine.worker.swapped_in >= 5
    assert engine.worker.swapped_in == engine.scheduler._swap.num_swapped_out
    assert sum(engine.scheduler._swap.fallbacks.values()) == 0
    assert all(len(output) == 110 for output in engine.outputs.values())
    engine.assert_nothing_is_left()


def play_randomly(model, seed: int, num_steps: int) -> SimulatedEngine:
    """Requests come, are preempted and aborted at random; then everybody finishes."""
    random = Random(seed)
    setting = random_setting(random)
    setting = replace(setting, host_blocks=random.choice([15, 60, 400]))
    if random.random() < 0.4:
        setting = replace(
            setting,
            drafts=random.randint(1, 3),
            steps_ahead=random.randint(0, 1),
            num_blocks=1000,
        )
    if random.random() < 0.7:
        setting = replace(setting, groups=(Group(),) * random.choice([1, 1, 2]))
    engine = SimulatedEngine(model, setting, seed)
    number = 0
    for _ in range(num_steps):
        if random.random() < 0.2:
            own = random.choice([None, None, {"kv_compression": "off"}, {"kv_budget": 17}])
            prompt = prompt_of(random.randrange(3), random.randint(1, 40), number)
            engine.add(f"{number}", prompt, random.randint(1, 60), own)
            number += 1
        running = [request.request_id for request in engine.scheduler.running]
        if running and random.random() < 0.1:
            engine.preempt(random.choice([r for r in running if engine.num_evicted(r)] or running))
        alive = list(engine.scheduler.requests)
        if alive and random.random() < 0.03:
            engine.abort(random.choice(alive))
        engine.step()
    engine.run()
    engine.worker.flush()
    assert engine.pool.get_num_free_blocks() == setting.num_blocks - 1
    engine.assert_nothing_is_left()
    return engine


def test_random_departures_leave_cells_windows_and_host_memory_in_order(model):
    engines = [play_randomly(model, seed, 120) for seed in range(25)]
    assert sum(engine.worker.compactions for engine in engines) > 1000
    assert sum(engine.worker.swapped_in for engine in engines) > 100
    assert sum(engine.worker.carried_out_before_a_save for engine in engines) > 10
    with_drafts = [engine for engine in engines if engine.setting.drafts]
    assert sum(engine.worker.swapped_in for engine in with_drafts) > 20
    fallbacks = [engine.scheduler._swap.fallbacks for engine in engines]
    assert sum(each["space"] for each in fallbacks) > 5
    assert sum(each["groups"] for each in fallbacks) > 5


@pytest.mark.nightly
def test_a_hundred_thousand_random_steps_with_departures_are_clean(model):
    engines = [play_randomly(model, seed, 400) for seed in range(250)]
    assert sum(engine.worker.swapped_in for engine in engines) > 2000


class SavesTooEarly(SimulatedWorker):
    """The mistake of copying before the flush of what was booked."""

    def flush(self, left=frozenset()):
        directives, self.pending = self.pending, []
        self.late = directives
        super().flush(left)

    def _update_requests(self, output, restored):
        for directive in self.late:
            self._compact(directive)
        super()._update_requests(output, restored)


class MixesUpSeats(SimulatedWorker):
    """The mistake of bringing the recorded queries back into another seat."""

    def _restore(self, directive):
        self.ring = {key: None for key in self.ring if key[1] == directive.seat}
        super()._restore(replace(directive, seat=directive.seat + (directive.seat >= 0)))


class RestoresTheWrongBlocks(SimulatedWorker):
    """The mistake of filling blocks in another order."""

    def _restore(self, directive):
        super()._restore(replace(directive, block_ids=directive.block_ids[::-1]))


@pytest.mark.parametrize("mistaken", [SavesTooEarly, MixesUpSeats, RestoresTheWrongBlocks])
def test_the_simulation_notices_a_mistake_in_the_worker(model, mistaken):
    def play_with_it():
        for preempt_after in range(16, 45):
            engine = SimulatedEngine(model, SETTING)
            engine.worker = mistaken(SETTING)
            engine.add("a", [1] * 5, 50)
            for step in range(60):
                engine.step()
                if step == preempt_after and engine.scheduler.running:
                    engine.preempt("a")

    with pytest.raises((AssertionError, KeyError, IndexError)):
        play_with_it()


def keep_host_blocks_of_aborted_requests(monkeypatch):
    monkeypatch.setattr(SwapSpace, "_drop", lambda self, req_id: self._absent.pop(req_id, None))


def hand_host_blocks_out_twice(monkeypatch):
    monkeypatch.setattr(SwapSpace, "_take", lambda self, count: self._free[-count:] * bool(count))


def begin_anew_at_the_return(monkeypatch):
    monkeypatch.setattr(
        GroupPlanner,
        "rejoin",
        lambda self, req_id, progress, num_computed: self.begin(
            req_id, progress.terms, num_computed
        ),
    )


def settle_at_once_what_was_in_flight(monkeypatch):
    monkeypatch.setattr(
        SwapSpace, "num_in_flight", lambda self, request: request.num_in_flight_tokens
    )


def goes_on_as_if_it_had_never_left(model) -> None:
    test_a_preempted_request_is_compacted_as_if_it_had_never_left(model, 1, (Group(),))


def nothing_leaks(model) -> None:
    test_a_thousand_aborts_leak_no_host_memory(model, 1)


@pytest.mark.parametrize(
    ("mistake", "claim"),
    [
        (keep_host_blocks_of_aborted_requests, nothing_leaks),
        (hand_host_blocks_out_twice, nothing_leaks),
        (begin_anew_at_the_return, goes_on_as_if_it_had_never_left),
        (settle_at_once_what_was_in_flight, goes_on_as_if_it_had_never_left),
    ],
)
def test_the_simulation_notices_a_mistake_in_the_swap_space(model, monkeypatch, mistake, claim):
    mistake(monkeypatch)
    with pytest.raises((AssertionError, KeyError, IndexError)):
        claim(model)
