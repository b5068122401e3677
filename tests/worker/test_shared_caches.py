"""Which layers are made to read another layer's cache, on stand-ins for vLLM's."""

from types import SimpleNamespace

import pytest

from rkv_vllm.worker.shared_caches import share_caches
from tests.worker.test_cache_views import CellBackend


def make_layers(count, prefix="model.layers", **changes):
    return {
        name: SimpleNamespace(
            layer_name=name,
            attn_backend=CellBackend("FLASH_ATTN"),
            num_kv_heads=2,
            head_size=8,
            head_size_v=8,
            kv_cache_dtype="auto",
            kv_sharing_target_layer_name=None,
            impl=SimpleNamespace(kv_sharing_target_layer_name=None),
            _k_scale=f"k scale of {name}",
            _v_scale=f"v scale of {name}",
            _k_scale_float=0.5 + i,
            _v_scale_float=0.25 + i,
            **changes,
        )
        for i in range(count)
        for name in [f"{prefix}.{i}.self_attn.attn"]
    }


def targets(layers):
    """By number, the layer that each one reads, as the layer and its implementation have it."""
    found = {}
    for name, layer in layers.items():
        assert layer.kv_sharing_target_layer_name == layer.impl.kv_sharing_target_layer_name
        if layer.kv_sharing_target_layer_name is not None:
            found[name.split(".")[-3]] = layer.kv_sharing_target_layer_name
    return found


def test_readers_get_the_name_and_the_scales_of_their_owner():
    layers = make_layers(4)
    share_caches(layers, {3: 0, 2: 1})
    assert targets(layers) == {
        "2": "model.layers.1.self_attn.attn",
        "3": "model.layers.0.self_attn.attn",
    }
    reader = layers["model.layers.3.self_attn.attn"]
    assert reader._k_scale == "k scale of model.layers.0.self_attn.attn"
    assert reader._v_scale == "v scale of model.layers.0.self_attn.attn"
    assert (reader._k_scale_float, reader._v_scale_float) == (0.5, 0.25)


def test_a_draft_models_layers_are_left_alone():
    draft = make_layers(3, prefix="draft_model.model.layers")
    share_caches({**make_layers(3), **draft}, {2: 0})
    assert targets(draft) == {}


def test_layers_that_are_missing_or_not_alike_are_refused_by_name():
    layers = make_layers(3)
    with pytest.raises(ValueError, match=r"got layer 3 reading layer 0, wanted .* \[0, 1, 2\]"):
        share_caches(layers, {3: 0})
    layers["model.layers.2.self_attn.attn"].num_kv_heads = 1
    with pytest.raises(ValueError, match="wanted equal heads and backends"):
        share_caches(layers, {2: 0})
    layers["model.layers.0.self_attn.attn"].kv_sharing_target_layer_name = "another"
    with pytest.raises(ValueError, match="an owner with a cache of its own"):
        share_caches(layers, {1: 0})
