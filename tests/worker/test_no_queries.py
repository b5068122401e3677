"""A method that asks for no queries costs no ring, no hook and no launch per layer."""

import pytest
import torch

import rkv_vllm
from rkv_vllm.methods.base import DenseMethod
from rkv_vllm.options import ServerOptions
from tests import reference
from tests.engine import running_engine
from tests.models import random_prompt

pytestmark = pytest.mark.engine


class Smallest(DenseMethod):
    """Keeps the keys of the smallest norm."""

    def score_dense(self, keys, values, queries, layer, eviction):
        assert queries is None
        return -keys.float().norm(dim=-1)


def keep_smallest(keys, queries, budget, *, window=8, **_):
    """What the frame makes of that score, for the reference: [heads, budget], ascending."""
    candidates = keys[:, : keys.shape[1] - window].float().norm(dim=-1)
    kept = candidates.argsort(dim=1, stable=True)[:, : budget - window].sort(dim=1).values
    newest = torch.arange(keys.shape[1] - window, keys.shape[1]).expand(keys.shape[0], -1)
    return torch.cat((kept, newest), dim=1)


@pytest.mark.parametrize(
    ("runner", "num_tokens"), [("v1", 130), ("v2-async", 75)], indirect=["runner"]
)
def test_output_equals_explicit_eviction_with_nothing_recorded(
    random_model_dir, runner, num_tokens, monkeypatch
):
    monkeypatch.setattr(reference, "keep_indices", keep_smallest)
    # Qwen3 gives all keys of a head one norm.
    model = random_model_dir("llama", 3)
    prompts = {f"r{i}": random_prompt(60 + 5 * i, seed=i) for i in range(2)}
    method = f"{Smallest.__module__}.{Smallest.__qualname__}"
    options = rkv_vllm.engine_args(method=method, budget=48, buffer=16)
    with running_engine(model, **options) as engine:
        for req_id, prompt in prompts.items():
            engine.add(req_id, prompt, num_tokens)
        engine.run()
        stats = engine.stats()
        engine.assert_pool_is_empty()
        model_runner = engine.model_runner
        assert model_runner._ring_memory is None
        for layer in model_runner._compressed_layers().values():
            assert not type(layer.impl).__name__.startswith("Observing")
        assert all(s.ring is None for s in model_runner.compactor.groups[0].layer_sets)
    compactions = 0
    config = ServerOptions(budget=48, buffer=16)
    for req_id, prompt in prompts.items():
        expected = reference.generate_reference(
            model, prompt, num_tokens, config, unprocessed_steps=runner.unprocessed_steps
        )
        assert engine.outputs[req_id].token_ids == expected.token_ids
        compactions += len(expected.compactions)
    assert stats["compactions"] == compactions > 4
