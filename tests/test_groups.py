"""Compressed groups beside groups that vLLM keeps, and several compressed groups in one model."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

import rkv_vllm
from rkv_vllm.fit import refusals
from rkv_vllm.methods.rkv import RKV
from rkv_vllm.options import ServerOptions
from rkv_vllm.scheduling.spec import CompressedAttentionSpec
from tests.engine import Engine, running_engine
from tests.layered_reference import generate_layered_reference
from tests.models import assert_varied, random_prompt

pytestmark = pytest.mark.engine

CONFIG = ServerOptions(budget=64, buffer=32)
LOGPROB_TOLERANCE = 1e-3
SHARED = random_prompt(32, seed=1)
PROMPTS = {f"r{i}": [*SHARED, *random_prompt(6 + 7 * i, seed=i)] for i in range(4)}
FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = 40
# Budgets by layer, for as many layers.
LADDERS = {6: (96, 96, 64, 64, 40, 40), 3: (72, 64, 40)}


class Ladder(RKV):
    """R-KV with less for later layers."""

    @classmethod
    def layer_budgets(cls, options, budget: int, num_layers: int) -> Sequence[int]:
        return LADDERS[num_layers]


@pytest.fixture
def windows_allowed(monkeypatch):
    """Users are refused; what the groups do with such a model is tested all the same."""
    rules = tuple(rule for rule in refusals.REFUSALS if "sliding-window" not in rule.feature)
    assert len(rules) == len(refusals.REFUSALS) - 1
    monkeypatch.setattr(refusals, "REFUSALS", rules)


class CacheWatch:
    """Sees which blocks a flush writes, in all layers of all groups."""

    def __init__(self, engine: Engine) -> None:
        self.num_flushes = 0
        self._layers = [
            layer.kv_cache
            for layer in engine.model_runner.compilation_config.static_forward_context.values()
        ]
        self._flush = engine.model_runner.compactor.flush
        engine.model_runner.compactor.flush = self._watched_flush

    def _watched_flush(self, *args):
        before = [cache.clone() for cache in self._layers]
        done = self._flush(*args)
        allowed = {block_id for directive in done for block_id in directive.new_block_ids}
        self.num_flushes += bool(done)
        for old, cache in zip(before, self._layers, strict=True):
            changed = (old != cache).flatten(1).any(dim=1).nonzero().flatten().tolist()
            assert set(changed) <= allowed
        return done


def serve(model, num_tokens: int, num_groups: int, **options):
    """Run all prompts, then some of them again; returns (engine, compactions by group id)."""
    with running_engine(model, 256, num_groups, **options) as engine:
        watch = CacheWatch(engine)
        for req_id, prompt in PROMPTS.items():
            engine.add(req_id, prompt, num_tokens)
        engine.run()
        groups = engine.model_runner.compactor.groups
        compactions = {group_id: group.num_compactions for group_id, group in groups.items()}
        assert engine.stats()["compactions"] == sum(compactions.values())
        assert watch.num_flushes > 0
        assert engine.compacted_rows_checked > 0
        engine.add("again", PROMPTS["r3"], 40)
        engine.run()
        # Blocks that were hashed before the first compaction are found again.
        assert engine.num_cached_tokens("again") >= 32
        assert engine.outputs["again"].token_ids == engine.outputs["r3"].token_ids[:40]
        engine.assert_pool_is_empty()
        specs = [g.kv_cache_spec for g in engine.scheduler.kv_cache_config.kv_cache_groups]
        assert [isinstance(spec, CompressedAttentionSpec) for spec in specs] == [
            group_id in groups for group_id in range(num_groups)
        ]
        return engine, specs, compactions


def assert_equal_explicit_eviction(engine, model, num_tokens, configs, runner) -> torch.Tensor:
    """Returns the reference's compactions [requests, layers]."""
    compactions = []
    for req_id, prompt in PROMPTS.items():
        reference = generate_layered_reference(
            model, prompt, num_tokens, configs, runner.unprocessed_steps
        )
        output = engine.outputs[req_id]
        assert output.token_ids == reference.token_ids, req_id
        gaps = [abs(a - b) for a, b in zip(output.logprobs, reference.logprobs, strict=True)]
        assert max(gaps) < LOGPROB_TOLERANCE
        assert_varied(output.token_ids)
        compactions.append(reference.compactions)
    return torch.tensor(compactions)


@pytest.mark.parametrize(
    ("runner", "layer_types", "num_groups", "num_tokens"),
    [
        ("v1", (SLIDING, FULL) * 3, 2, 150),
        # Twice as many full layers as sliding ones: vLLM makes two groups of one spec of them.
        ("v1", (FULL, SLIDING, FULL) * 2, 3, 150),
        ("v2", (SLIDING, FULL) * 2, 2, 80),
        ("v2-async", (FULL, SLIDING, FULL), 3, 80),
    ],
    indirect=["runner"],
)
def test_full_layers_are_compacted_beside_sliding_ones(
    random_model_dir, windows_allowed, runner, layer_types, num_groups, num_tokens
):
    model = random_model_dir(
        "llama", 3, layers=len(layer_types), layer_types=layer_types, sliding_window=WINDOW
    )
    options = rkv_vllm.engine_args(budget=CONFIG.budget, buffer=CONFIG.buffer)
    engine, _, compactions = serve(model, num_tokens, num_groups, **options)
    configs = [CONFIG if layer_type == FULL else None for layer_type in layer_types]
    expected = assert_equal_explicit_eviction(engine, model, num_tokens, configs, runner)
    per_group = expected[:, layer_types.index(FULL)].sum().item()
    assert per_group >= 4
    assert list(compactions.values()) == [per_group] * (num_groups - 1)


@pytest.mark.parametrize(
    ("runner", "ladder", "num_tokens"),
    [("v1", LADDERS[6], 150), ("v2-async", LADDERS[3], 90)],
    indirect=["runner"],
)
def test_every_class_of_layer_budgets_is_compacted_for_itself(
    random_model_dir, runner, ladder, num_tokens
):
    model = random_model_dir("llama", 3, layers=len(ladder))
    method = f"{Ladder.__module__}.{Ladder.__qualname__}"
    options = rkv_vllm.engine_args(method=method, budget=CONFIG.budget, buffer=CONFIG.buffer)
    engine, specs, compactions = serve(model, num_tokens, 3, **options)
    configs = [replace(CONFIG, budget=budget) for budget in ladder]
    expected = assert_equal_explicit_eviction(engine, model, num_tokens, configs, runner)
    by_budget = dict(zip(ladder, expected.sum(dim=0).tolist(), strict=True))
    assert len(by_budget) == 3
    assert min(by_budget.values()) >= 2
    assert len(set(by_budget.values())) > 1
    budgets = [spec.layer_budget or CONFIG.budget for spec in specs]
    assert {budgets[g]: number for g, number in compactions.items()} == by_budget
