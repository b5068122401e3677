"""Prompts longer than the pool, on real engines (SPEC section 6)."""

import openai
import pytest
from vllm.exceptions import VLLMValidationError

import rkv_vllm
from rkv_vllm.options import ServerOptions
from tests.engine import running_engine
from tests.models import random_prompt
from tests.reference import generate_reference
from tests.server import serving
from tests.test_equality import assert_same

pytestmark = pytest.mark.engine

LENGTHS = {"budget": 64, "buffer": 32, "compress_prompt": True, "prompt_chunk": 96}
CONFIG = ServerOptions(**LENGTHS)
OPTIONS = {**rkv_vllm.engine_args(**LENGTHS), "max_model_len": 4096}
# 256 and 352 tokens in blocks of 32, and the null block.
POOL_256, POOL_352 = 9, 12


def check_all(engine, model, requests, unprocessed_steps: int) -> int:
    """Every output is the reference's; returns the compactions that the references made."""
    compactions = 0
    for req_id, (prompt, num_tokens) in requests.items():
        reference = generate_reference(
            model,
            prompt,
            num_tokens,
            CONFIG,
            unprocessed_steps=unprocessed_steps,
            recompute_at=[n for n in engine.preempted_at.get(req_id, []) if n > 0],
        )
        assert_same(engine, req_id, reference)
        compactions += len(reference.compactions)
    return compactions


