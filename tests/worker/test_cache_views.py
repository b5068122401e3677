"""Cache views find what a layer wrote, in every layout that vLLM can pick, or refuse by name."""

from types import SimpleNamespace

import pytest
import torch

from rkv_vllm.fit.refusals import ATTENTION_BACKENDS
from rkv_vllm.worker.cache_views import LAYOUTS, view_caches

LAYERS, BLOCKS, HEADS, TOKENS, HEAD_SIZE = 3, 8, 2, 16, 8
AXES = "LBHNC"
SIZES = dict(zip(AXES, (LAYERS, BLOCKS, HEADS, TOKENS, 2 * HEAD_SIZE), strict=True))


class CellBackend:
    """A backend that keeps a token's key and behind it its value in one cell."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_name(self) -> str:
        return self.name


class CellImplementation:
    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        size = kv_cache.shape[2]
        kv_cache[slot_mapping // size, :, slot_mapping % size] = torch.cat([key, value], dim=-1)


class SwappedImplementation(CellImplementation):
    """Puts the value first, as no known backend does."""

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        super().do_kv_cache_update(layer, value, key, kv_cache, slot_mapping)


def layers_in(order: str, implementation=CellImplementation, backend="FLASH_ATTN"):
    """Layers whose caches lie in one allocation with the axes in this physical order."""
    physical = torch.zeros([SIZES[axis] for axis in order], dtype=torch.bfloat16)
    logical = physical.permute([order.index(axis) for axis in AXES])
    return {
        f"layers.{i}": SimpleNamespace(
            attn_backend=CellBackend(backend),
            head_size=HEAD_SIZE,
            impl=implementation(),
            kv_cache=logical[i],
        )
        for i in range(LAYERS)
    }


@pytest.mark.parametrize("backend", ["FLASH_ATTN", "TRITON_ATTN", "FLASHINFER"])
@pytest.mark.parametrize("order", ["LBNHC", "LBHNC", "BLNHC", "BLHNC", "BHLNC"])
@pytest.mark.parametrize("ratio", [1, 2])
def test_views_read_back_what_the_layers_write(backend, order, ratio):
    """With ratio 2 the backend splits each block of the scheduler into two kernel blocks."""
    layers = layers_in(order, backend=backend)
    block_size = ratio * TOKENS
    views = view_caches(layers, block_size)
    block_ids = torch.tensor([2, 0, 3])
    num_tokens = 2 * block_size + 5
    tokens = torch.arange(num_tokens)
    slots = block_ids[tokens // block_size] * block_size + tokens % block_size
    for i, layer in enumerate(layers.values()):
        keys = torch.randn(num_tokens, HEADS, HEAD_SIZE).bfloat16()
        values = torch.randn(num_tokens, HEADS, HEAD_SIZE).bfloat16()
        layer.impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, slots)
        assert views.keys.read(block_ids, num_tokens)[i].equal(keys.transpose(0, 1))
        assert views.values.read(block_ids, num_tokens)[i].equal(values.transpose(0, 1))
    assert views.layer_names == list(layers)


def test_the_probe_leaves_the_cache_as_it_was():
    layers = layers_in("LBNHC")
    view_caches(layers, TOKENS)
    assert not any(layer.kv_cache.any() for layer in layers.values())


def test_an_unknown_backend_is_refused_by_name():
    with pytest.raises(ValueError, match=r"got FLEX_ATTENTION; choose .* --attention-backend"):
        view_caches(layers_in("LBNHC", backend="FLEX_ATTENTION"), TOKENS)


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match=r"FLASH_ATTN lays out its cache .* in an unknown way"):
        view_caches(layers_in("LBNHC", SwappedImplementation), TOKENS)


def test_the_backends_checked_at_start_are_those_whose_layouts_are_known():
    assert set(ATTENTION_BACKENDS) == set(LAYOUTS)
