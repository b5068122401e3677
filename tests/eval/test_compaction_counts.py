"""Compactions of a request, counted beside the scheduler, are those that the workers carry out."""

from types import SimpleNamespace

import pytest

from rkv_vllm.eval.engine import CompactionCounts
from tests.checkpoint_configs import LLAMA, write_config
from tests.scheduling.simulation import Group, Setting, SimulatedEngine

PROMPTS = {"a": [*range(9)], "b": [*range(30)]}
SOME, NEVER = Group(layer_budget=12), Group(layer_budget=200)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_config(tmp_path_factory.mktemp("llama"), LLAMA)


def counts_of(engine: SimulatedEngine) -> CompactionCounts:
    core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=engine.scheduler))
    return CompactionCounts(SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core)), True)


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("groups", [(Group(),), (Group(), SOME), (Group(), NEVER)])
def test_counts_are_of_what_was_carried_out_and_of_all_layers(model, steps_ahead, groups):
    engine = SimulatedEngine(model, Setting(steps_ahead=steps_ahead, groups=groups))
    counts = counts_of(engine)
    for req_id, prompt in PROMPTS.items():
        # vLLM appends the rest.
        engine.add(f"{req_id}-1f", prompt, 40)
    engine.run()
    for req_id, prompt in PROMPTS.items():
        done = [d for d in engine.worker.carried_out if d.req_id == f"{req_id}-1f"]
        by_group = [[d.num_evict for d in done if d.group_id == i] for i in range(len(groups))]
        assert len(by_group[0]) > 5
        assert counts.of(req_id) == {
            "compactions": len(by_group[0]),
            "evicted": sum(map(sum, by_group)) // len(groups),
            "preemptions": 0,
            "deferred": 0,
        }
        # The output that follows the first one in the text: the step in hand saw all tokens.
        first = done[0].total_len - len(prompt) + 1
        assert counts.first[req_id] == first == max(8 - len(prompt), 0) + 4 + 1 + 1 + steps_ahead


@pytest.mark.parametrize(("setting", "counted"), [({"seats": 2}, "deferred"), ({}, None)])
def test_compactions_that_wait_for_a_seat_are_counted(model, setting, counted):
    engine = SimulatedEngine(model, Setting(**setting))
    counts = counts_of(engine)
    for number in range(6):
        engine.add(f"{number}-1f", [number] * 9, 40)
    engine.run()
    assert (counts.num_deferred > 0) == (counted == "deferred")
    assert counts.of("0")["deferred"] == counts.num_deferred


def test_preemptions_are_counted_by_request(model):
    engine = SimulatedEngine(model, Setting(seats=1, num_blocks=25))
    counts = counts_of(engine)
    for number in range(8):
        engine.add(f"{number}-1f", [number] * 9, 60)
    engine.run()
    found = [counts.of(str(number))["preemptions"] for number in range(8)]
    assert found[0] == 0 < sum(found)
