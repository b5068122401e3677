"""A protected prefix is neither judged nor moved: served requests say what explicit eviction says.

Prefixes inside a block, of whole blocks and of the whole prompt; alone, shared, and recomputed.
"""

from dataclasses import replace

import pytest

import rkv_vllm
from rkv_vllm.methods import DenseMethod, Need
from rkv_vllm.options import ServerOptions
from tests.engine import BLOCK_SIZE, Engine, running_engine
from tests.methods import dense
from tests.models import random_prompt
from tests.reference import generate_reference

pytestmark = pytest.mark.engine

CONFIG = ServerOptions(budget=24, buffer=12)
OPTIONS = rkv_vllm.engine_args(budget=24, buffer=12)
LOGPROB_TOLERANCE = 1e-3
PROMPT = random_prompt(70, seed=1)


def assert_equals_explicit_eviction(
    engine: Engine, req_id: str, model, prompt, protect, num_tokens, **how
) -> int:
    """Same tokens and log-probabilities; returns the reference's compactions."""
    config = replace(CONFIG, protect=protect)
    expected = generate_reference(model, prompt, num_tokens, config, **how)
    output = engine.outputs[req_id]
    assert output.token_ids == expected.token_ids, req_id
    gaps = [abs(a - b) for a, b in zip(output.logprobs, expected.logprobs, strict=True)]
    assert max(gaps) < LOGPROB_TOLERANCE, req_id
    return len(expected.compactions)


@pytest.mark.parametrize(
    ("runner", "num_tokens"), [("v1", 100), ("v2-async", 60)], indirect=["runner"]
)
def test_output_equals_explicit_eviction_behind_a_prefix(random_model_dir, runner, num_tokens):
    """Two requests share each prefix: its last, partly protected block is shared as well."""
    model = random_model_dir("qwen3", 3)
    protects = {"none": "none", "few": 5, "blocks": BLOCK_SIZE, "beyond": 75, "prompt": "prompt"}
    requests = {
        f"{name}-{i}": (what, [*PROMPT, *random_prompt(3 * i, seed=7)])
        for name, what in protects.items()
        for i in range(2)
    }
    with running_engine(model, **OPTIONS) as engine:
        for req_id, (protect, prompt) in requests.items():
            engine.add(req_id, prompt, num_tokens, extra_args={"kv_protect": protect})
        engine.run()
        stats = engine.stats()
        engine.assert_pool_is_empty()
    compactions = 0
    for req_id, (protect, prompt) in requests.items():
        compactions += assert_equals_explicit_eviction(
            engine,
            req_id,
            model,
            prompt,
            protect,
            num_tokens,
            unprocessed_steps=runner.unprocessed_steps,
        )
    assert stats["compactions"] == compactions >= 2 * len(requests)
    assert stats["requests_compacted"] == len(requests)


@pytest.mark.parametrize(("runner", "num_tokens"), [("v1", 100), ("v2", 70)], indirect=["runner"])
def test_a_preempted_request_protects_the_same_prefix_again(random_model_dir, runner, num_tokens):
    """The prompt is protected, not what is prefilled when the text is recomputed."""
    model = random_model_dir("llama", 3)
    requests = {
        "prompt": ("prompt", PROMPT[:45]),
        "same": ("prompt", PROMPT[:45]),
        "few": (5, PROMPT[:45]),
        "beyond": (60, PROMPT[:45]),
    }
    with running_engine(model, max_num_batched_tokens=16, **OPTIONS) as engine:
        for req_id, (protect, prompt) in requests.items():
            engine.add(req_id, prompt, num_tokens, extra_args={"kv_protect": protect})
        while engine.stats()["compactions"] < len(requests):
            engine.step()
        assert engine.llm.reset_prefix_cache(reset_running_requests=True)
        engine.run()
        stats = engine.stats()
        engine.assert_pool_is_empty()
    assert set(engine.preempted_at) == set(requests)
    compactions = 0
    for req_id, (protect, prompt) in requests.items():
        restarts = engine.preempted_at[req_id]
        compactions += assert_equals_explicit_eviction(
            engine, req_id, model, prompt, protect, num_tokens, recompute_at=restarts
        )
    # Skipped: due in the last step of a request.
    assert stats["compactions"] + stats["skipped"] == compactions > len(requests)


class DenseRKV(DenseMethod):
    """R-KV in the plain way: what it is shown are the tokens behind the prefix and the window."""

    @classmethod
    def need(cls, options):
        return Need(queries=True)

    def score_dense(self, keys, values, queries, layer, eviction):
        return dense.scores(keys.cpu(), queries.cpu()).to(keys.device)


@pytest.mark.parametrize("runner", ["v1", "v2-async"], indirect=True)
def test_a_dense_method_is_shown_what_lies_behind_the_prefix(random_model_dir, runner):
    model = random_model_dir("qwen3", 3)
    method = f"{DenseRKV.__module__}.{DenseRKV.__qualname__}"
    options = rkv_vllm.engine_args(method, budget=24, buffer=12, protect="prompt")
    prompts = {"a": PROMPT, "b": PROMPT, "c": PROMPT[:37]}
    with running_engine(model, **options) as engine:
        for req_id, prompt in prompts.items():
            engine.add(req_id, prompt, 60)
        engine.run()
        stats = engine.stats()
        engine.assert_pool_is_empty()
    compactions = 0
    for req_id, prompt in prompts.items():
        compactions += assert_equals_explicit_eviction(
            engine,
            req_id,
            model,
            prompt,
            "prompt",
            60,
            unprocessed_steps=runner.unprocessed_steps,
        )
    assert stats["compactions"] == compactions >= len(prompts)
