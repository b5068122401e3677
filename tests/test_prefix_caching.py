"""Prefix caching stays on: a compaction takes nothing from others and publishes nothing wrong."""

import pytest

import rkv_vllm
from rkv_vllm.options import ServerOptions
from tests.engine import BLOCK_SIZE, running_engine
from tests.models import random_prompt
from tests.reference import generate_reference

pytestmark = pytest.mark.engine

CONFIG = ServerOptions(budget=64, buffer=32)
PREFIX = random_prompt(3 * BLOCK_SIZE, seed=1)


@pytest.mark.parametrize("runner", ["v1", "v2-async"], indirect=True)
def test_a_neighbour_and_a_later_hit_are_untouched_by_a_compaction(random_model_dir, runner):
    model = random_model_dir("qwen3", 3)
    prompts = {
        "compacted": [*PREFIX, *random_prompt(5, seed=2)],
        "neighbour": [*PREFIX, *random_prompt(9, seed=3)],
        "later": [*PREFIX, *random_prompt(7, seed=4)],
    }
    with running_engine(model, **rkv_vllm.engine_args(budget=64, buffer=32)) as engine:
        engine.add("compacted", prompts["compacted"], 120)
        # Shares the prefix for as long as the other one lives, and is never compacted itself.
        engine.add("neighbour", prompts["neighbour"], 30)
        while engine.stats()["compactions"] < 2:
            engine.step()
        assert not engine.outputs["compacted"].finished
        engine.add("later", prompts["later"], 30)
        engine.run()
        stats = engine.stats()
        hit_tokens = engine.num_cached_tokens("later")
        engine.assert_pool_is_empty()
    assert hit_tokens == len(PREFIX)
    references = {
        "compacted": generate_reference(
            model, prompts["compacted"], 120, CONFIG, unprocessed_steps=runner.unprocessed_steps
        ),
        "neighbour": generate_reference(model, prompts["neighbour"], 30, None),
        "later": generate_reference(model, prompts["later"], 30, None),
    }
    for req_id, reference in references.items():
        assert engine.outputs[req_id].token_ids == reference.token_ids
    assert stats["compactions"] == len(references["compacted"].compactions) >= 2
    assert stats["requests_compacted"] == 1


@pytest.mark.parametrize("runner", ["v1", "v2"], indirect=True)
def test_text_behind_an_eviction_is_never_a_prefix_hit(random_model_dir, runner):
    """Asking again with prompt plus output may hit what was cached before the first eviction."""
    model = random_model_dir("qwen3", 3)
    prompt = random_prompt(40, seed=8)
    with running_engine(model, **rkv_vllm.engine_args(budget=64, buffer=32)) as engine:
        engine.add("first", prompt, 160)
        engine.run()
        first = engine.outputs["first"].token_ids
        assert engine.stats()["compactions"] >= 3
        engine.add("again", [*prompt, *first], 20)
        engine.run()
        hit_tokens = engine.num_cached_tokens("again")
    # Full blocks at the first compaction: 96 settled tokens and the step's own.
    assert hit_tokens == 96
    reference = generate_reference(model, [*prompt, *first], 20, None)
    assert engine.outputs["again"].token_ids == reference.token_ids
