"""Draft models beside a compacted target: the text is explicit eviction's, drafts stay as good."""

import pytest
import torch

import rkv_vllm
from rkv_vllm.options import ServerOptions
from tests.engine import running_engine
from tests.models import kv_cache_bytes, random_model, random_prompt
from tests.speculation import (
    DRAFTS,
    DraftLog,
    assert_compacted_when_due,
    assert_equals_explicit_eviction,
    random_eagle,
)

pytestmark = pytest.mark.engine

CONFIG = ServerOptions(budget=40, buffer=16)
NUM_BLOCKS = 256


@pytest.fixture(autouse=True)
def nothing_is_compiled():
    """vLLM compiles parts of its rejection sampler even in eager engines, for every batch size."""
    with torch._dynamo.config.patch(disable=True):
        yield


def drafter_for(target, name: str, tmp_path):
    """A draft model and the bytes of a token in its cache and the target's."""
    if name == "itself":
        drafter, method = target, "draft_model"
    elif name == "another":
        # Of other heads, so that its layers are a set of their own.
        drafter = random_model(tmp_path / "drafter", "llama", 1, 4, layers=1, seed=5)
        method = "draft_model"
    else:
        drafter, method = random_eagle(tmp_path / "drafter", target), "eagle"
    speculation = {
        "method": method,
        "model": str(drafter),
        "num_speculative_tokens": DRAFTS,
    }
    return speculation, kv_cache_bytes(target, 1) + kv_cache_bytes(drafter, 1)


@pytest.mark.parametrize(
    ("runner", "drafter"),
    [
        ("v2-async", "itself"),
        pytest.param("v2", "itself", marks=pytest.mark.nightly),
        pytest.param("v2-async", "eagle", marks=pytest.mark.nightly),
        pytest.param("v2", "eagle", marks=pytest.mark.nightly),
        pytest.param("v2-async", "another", marks=pytest.mark.nightly),
    ],
    indirect=["runner"],
)
def test_text_equals_explicit_eviction_beside_a_draft_model(
    random_model_dir, tmp_path, runner, drafter
):
    model, num_tokens = random_model_dir("llama", 3, layers=2), 90
    prompts = {f"r{i}": random_prompt(20 + 9 * i, seed=i) for i in range(3)}
    speculation, token_bytes = drafter_for(model, drafter, tmp_path)
    options = rkv_vllm.engine_args(budget=CONFIG.budget, buffer=CONFIG.buffer)
    options["kv_cache_memory_bytes"] = NUM_BLOCKS * 32 * token_bytes
    with running_engine(model, NUM_BLOCKS, speculative_config=speculation, **options) as engine:
        log = DraftLog(engine)
        for req_id, prompt in prompts.items():
            engine.add(req_id, prompt, num_tokens)
        engine.run()
        stats = engine.stats()
        layers = engine.model_runner.compactor.groups[0].layer_sets
        engine.assert_pool_is_empty()
    assert_equals_explicit_eviction(engine, log, model, prompts, num_tokens, CONFIG)
    assert_compacted_when_due(log, prompts, CONFIG, num_tokens)
    assert stats["compactions"] >= 3 * 3
    assert stats["deferred"] == 0
    # One set of the target's layers, one of the draft model's.
    assert len(layers) == 2
    rings = [layer_set.ring.queries for layer_set in layers]
    # Every layer has recorded at every place, the draft model's too.
    assert all(ring.any(dim=-1).any(dim=-1).any(dim=0).all() for ring in rings)
    if drafter == "itself":
        # It reads what the target reads, recorded in the same places, so it keeps the same.
        # What differs are tokens that one of the two has not computed yet.
        assert torch.isclose(*rings, atol=1e-4).float().mean() > 0.95
        assert log.acceptance(is_compacted=False) > 0.95
        assert log.acceptance(is_compacted=True) > 0.95
