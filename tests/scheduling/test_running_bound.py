"""Admission looks at each running request once while a step admits many, and decides as if always.

One engine decides by the bounds, the other looks at everybody for every newcomer.
"""

from dataclasses import replace
from random import Random

import pytest

from tests.models import random_model
from tests.scheduling.simulation import BLOCK_SIZE, Setting, SimulatedEngine
from tests.scheduling.test_mixed_groups import random_setting
from tests.scheduling.test_pressure import contents

RULES = pytest.mark.parametrize("when", ["always", "pressure"])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def looks(monkeypatch) -> list[bool]:
    """Whether each bound was at least what it bounds, of those that were asked with newcomers."""
    from rkv_vllm.scheduling.running_bound import RunningBound

    get, found = RunningBound.get, []

    def checked(bound: RunningBound) -> float:
        got = get(bound)
        whole = RunningBound(bound._running, bound._term, bound._raised, bound._join)
        if bound.is_exact:
            assert abs(got - get(whole)) < 1e-9
        else:
            found.append(got >= get(whole) - 1e-9)
        return got

    monkeypatch.setattr(RunningBound, "get", checked)
    return found


def burst(random: Random, first: int) -> list[tuple]:
    """Arguments of `SimulatedEngine.add` of requests that come together, many with one prefix."""
    adds = []
    for number in range(first, first + random.randint(1, 10)):
        shared = BLOCK_SIZE * random.randint(0, 4)
        prompt = [100 + random.randint(0, 1)] * shared + [200 + number] * random.randint(1, 12)
        own = random.choice([None, None, {"kv_compression": "off"}, {"kv_budget": 24}])
        adds.append((f"r{number}", prompt, random.randint(1, 90), own, random.randint(0, 2)))
    return adds


@RULES
def test_bounds_hold_and_everybody_is_admitted_as_by_looking_at_all(model, looks, when):
    num_admitted = num_refused = compactions = 0
    for seed in range(8):
        setting = replace(random_setting(seed), when=when)
        by_bounds, by_all = (SimulatedEngine(model, setting, seed) for _ in range(2))
        # So that no bound is small enough.
        by_all.scheduler._admission._asked_beside = lambda request: 10**9
        random, number = Random(seed), 0
        for step in range(160):
            if random.random() < 0.2:
                for add in burst(random, number):
                    number += 1
                    by_bounds.add(*add)
                    by_all.add(*add)
            by_bounds.step()
            by_all.step()
            assert contents(by_bounds.last_output) == contents(by_all.last_output), (seed, step)
            num_admitted += len(by_bounds.last_output.scheduled_new_reqs)
            num_refused += bool(by_bounds.scheduler.waiting)
        by_bounds.run()
        by_all.run()
        assert by_bounds.outputs == by_all.outputs
        assert by_bounds.worker.compactions == by_all.worker.compactions
        compactions += by_bounds.worker.compactions
    assert compactions > 8 * 30
    assert num_admitted > 8 * 30
    assert num_refused > 8 * 10
    # Shares are estimated: of a row in which a shared block follows one that is not, badly.
    assert looks.count(False) * 50 <= len(looks) > 100


@RULES
def test_a_burst_is_admitted_with_a_few_looks_at_each_request(model, monkeypatch, when):
    """It was one look at every running request for every newcomer: 0.8 and 2.2 s for 1,024."""
    setting = Setting(
        budget=16, num_blocks=20_000, max_num_seqs=400, max_num_batched_tokens=20_000, when=when
    )
    engine = SimulatedEngine(model, setting)
    name = "_expected_growth" if when == "always" else "_spare"
    admission, looked = type(engine.scheduler._admission), []
    look = getattr(admission, name)
    monkeypatch.setattr(admission, name, lambda *args: looked.append(args[1]) or look(*args))
    for number in range(400):
        engine.add(f"r{number}", [7] * 32 + [number], 40)
    engine.step()
    assert len(engine.scheduler.running) == 400
    assert 400 - 1 <= len(looked) <= 6 * 400
    engine.run()
    # Under pressure nothing is evicted while there is room.
    assert bool(engine.worker.compactions) == (when == "always")
    assert engine.worker.compactions >= 400 or when == "pressure"


def test_one_newcomer_is_added_and_for_several_all_are_looked_at_again():
    """Without vLLM's gate requests are admitted that nobody asked a bound for."""
    from rkv_vllm.scheduling.running_bound import RunningBound

    terms, running = {"a": 5.0, "b": 3.0, "c": 2.0, "d": 1.0}, ["a"]
    bound = RunningBound(lambda: running, terms.get, lambda new: 4.0)
    assert (bound.get(), bound.is_exact) == (5, True)
    running.append("b")
    assert (bound.get(), bound.is_exact) == (5 + 3 + 4, False)
    # Shared with both that come now.
    terms["a"] = 25.0
    running.extend("cd")
    assert (bound.get(), bound.is_exact) == (25 + 3 + 2 + 1, True)
