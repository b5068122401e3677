"""Drafts beside everything else: compressed prompts, swapping, pressure, a draft model's lookahead.

The worker of the simulation accepts any number of drafts, and reads every cell back.
"""

from dataclasses import replace
from random import Random

import pytest

from rkv_vllm.scheduling.prompts import PromptCompactor
from tests.models import random_model
from tests.scheduling import test_pressure, test_prompts
from tests.scheduling.simulation import Setting, SimulatedEngine
from tests.scheduling.test_pressure import PressuredEngine


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model"))


def with_drafts(setting: Setting, random: Random) -> Setting:
    drafts = random.randint(1, 3)
    return replace(
        setting,
        drafts=drafts,
        lookahead=random.choice([0, drafts]),
        steps_ahead=random.randint(0, 1),
        # Of one step, all that run and a window.
        max_num_batched_tokens=random.choice([40, 256]),
    )


def play_prompts(model, seed: int, num_steps: int) -> SimulatedEngine:
    """Long prompts that are compacted, preempted, swapped out, shared and aborted."""
    random = Random(seed)
    setting = with_drafts(test_prompts.random_setting(random), random)
    most = test_prompts.smallest_pool(setting, prefix_len=9, extra_budget=6)
    # Not the smallest: that of the simulation's own requests may lack a block for a copy.
    setting = replace(setting, num_blocks=most + random.choice([0, 5, 60]))
    engine = SimulatedEngine(model, setting, seed)
    wanted = test_prompts.play(engine, random, num_steps)
    for req_id, max_tokens in wanted.items():
        assert len(engine.outputs[req_id]) == max_tokens, req_id
    engine.worker.flush()
    engine.assert_nothing_is_left()
    assert engine.pool.get_num_free_blocks() == setting.num_blocks - 1
    return engine


def check_prompts(model, seeds: range, num_steps: int) -> None:
    engines = [play_prompts(model, seed, num_steps) for seed in seeds]
    assert sum(engine.prompt_compactions for engine in engines) > 10 * len(seeds)
    decoding = sum(len(e.directives) - e.prompt_compactions for e in engines)
    assert decoding > 5 * len(seeds)
    assert sum(engine.num_rejected for engine in engines) > 50 * len(seeds)
    assert sum(engine.worker.swapped_in for engine in engines) > len(seeds) // 2
    assert sum(engine.worker.num_adopted for engine in engines) > 0


def check_pressure(model, seeds: range, num_steps: int) -> None:
    compactions = rejected = 0
    for seed in seeds:
        random = Random(seed)
        setting = with_drafts(test_pressure.random_setting(random), random)
        engine = PressuredEngine(model, setting, seed)
        test_pressure.play(engine, seed, num_steps)
        compactions += engine.worker.compactions
        rejected += engine.num_rejected
    assert compactions > 10 * len(seeds)
    assert rejected > 100 * len(seeds)


def test_prompts_are_compacted_and_swapped_beside_drafts(model):
    check_prompts(model, range(16), 150)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_prompts_are_compacted_and_swapped_beside_drafts_in_many_steps(model):
    check_prompts(model, range(100, 200), 500)


def test_under_pressure_nobody_is_preempted_beside_drafts_while_another_could_be_compacted(model):
    check_pressure(model, range(8), 300)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_under_pressure_nobody_is_preempted_beside_drafts_in_many_steps(model):
    check_pressure(model, range(100, 160), 500)


def test_of_a_prompt_in_flight_nothing_is_lost_when_it_is_swapped_out(model):
    """A boundary that was just computed has judged tokens whose step is not processed yet."""
    setting = replace(test_prompts.SMALL, steps_ahead=1, drafts=2, host_blocks=60, num_blocks=80)
    engine = SimulatedEngine(model, setting)
    engine.add("a", list(range(60)), 20)
    while not engine.last_plan or not engine.last_plan.directives:
        engine.step()
    (directive,) = engine.last_plan.directives
    request = engine.scheduler.requests["a"]
    settled = request.num_computed_tokens - request.num_in_flight_tokens
    assert settled < directive.settled_logical_len
    engine.preempt("a")
    engine.run()
    assert engine.worker.swapped_in == 1
    assert engine.prompt_compactions == 4
    assert len(engine.outputs["a"]) == 20
    engine.assert_nothing_is_left()


def take_decoded_tokens_for_a_prompt(monkeypatch):
    init = PromptCompactor.__init__

    def deaf(self, rule, tracks, requests, terms_of, decodes):
        init(self, rule, tracks, requests, terms_of, lambda req_id: False)

    monkeypatch.setattr(PromptCompactor, "__init__", deaf)


def test_the_simulation_notices_decoded_tokens_that_are_taken_for_a_prompt(model, monkeypatch):
    take_decoded_tokens_for_a_prompt(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, IndexError, KeyError)):
        check_prompts(model, range(16), 150)
