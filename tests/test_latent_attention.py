"""Multi-head latent attention: a layer keeps one set of latents for all its heads."""

import pytest

import rkv_vllm
from rkv_vllm.options import ServerOptions
from rkv_vllm.scheduling.spec import CompressedMLASpec
from tests.engine import running_engine
from tests.latent_model import NUM_LAYERS, ROW_SIZE, random_latent_model
from tests.latent_reference import explicit_latents
from tests.models import assert_varied, random_prompt

pytestmark = [pytest.mark.engine, pytest.mark.nightly]

CONFIG = ServerOptions(budget=48, buffer=32)
LOGPROB_TOLERANCE = 1e-3
# The only one of vLLM's CPU attention.
BLOCK_SIZE, NUM_BLOCKS = 16, 96
PROMPTS = {f"r{i}": random_prompt(30 + 23 * i, seed=i) for i in range(3)}
NUM_TOKENS, PREEMPTED_AT = 150, 100
COMPARED = {"r0": NUM_TOKENS, "r1": NUM_TOKENS, "r2": PREEMPTED_AT}
# vLLM 0.32's own C++ takes the wrong stride from the queries of such models: what a request says
# would depend on its neighbours, compressed or not.
TORCH_ROPE = {"custom_ops": ["all", "-rotary_embedding"]}


def test_text_equals_explicit_eviction_of_latents(tmp_path):
    model = random_latent_model(tmp_path / "latent")
    options = rkv_vllm.engine_args(budget=48, buffer=32, experimental_mla=True)
    memory = NUM_BLOCKS * BLOCK_SIZE * NUM_LAYERS * ROW_SIZE * 4
    sizes = {"block_size": BLOCK_SIZE, "kv_cache_memory_bytes": memory}
    options |= {"compilation_config": TORCH_ROPE}
    with running_engine(model, NUM_BLOCKS, **sizes, **options) as engine:
        (group,) = engine.scheduler.kv_cache_config.kv_cache_groups
        assert type(group.kv_cache_spec) is CompressedMLASpec
        for req_id, prompt in PROMPTS.items():
            engine.add(req_id, prompt, NUM_TOKENS)
        for _ in range(PREEMPTED_AT):
            engine.step()
        # Computes its text again, and is compacted once more.
        engine.preempt("r2")
        engine.run()
        stats = engine.stats()
        assert engine.compacted_rows_checked > 100
        engine.assert_pool_is_empty()
        context = engine.model_runner.compilation_config.static_forward_context
        with explicit_latents(context.values(), CONFIG) as stand_ins:
            for req_id, num_tokens in COMPARED.items():
                whole = {"kv_compression": "off"}
                engine.add(f"explicit {req_id}", PROMPTS[req_id], num_tokens, extra_args=whole)
                engine.run()
    for req_id, num_tokens in COMPARED.items():
        output, expected = engine.outputs[req_id], engine.outputs[f"explicit {req_id}"]
        assert output.token_ids[:num_tokens] == expected.token_ids, req_id
        pairs = zip(output.logprobs, expected.logprobs, strict=False)
        assert max(abs(a - b) for a, b in pairs) < LOGPROB_TOLERANCE
        assert_varied(expected.token_ids)
    assert engine.preempted_at == {"r2": [PREEMPTED_AT]}
    assert all(each.compactions == [4, 4, 3] for each in stand_ins)
    assert stats["compactions"] == 4 + 4 + 3 + 1
