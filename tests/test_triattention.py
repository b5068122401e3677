"""Served requests keep what TriAttention's formula says of their keys, from a file on disk."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rkv_vllm
from rkv_vllm.methods.query_statistics import QueryStatistics, load_statistics
from rkv_vllm.options import ServerOptions
from tests.engine import running_engine
from tests.layered_reference import generate_layered_reference
from tests.models import random_prompt

pytestmark = pytest.mark.engine

LAYERS, KV_HEADS, GROUP, SIZE = 4, 2, 3, 32
CONFIG = ServerOptions(budget=64, buffer=32)
LOGPROB_TOLERANCE = 1e-3


def random_statistics(name: str) -> QueryStatistics:
    generator = torch.Generator().manual_seed(1)
    shape = (LAYERS, KV_HEADS * GROUP, SIZE // 2)
    real, imaginary = torch.randn((2, *shape), generator=generator)
    return QueryStatistics(
        model=name,
        num_kv_heads=KV_HEADS,
        num_tokens=1,
        inv_freq=1e6 ** -(torch.arange(SIZE // 2) / (SIZE // 2)),
        mean_query=torch.cat([real, imaginary], dim=-1),
        mean_magnitude=torch.hypot(real, imaginary) + torch.rand(shape, generator=generator),
    )


class ExplicitChoice:
    """A `Keep` of the reference, by the formula without positions, in float64."""

    def __init__(self, statistics: QueryStatistics, budgets: Sequence[int]) -> None:
        self.statistics = statistics
        self.budgets = budgets

    def __call__(self, layer, settled_logical_len, keys, values, queries):
        n, window, budget = keys.shape[1], CONFIG.window, self.budgets[layer]
        kept = self._scores(keys[:, : n - window].double(), layer, settled_logical_len)
        kept = kept.topk(budget - window).indices.sort().values
        return torch.cat([kept, torch.arange(n - window, n).expand(KV_HEADS, -1)], dim=1)

    def _scores(self, keys, layer: int, next_position: int):
        keys = torch.complex(*keys.chunk(2, dim=-1))
        means = torch.complex(*self.statistics.mean_query[layer].double().chunk(2, dim=-1))
        rest = self.statistics.mean_magnitude[layer] - means.abs()
        scores = []
        for head in range(KV_HEADS * GROUP):
            own = keys[head // GROUP]
            total = (rest[head] * own.abs()).sum(dim=-1)
            for power in range(17):
                angles = (next_position + 2**power) * self.statistics.inv_freq.double()
                query = means[head] * torch.exp(1j * angles)
                total += (query * own.conj()).real.sum(dim=-1) / 17
            scores.append((total - total.mean()) / total.std(correction=0))
        return torch.stack(scores).view(KV_HEADS, GROUP, -1).amax(dim=1)


def serve(model, prompts, num_tokens: int, num_groups: int, **options):
    """Run all prompts; returns the engine and what it counted."""
    with running_engine(model, 256, num_groups, **options) as engine:
        for req_id, prompt in prompts.items():
            engine.add(req_id, prompt, num_tokens)
        engine.run()
        stats = engine.stats()
        engine.assert_pool_is_empty()
    assert stats["non_finite"] == 0
    return engine, stats


def assert_says(output, expected) -> None:
    assert output.token_ids == expected.token_ids
    gaps = [abs(a - b) for a, b in zip(output.logprobs, expected.logprobs, strict=True)]
    assert max(gaps) < LOGPROB_TOLERANCE


@pytest.mark.parametrize(
    ("runner", "layer_budgets", "ladder"),
    [("v1", "method", (64,) * LAYERS), ("v1", "pyramid", (117, 82, 46, 11))],
    indirect=["runner"],
)
def test_output_equals_explicit_eviction(random_model_dir, tmp_path, runner, layer_budgets, ladder):
    """In groups of layers as well: each finds its own statistics."""
    model = random_model_dir("llama", GROUP)
    path = str(tmp_path / "statistics.safetensors")
    random_statistics(model.name).save(Path(path))
    terms = {"budget": CONFIG.budget, "buffer": CONFIG.buffer, "layer_budgets": layer_budgets}
    options = rkv_vllm.engine_args("triattention", statistics=path, **terms)
    prompts = {f"r{i}": random_prompt(30 + 11 * i, seed=i) for i in range(3)}
    engine, stats = serve(model, prompts, 200, len(set(ladder)), **options)
    configs = [replace(CONFIG, budget=budget) for budget in ladder]
    choice = ExplicitChoice(load_statistics(path), ladder)
    compactions = dict.fromkeys(ladder, 0)
    for req_id, prompt in prompts.items():
        expected = generate_layered_reference(model, prompt, 200, configs, keep=choice)
        assert_says(engine.outputs[req_id], expected)
        for budget, count in dict(zip(ladder, expected.compactions, strict=True)).items():
            compactions[budget] += count
    assert stats["compactions"] == sum(compactions.values())
    assert min(compactions.values()) >= 2 * len(prompts)
    # Nothing but the scores of this method tells its output from R-KV's.
    other = generate_layered_reference(model, prompts["r0"], 200, configs)
    assert engine.outputs["r0"].token_ids != other.token_ids
