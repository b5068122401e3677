"""Compressed groups beside groups that vLLM keeps, and several compressed groups in one model."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

import rkv_vllm
from rkv_vllm.layer_budgets import LayerClass, write_classes
from rkv_vllm.methods.rkv import RKV
from rkv_vllm.options import ServerOptions
from tests.engine import BLOCK_SIZE, running_engine
from tests.families import FULL, SLIDING, WINDOW
from tests.layered_reference import generate_layered_reference
from tests.served_groups import PROMPTS, assert_equal_explicit_eviction, serve

pytestmark = pytest.mark.engine

CONFIG = ServerOptions(budget=64, buffer=32)
# Budgets by layer, for as many layers.
LADDERS = {6: (96, 96, 64, 64, 40, 40), 3: (72, 64, 40)}


class Ladder(RKV):
    """R-KV with less for later layers."""

    @classmethod
    def layer_budgets(cls, options, budget: int, num_layers: int) -> Sequence[int]:
        return LADDERS[num_layers]


@pytest.mark.parametrize(
    ("runner", "layer_types", "num_groups", "num_tokens"),
    [
        pytest.param("v1", (SLIDING, FULL) * 3, 2, 150, marks=pytest.mark.nightly),
        # Twice as many full layers as sliding ones: vLLM makes two groups of one spec of them.
        ("v1", (FULL, SLIDING, FULL) * 2, 3, 150),
        pytest.param("v2", (SLIDING, FULL) * 2, 2, 80, marks=pytest.mark.nightly),
        ("v2-async", (FULL, SLIDING, FULL), 3, 80),
    ],
    indirect=["runner"],
)
def test_full_layers_are_compacted_beside_sliding_ones(
    random_model_dir, runner, layer_types, num_groups, num_tokens
):
    model = random_model_dir(
        "llama", 3, layers=len(layer_types), layer_types=layer_types, sliding_window=WINDOW
    )
    options = rkv_vllm.engine_args(budget=CONFIG.budget, buffer=CONFIG.buffer)
    engine, _, compactions, _ = serve(model, num_tokens, num_groups, **options)
    configs = [CONFIG if layer_type == FULL else None for layer_type in layer_types]
    expected = assert_equal_explicit_eviction(
        engine, model, num_tokens, configs, runner.unprocessed_steps
    )
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
    engine, specs, compactions, _ = serve(model, num_tokens, 3, **options)
    configs = [replace(CONFIG, budget=budget) for budget in ladder]
    expected = assert_equal_explicit_eviction(
        engine, model, num_tokens, configs, runner.unprocessed_steps
    )
    by_budget = dict(zip(ladder, expected.sum(dim=0).tolist(), strict=True))
    assert len(by_budget) == 3
    assert min(by_budget.values()) >= 2
    assert len(set(by_budget.values())) > 1
    budgets = [spec.layer_budget or CONFIG.budget for spec in specs]
    assert {budgets[g]: number for g, number in compactions.items()} == by_budget


@pytest.mark.parametrize(
    ("runner", "num_layers", "ladder", "num_tokens"),
    [
        ("v1", 6, (64, 64, 40, 40, 16, 16), 120),
        pytest.param("v2-async", 3, (70, 40, 10), 90, marks=pytest.mark.nightly),
    ],
    indirect=["runner"],
)
def test_a_pyramid_is_compacted_class_by_class_and_each_holds_only_its_own_blocks(
    random_model_dir, runner, num_layers, ladder, num_tokens
):
    """Blocks are a third of a uniform group's, and upper layers hold fewer of them."""
    model = random_model_dir("llama", 3, layers=num_layers)
    config = ServerOptions(budget=40, buffer=32)
    options = rkv_vllm.engine_args(layer_budgets="pyramid", budget=40, buffer=32)
    engine, specs, compactions, blocks_left = serve(model, num_tokens, 3, **options)
    configs = [replace(config, budget=budget) for budget in ladder]
    expected = assert_equal_explicit_eviction(
        engine, model, num_tokens, configs, runner.unprocessed_steps
    )
    by_budget = dict(zip(ladder, expected.sum(dim=0).tolist(), strict=True))
    assert min(by_budget.values()) >= len(PROMPTS)
    budgets = [spec.layer_budget or config.budget for spec in specs]
    assert {budgets[g]: number for g, number in compactions.items()} == by_budget
    # A compaction leaves the budget, and the tokens of the steps under way.
    in_flight = 1 + runner.unprocessed_steps
    assert {budgets[g]: max(left) for g, left in blocks_left.items()} == {
        budget: -(-(budget + in_flight) // BLOCK_SIZE) for budget in set(ladder)
    }


def test_requests_scale_the_pyramid_and_files_make_classes_of_any_layers(
    random_model_dir, tmp_path
):
    model = random_model_dir("llama", 3)
    path = tmp_path / "classes.json"
    write_classes(path, model.name, [LayerClass((0, 3), 3), LayerClass((1, 2), 1)])
    options = rkv_vllm.engine_args(layer_budgets=str(path), budget=40, buffer=32)
    with running_engine(model, 256, 2, **options) as engine:
        engine.add("whole", PROMPTS["r0"], 120)
        engine.add("half", PROMPTS["r0"], 120, extra_args={"kv_budget": 20})
        engine.run()
        stats = engine.stats()
        engine.assert_pool_is_empty()
    compactions = 0
    for req_id, ladder in {"whole": (56, 24, 24, 56), "half": (26, 14, 14, 26)}.items():
        configs = [ServerOptions(budget=budget, buffer=32) for budget in ladder]
        expected = generate_layered_reference(model, PROMPTS["r0"], 120, configs)
        assert engine.outputs[req_id].token_ids == expected.token_ids, req_id
        compactions += expected.compactions[0] + expected.compactions[1]
    assert stats["compactions"] == compactions >= 6
