"""What is never compacted is byte-identical to stock vLLM."""

import pytest

import rkv_vllm
from tests.engine import running_engine
from tests.models import random_prompt

pytestmark = pytest.mark.engine

PROMPTS = {f"r{i}": random_prompt(15 + 20 * i, seed=i) for i in range(4)}


def serve(model, num_tokens, **options):
    with running_engine(model, **options) as engine:
        for number, (req_id, prompt) in enumerate(PROMPTS.items()):
            sampled = {"temperature": 0.9, "seed": 7} if number % 2 else {}
            engine.add(req_id, prompt, num_tokens, **sampled)
        engine.run()
        return engine.outputs, engine.stats() if options else None


@pytest.mark.parametrize(
    ("runner", "num_tokens"), [("v1", 80), ("v2-async", 30)], indirect=["runner"]
)
def test_a_budget_beyond_the_length_is_byte_identical_to_stock(
    random_model_dir, runner, num_tokens
):
    model = random_model_dir("llama", 3)
    stock, _ = serve(model, num_tokens)
    ours, stats = serve(model, num_tokens, **rkv_vllm.engine_args(budget=200, buffer=8))
    # Equality of floats, not nearness: the same kernels on the same shapes.
    assert ours == stock
    assert stats["compactions"] == stats["deferred"] == stats["evicted_tokens"] == 0


def test_the_comparison_sees_an_eviction(random_model_dir):
    model = random_model_dir("llama", 3)
    stock, _ = serve(model, 80)
    ours, stats = serve(model, 80, **rkv_vllm.engine_args(budget=40, buffer=8))
    assert stats["compactions"] > 10
    assert ours != stock
