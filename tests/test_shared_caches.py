"""Layers that read another layer's cache, and are compacted with it: scored once, by the owner."""

import pytest

import rkv_vllm
from rkv_vllm.cache_owners import write_owners
from rkv_vllm.options import ServerOptions
from tests.engine import BLOCK_SIZE, running_engine
from tests.models import assert_varied, kv_cache_bytes, random_prompt
from tests.reference import generate_reference

pytestmark = pytest.mark.engine

CONFIG = ServerOptions(budget=64, buffer=32)
LOGPROB_TOLERANCE = 1e-3
OWNERS = {2: 1, 3: 1}
SHARED = random_prompt(32, seed=1)
PROMPTS = {f"r{i}": [*SHARED, *random_prompt(6 + 7 * i, seed=i)] for i in range(3)}


@pytest.mark.parametrize(
    ("runner", "num_tokens"),
    [
        ("v1", 150),
        pytest.param("v2", 100, marks=pytest.mark.nightly),
        pytest.param("v2-async", 100, marks=pytest.mark.nightly),
    ],
    indirect=["runner"],
)
def test_text_equals_explicit_eviction_with_shared_caches_in_twice_the_pool(
    random_model_dir, tmp_path, runner, num_tokens
):
    model = random_model_dir("llama", 3)
    path = tmp_path / "shared.json"
    write_owners(path, model.name, 4, OWNERS)
    options = rkv_vllm.engine_args(share_layers=str(path), budget=64, buffer=32)
    # Two of four layers have a cache.
    memory = kv_cache_bytes(model, 128 * BLOCK_SIZE)
    with running_engine(model, 256, kv_cache_memory_bytes=memory, **options) as engine:
        (layer_set,) = engine.model_runner.compactor.groups[0].layer_sets
        assert layer_set.keys.num_layers == layer_set.ring.queries.shape[1] == 2
        context = engine.model_runner.compilation_config.static_forward_context
        places = [layer.kv_cache.data_ptr() for layer in context.values()]
        assert [places.index(place) for place in places] == [0, 1, 1, 1]
        for req_id, prompt in PROMPTS.items():
            engine.add(req_id, prompt, num_tokens)
        engine.run()
        stats = engine.stats()
        engine.add("again", PROMPTS["r2"], 40)
        engine.run()
        assert engine.num_cached_tokens("again") == BLOCK_SIZE
        assert engine.outputs["again"].token_ids == engine.outputs["r2"].token_ids[:40]
        engine.assert_pool_is_empty()
    num_compactions = 0
    for req_id, prompt in PROMPTS.items():
        expected = generate_reference(
            model,
            prompt,
            num_tokens,
            CONFIG,
            unprocessed_steps=runner.unprocessed_steps,
            owners=OWNERS,
        )
        output = engine.outputs[req_id]
        assert output.token_ids == expected.token_ids, req_id
        gaps = [abs(a - b) for a, b in zip(output.logprobs, expected.logprobs, strict=True)]
        assert max(gaps) < LOGPROB_TOLERANCE
        assert_varied(output.token_ids)
        num_compactions += len(expected.compactions)
    alone = generate_reference(model, PROMPTS["r0"], 20, CONFIG)
    assert engine.outputs["r0"].token_ids[:20] != alone.token_ids
    assert stats["compactions"] == num_compactions >= 6
