"""A served request says what explicit eviction says, token for token."""

from dataclasses import replace

import pytest
import torch
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform

import rkv_vllm
from rkv_vllm.kernels.ops import triton_ops
from rkv_vllm.options import ServerOptions
from tests.engine import Engine, running_engine
from tests.models import assert_varied, random_prompt
from tests.reference import ReferenceResult, generate_reference

pytestmark = pytest.mark.engine

CONFIG = ServerOptions(budget=64, buffer=32)
OPTIONS = rkv_vllm.engine_args(budget=64, buffer=32)
LOGPROB_TOLERANCE = 1e-3
SHARED = random_prompt(64, seed=1)


def assert_same(engine: Engine, req_id: str, reference: ReferenceResult) -> None:
    """Same tokens, log-probabilities as near as another order of summation allows."""
    output = engine.outputs[req_id]
    assert output.token_ids == reference.token_ids
    gaps = [abs(a - b) for a, b in zip(output.logprobs, reference.logprobs, strict=True)]
    assert max(gaps) < LOGPROB_TOLERANCE
    assert_varied(output.token_ids)


@pytest.mark.parametrize(
    ("runner", "family", "group", "num_tokens"),
    [
        *(
            ("v1", family, group, 300)
            for family, group in (("qwen3", 1), ("llama", 3), ("qwen3", 8))
        ),
        *(
            pytest.param("v1", family, group, 300, marks=pytest.mark.nightly)
            for family, group in (("llama", 1), ("qwen3", 3), ("llama", 8))
        ),
        # Interpreted kernels take a tenth of a second per step.
        ("v2", "llama", 3, 140),
        ("v2-async", "qwen3", 8, 140),
    ],
    indirect=["runner"],
)
def test_output_equals_explicit_eviction(random_model_dir, runner, family, group, num_tokens):
    model = random_model_dir(family, group)
    prompts = {f"r{i}": [*SHARED, *random_prompt(6 + 7 * i, seed=i)] for i in range(4)}
    with running_engine(model, **OPTIONS) as engine:
        for req_id, prompt in prompts.items():
            engine.add(req_id, prompt, num_tokens)
        engine.run()
        stats = engine.stats()
        engine.assert_pool_is_empty()
    references = {
        req_id: generate_reference(
            model, prompt, num_tokens, CONFIG, unprocessed_steps=runner.unprocessed_steps
        )
        for req_id, prompt in prompts.items()
    }
    for req_id, reference in references.items():
        assert len(reference.compactions) >= num_tokens // 40
        assert_same(engine, req_id, reference)
    assert stats["compactions"] == sum(len(r.compactions) for r in references.values())
    assert stats["requests_compacted"] == 4


@pytest.mark.parametrize("runner", ["v1", "v2", "v2-async"], indirect=True)
def test_long_prompt_chunked_prefill_and_staggered_arrivals(random_model_dir, runner):
    """Prompts beyond budget + buffer in chunks of 64, requests that come and leave in between."""
    model = random_model_dir("qwen3", 3)
    lengths = {"long": (230, 110), "short": (9, 160), "middle": (100, 60), "late": (180, 80)}
    arrivals = {"long": 0, "short": 2, "middle": 40, "late": 75}
    prompts = {r: random_prompt(n, seed=n) for r, (n, _) in lengths.items()}
    with running_engine(model, max_num_batched_tokens=64, **OPTIONS) as engine:
        for step in range(120):
            for req_id, arrival in arrivals.items():
                if arrival == step:
                    engine.add(req_id, prompts[req_id], lengths[req_id][1])
            engine.step()
        engine.run()
        stats = engine.stats()
        engine.assert_pool_is_empty()
    compactions = 0
    for req_id, prompt in prompts.items():
        reference = generate_reference(
            model,
            prompt,
            lengths[req_id][1],
            CONFIG,
            unprocessed_steps=runner.unprocessed_steps,
        )
        assert_same(engine, req_id, reference)
        compactions += len(reference.compactions)
        # A long prompt is cached whole and first trimmed after `buffer` decoded tokens.
        assert reference.compactions[0].settled_len == max(64, len(prompt)) + 32
    assert stats["compactions"] == compactions


@pytest.mark.parametrize(
    ("runner", "num_tokens"), [("v1", 150), ("v2-async", 75)], indirect=["runner"]
)
def test_each_request_is_evicted_by_its_own_budget_or_not_at_all(
    random_model_dir, runner, num_tokens
):
    """One batch of mixed budgets says what each request says alone, by its own lengths."""
    model = random_model_dir("qwen3", 3)
    own = {
        "server's": CONFIG,
        "small": replace(CONFIG, budget=40),
        "large": replace(CONFIG, budget=80),
        "often": replace(CONFIG, buffer=11),
        "both": replace(CONFIG, budget=50, buffer=20),
        "off": None,
    }
    prompts = {r: [*SHARED, *random_prompt(3 + 5 * i, seed=i)] for i, r in enumerate(own)}
    with running_engine(model, **OPTIONS) as engine:
        for req_id, config in own.items():
            engine.add(req_id, prompts[req_id], num_tokens, extra_args=extra_args(config))
        engine.run()
        stats = engine.stats()
        engine.assert_pool_is_empty()
    compactions = 0
    for req_id, config in own.items():
        reference = generate_reference(
            model, prompts[req_id], num_tokens, config, unprocessed_steps=runner.unprocessed_steps
        )
        assert_same(engine, req_id, reference)
        assert (len(reference.compactions) >= 2) == (config is not None)
        compactions += len(reference.compactions)
    assert stats["compactions"] == compactions
    assert stats["requests_compacted"] == len(own) - 1