@pytest.mark.parametrize(
    ("runner", "num_blocks", "lengths", "num_tokens"),
    [
        ("v1", POOL_256, (300, 2000), 100),
        ("v2-async", POOL_352, (700, 410), 50),
        pytest.param("v1", POOL_352, (700, 300, 1200, 512), 100, marks=pytest.mark.nightly),
        pytest.param("v2", POOL_256, (300, 1024), 50, marks=pytest.mark.nightly),
        pytest.param("v2-async", POOL_352, (410, 2000), 50, marks=pytest.mark.nightly),
    ],
    indirect=["runner"],
)
def test_prompts_longer_than_the_pool_equal_explicit_eviction(
    random_model_dir, runner, num_blocks, lengths, num_tokens
):
    model = random_model_dir("qwen3", 3)
    requests = {f"r{n}": (random_prompt(n, seed=n), num_tokens) for n in lengths}
    with running_engine(model, num_blocks, max_num_batched_tokens=128, **OPTIONS) as engine:
        for req_id, (prompt, max_tokens) in requests.items():
            engine.add(req_id, prompt, max_tokens)
        engine.run()
        stats = engine.stats()
        engine.assert_pool_is_empty()
    assert not engine.preempted_at
    of_prompts = sum(-(-n // 96) - 1 for n in lengths)
    compactions = check_all(engine, model, requests, runner.unprocessed_steps)
    assert stats["compactions"] == compactions > of_prompts


@pytest.mark.parametrize(
    "runner", ["v1", pytest.param("v2", marks=pytest.mark.nightly)], indirect=True
)
def test_a_preempted_request_is_compacted_between_the_chunks_of_its_recompute(
    random_model_dir, runner
):
    model = random_model_dir("llama", 3)
    requests = {
        "prompt": (random_prompt(400, seed=1), 80),
        "text": (random_prompt(90, seed=2), 100),
    }
    with running_engine(model, POOL_352, max_num_batched_tokens=128, **OPTIONS) as engine:
        for req_id, (prompt, max_tokens) in requests.items():
            engine.add(req_id, prompt, max_tokens)
        while len(engine.outputs["text"].token_ids) < 75:
            engine.step()
        assert engine.llm.reset_prefix_cache(reset_running_requests=True)
        engine.run()
        stats = engine.stats()
        engine.assert_pool_is_empty()
    assert set(engine.preempted_at) == set(requests)
    assert stats["compactions"] == check_all(engine, model, requests, runner.unprocessed_steps)


@pytest.mark.parametrize(
    "runner", ["v1", pytest.param("v2-async", marks=pytest.mark.nightly)], indirect=True
)
def test_a_compressed_prefix_serves_later_requests(random_model_dir, runner):
    """1,024 tokens compressed to 256 by the first request; eight others start from these."""
    model = random_model_dir("qwen3", 3)
    lengths = {**LENGTHS, "budget": 256, "prompt_chunk": 256}
    prefix, num_tokens = random_prompt(1024, seed=9), 50
    prompts = {f"r{i}": [*prefix, *random_prompt(20 + 40 * i, seed=i)] for i in range(9)}
    options = {**rkv_vllm.engine_args(**lengths), "max_model_len": 4096}
    with running_engine(model, 300, **options) as engine:
        engine.add("r0", prompts["r0"], num_tokens)
        engine.run()
        for req_id in list(prompts)[1:]:
            engine.add(req_id, prompts[req_id], num_tokens)
        # Neither the text alone nor the options alone make a prefix.
        engine.add("own budget", prompts["r1"], 1, extra_args={"kv_budget": 128})
        engine.run()
        cached = {req_id: engine.num_cached_tokens(req_id) for req_id in engine.outputs}
        stats = engine.stats()
        engine.assert_pool_is_empty()
    # One that waits for copies of what it shares is compacted later than the reference.
    assert stats["deferred"] == 0
    assert cached.pop("r0") == 0
    # Uncompressed text before its first window, at 256, as far as it is left in the pool.
    assert cached.pop("own budget") <= 224
    assert set(cached.values()) == {1024}
    config = ServerOptions(**lengths)
    saved = 0
    for req_id, prompt in prompts.items():
        reference = generate_reference(
            model, prompt, num_tokens, config, unprocessed_steps=runner.unprocessed_steps
        )
        assert engine.outputs[req_id].token_ids == reference.token_ids, req_id
        saved += len(reference.compactions)
    # At 512, 768 and 1,024, which eight of them found done; four at least are of "own budget".
    assert stats["compactions"] == saved - 8 * 3 + 4


# What a pool of 352 tokens can never hold, and the key that is named.
TOO_LARGE = [
    ({"extra_args": {"kv_compression": "off"}}, "kv_compression"),
    ({"extra_args": {"kv_compress_prompt": False}}, "kv_compress_prompt"),
    ({"extra_args": {"kv_protect": "prompt"}}, "kv_protect"),
    ({"extra_args": {"kv_budget": 300}}, "kv_budget"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
]


def test_offline_what_the_pool_can_never_hold_is_refused_and_the_engine_lives_on(random_model_dir):
    model = random_model_dir("qwen3", 3)
    long, short = random_prompt(400, seed=1), random_prompt(100, seed=2)
    with (
        pytest.raises(ValueError, match="To serve at least one request"),
        running_engine(model, POOL_352, max_model_len=4096),
    ):
        pytest.fail("stock vLLM was meant to refuse this pool")
    with running_engine(model, POOL_352, **OPTIONS) as engine:
        for params, key in TOO_LARGE:
            with pytest.raises(
                VLLMValidationError, match=f"^{key}: got .*the pool has 11; "
            ) as error:
                engine.add("too large", long, 10, **params)
            assert error.value.parameter == key
            # Not for what it asks but for its length.
            engine.add(f"short {key}", short, 10, **params)
        engine.add("long", long, 10)
        engine.run()
        stats = engine.stats()
        engine.assert_pool_is_empty()
    assert stats["compactions"] == 4
    reference = generate_reference(model, short, 10, None)
    for _, key in TOO_LARGE:
        assert engine.outputs[f"short {key}"].token_ids == reference.token_ids


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_served_a_prompt_longer_than_the_pool_is_answered(random_model_dir):
    model = random_model_dir("qwen3", 3)
    prompt = random_prompt(1500, seed=5)
    flags = ("--kv-compression=rkv", "--kv-budget=64", "--kv-buffer=32", "--kv-compress-prompt")
    flags = (*flags, "--kv-prompt-chunk=96", "--max-model-len=4096")
    with serving(model, *flags, num_blocks=POOL_352) as server:
        (choice,) = server.complete(prompt, 100).choices
        stats = server.stats()
        for own in ({"kv_compress_prompt": False}, {"kv_compress_prompt": "false"}):
            with pytest.raises(openai.BadRequestError, match="the pool has 11") as error:
                server.complete(prompt, 100, extra_body={"vllm_xargs": own})
            assert error.value.param == "kv_compress_prompt"
        assert server.health() == 200
        log = server.log
    reference = generate_reference(model, prompt, 100, CONFIG)
    assert choice.token_ids == reference.token_ids
    assert stats["compactions"] == len(reference.compactions) > 15
    # 64 + 96 + 32 and one token in flight.
    assert "of up to --max-model-len 4096 tokens takes at most 7 of the 11 blocks" in log