def extra_args(config: ServerOptions | None) -> dict[str, int | str] | None:
    """What a request sends to get this config from a server that runs `CONFIG`."""
    if config is None:
        return {"kv_compression": "off"}
    lengths = {"kv_budget": config.budget, "kv_buffer": config.buffer}
    default = {"kv_budget": CONFIG.budget, "kv_buffer": CONFIG.buffer}
    return dict(lengths.items() - default.items()) or None


def test_offline_a_bad_request_option_is_refused_and_the_engine_lives_on(random_model_dir):
    with running_engine(random_model_dir("qwen3", 3), **OPTIONS) as engine:
        with pytest.raises(VLLMValidationError, match="kv_budget: got 8, wanted more tokens than"):
            engine.add("bad", SHARED, 100, extra_args={"kv_budget": 8})
        assert not engine.llm.llm_engine.has_unfinished_requests()
        engine.add("good", SHARED, 100, extra_args={"kv_budget": 9})
        engine.run()
        assert engine.stats()["compactions"] == 3


def test_bfloat16_output_equals_explicit_eviction_while_scores_agree(random_model_dir):
    """bf16 rounds differently in the two engines, so the text is forced and the cache compared."""
    model = random_model_dir("qwen3", 3)
    prompt = random_prompt(90, seed=5)
    with running_engine(model, dtype="bfloat16", **OPTIONS) as engine:
        engine.add("a", prompt, 120)
        engine.run()
        stats = engine.stats()
    output = engine.outputs["a"]
    reference = generate_reference(
        model, prompt, 120, CONFIG, dtype=torch.bfloat16, forced_ids=output.token_ids
    )
    assert stats["compactions"] == len(reference.compactions) == 3
    gaps = [abs(a - b) for a, b in zip(output.logprobs, reference.logprobs, strict=True)]
    full = generate_reference(
        model, prompt, 120, None, dtype=torch.bfloat16, forced_ids=output.token_ids
    )
    to_full = [abs(a - b) for a, b in zip(output.logprobs, full.logprobs, strict=True)]
    # After the first compaction the served text follows the evicting reference, not the full one.
    after = reference.compactions[0].step + 1
    mean_gap = sum(gaps[after:]) / len(gaps[after:])
    assert mean_gap < 0.3 * sum(to_full[after:]) / len(to_full[after:])


@pytest.mark.parametrize("runner", ["v1", "v2"], indirect=True)
def test_a_dummy_run_between_steps_touches_no_window_and_no_count(random_model_dir, runner):
    """Idle data-parallel ranks and warm-up run dummy batches while requests are watched."""
    model = random_model_dir("qwen3", 3)
    prompt = random_prompt(70, seed=9)
    with running_engine(model, **OPTIONS) as engine:
        model_runner = engine.model_runner
        engine.add("a", prompt, 120)
        dummies = 0
        while engine.llm.llm_engine.has_unfinished_requests():
            engine.step()
            if engine.scheduler._tracks[0].planner.num_seats_in_use:
                before = model_runner._ring_memory.elements.clone()
                evicted = [r["evicted_tokens"] for r in model_runner.request_reports()]
                model_runner._dummy_run(4)
                assert model_runner._ring_memory.elements.equal(before)
                assert [r["evicted_tokens"] for r in model_runner.request_reports()] == evicted
                dummies += 1
        stats = engine.stats()
    reference = generate_reference(model, prompt, 120, CONFIG)
    assert_same(engine, "a", reference)
    assert stats["compactions"] == len(reference.compactions) == 3
    assert dummies > 10


def test_a_head_size_of_80_is_packed_otherwise_and_compacted_as_well(random_model_dir):
    """CPU_ATTN picks another instruction set when the head size is no multiple of 32."""
    model = random_model_dir("qwen3", 3, head_dim=80)
    prompt = random_prompt(90, seed=6)
    with running_engine(model, **OPTIONS) as engine:
        layers = engine.model_runner._compressed_layers().values()
        isa = {getattr(layer, "isa", "of a GPU") for layer in layers}
        engine.add("a", prompt, 120)
        engine.run()
        stats = engine.stats()
    assert isa == {"of a GPU" if current_platform.is_cuda() else "vec16"}
    reference = generate_reference(model, prompt, 120, CONFIG)
    assert_same(engine, "a", reference)
    assert stats["compactions"] == len(reference.compactions) == 3


@pytest.mark.parametrize("runner", ["v2-async"], indirect=True)
def test_with_every_kernel_in_triton_output_equals_explicit_eviction(
    random_model_dir, runner, monkeypatch
):
    """All that a GPU would launch, interpreted: slots, observe, score, select, compact."""
    monkeypatch.setattr("rkv_vllm.worker.layer_set.ops_for", triton_ops)
    model = random_model_dir("qwen3", 3)
    prompts = {f"r{i}": random_prompt(60 + i, seed=i) for i in range(2)}
    with running_engine(model, **OPTIONS) as engine:
        for req_id, prompt in prompts.items():
            engine.add(req_id, prompt, 72)
        engine.run()
        stats = engine.stats()
        engine.assert_pool_is_empty()
    for req_id, prompt in prompts.items():
        reference = generate_reference(
            model, prompt, 72, CONFIG, unprocessed_steps=runner.unprocessed_steps
        )
        assert_same(engine, req_id, reference)
        assert len(reference.compactions) == 2
    assert stats["compactions"] == 4
