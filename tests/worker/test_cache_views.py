"""Cache views find what a layer wrote, in every layout that vLLM can pick, or refuse by name."""

from types import SimpleNamespace

import pytest
import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl
from vllm.v1.attention.ops import triton_reshape_and_cache_flash as triton_store

from rkv_vllm.fit.refusals import ATTENTION_BACKENDS
from rkv_vllm.worker.cache_views import LAYOUTS, view_caches
from rkv_vllm.worker.latent_set import BACKENDS

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
    assert set(ATTENTION_BACKENDS) == {*LAYOUTS, *BACKENDS}


class QuantisedImplementation(CellImplementation):
    """Stores floats of a byte, each head's divided by its factor; cuts like CPU_ATTN or rounds."""

    def __init__(self, dtype: torch.dtype, of_floats: bool = False, cuts: bool = False) -> None:
        self.dtype, self.of_floats, self.cuts = dtype, of_floats, cuts

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        if self.of_floats:
            scales = (layer._k_scale_float, layer._v_scale_float)
        else:
            scales = (s.reshape(-1, 1) for s in (layer._k_scale, layer._v_scale))
        parts = [self.stored(x.float() / s) for x, s in zip((key, value), scales, strict=True)]
        super().do_kv_cache_update(layer, *parts, kv_cache, slot_mapping)

    def stored(self, numbers):
        rounded = numbers.to(self.dtype)
        if self.cuts:
            # One less where rounding went up.
            up = rounded.float().abs() > numbers.abs()
            rounded = (rounded.view(torch.uint8) - up.to(torch.uint8)).view(self.dtype)
        return rounded.view(torch.uint8)


def quantised_layers(implementation, scales, backend="FLASH_ATTN", order="LBNHC"):
    """Layers with caches of bytes; of each a tensor of factors for keys, values and the host."""
    layers = layers_in(order, lambda: implementation, backend)
    stacked = torch.zeros([SIZES[axis] for axis in order], dtype=torch.uint8)
    logical = stacked.permute([order.index(axis) for axis in AXES])
    for i, (layer, (keys, values)) in enumerate(zip(layers.values(), scales, strict=True)):
        layer.kv_cache, layer.dtype, layer.num_kv_heads = logical[i], torch.bfloat16, HEADS
        layer._k_scale, layer._v_scale = torch.tensor(keys), torch.tensor(values)
        layer._k_scale_float = float(layer._k_scale.max())
        layer._v_scale_float = float(layer._v_scale.max())
    return layers


ONE_OF_A_LAYER = [(0.05, 0.3), (1.0, 1.0), (0.7, 0.02)]
ONE_OF_A_HEAD = [([0.05, 0.06], [0.3, 2.0]), ([1.0, 1.0], [1.0, 0.5]), ([0.7, 0.1], [0.2, 0.02])]


@pytest.mark.parametrize("backend", ["FLASH_ATTN", "TRITON_ATTN", "FLASHINFER"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("scales", [ONE_OF_A_LAYER, ONE_OF_A_HEAD], ids=["layer", "head"])
@pytest.mark.parametrize("of_floats", [False, True], ids=["tensors", "floats"])
@pytest.mark.parametrize("cuts", [False, True], ids=["rounds", "cuts"])
def test_bytes_are_read_as_the_layer_means_them(backend, dtype, scales, of_floats, cuts):
    """Whatever the flag calls the cache: TRITON_ATTN takes the bytes of fp8_e5m2 for e4m3."""
    implementation = QuantisedImplementation(dtype, of_floats, cuts)
    layers = quantised_layers(implementation, scales, backend)
    views = view_caches(layers, TOKENS)
    slots = torch.arange(2 * TOKENS)
    for i, layer in enumerate(layers.values()):
        keys, values = torch.randn(2, 2 * TOKENS, HEADS, HEAD_SIZE).bfloat16()
        layer.impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, slots)
        for states, written, factor, host in (
            (views.keys, keys, layer._k_scale, layer._k_scale_float),
            (views.values, values, layer._v_scale, layer._v_scale_float),
        ):
            assert states.dtype == dtype
            factor = torch.tensor(host) if of_floats else factor
            factor = factor.expand(HEADS).view(-1, 1)
            expected = implementation.stored(written.float() / factor).view(dtype).float() * factor
            read = states.numbers(torch.tensor([0, 1]), 2 * TOKENS)[i].transpose(0, 1)
            assert read.equal(expected)


def test_bytes_of_an_unknown_meaning_are_refused():
    layers = quantised_layers(QuantisedImplementation(torch.float8_e4m3fnuz), ONE_OF_A_LAYER)
    with pytest.raises(ValueError, match=r"uint8 with strides .* bytes that are torch.float8_e4m3"):
        view_caches(layers, TOKENS)


@pytest.mark.parametrize("cache_dtype", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("isa", ["vec", "amx"])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_cpu_attn_are_found_by_its_own_op(cache_dtype, isa, model_dtype):
    """Both packings; the op cuts, where torch rounds."""
    size, tokens = 32, 64
    layers = quantised_layers(None, ONE_OF_A_LAYER, "CPU_ATTN")
    caches = torch.zeros(LAYERS, BLOCKS, HEADS, tokens, 2 * size, dtype=torch.uint8)
    impl = object.__new__(CPUAttentionBackendImpl)
    impl.attn_type, impl.kv_cache_dtype = AttentionType.DECODER, cache_dtype
    for layer, cache in zip(layers.values(), caches, strict=True):
        layer.kv_cache, layer.head_size, layer.impl = cache, size, impl
        layer.dtype, layer.isa = model_dtype, isa
    views = view_caches(layers, tokens)
    assert views.keys.dtype == {"fp8_e4m3": torch.float8_e4m3fn}.get(cache_dtype, torch.float8_e5m2)
    generator = torch.Generator().manual_seed(5)
    for i, layer in enumerate(layers.values()):
        keys, values = torch.randn(2, 90, HEADS, size, generator=generator).to(model_dtype)
        impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, torch.arange(90))
        for states, written in ((views.keys, keys), (views.values, values)):
            read = states.numbers(torch.tensor([0, 1]), 90)[i].transpose(0, 1)
            gap = (read - written.float()) / written.float()
            # It cuts: what is read is nearer to zero, by less than a step.
            assert (gap < 1e-3).all()
            normal = written.float().abs() > 0.25
            assert (gap[normal] > -0.26).all()


@pytest.mark.parametrize("cache_dtype", ["fp8", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("order", ["LBNHC", "BLNHC"])
def test_triton_attn_stores_e4m3_whatever_it_is_called(monkeypatch, cache_dtype, order):
    """Its own kernel, interpreted as if a Hopper ran it."""
    monkeypatch.setattr(triton_store, "_is_supported_kv_cache_dtype", lambda dtype: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    impl = object.__new__(TritonAttentionImpl)
    impl.attn_type, impl.kv_cache_dtype = AttentionType.DECODER, cache_dtype
    impl.head_size, impl.fp8_dtype = HEAD_SIZE, current_platform.fp8_dtype()
    # The second one is new in vLLM 0.33, for another platform.
    impl._is_per_token_head_quant = impl._set_kv_ptr_range = False
    layers = quantised_layers(impl, ONE_OF_A_LAYER, "TRITON_ATTN", order)
    views = view_caches(layers, TOKENS)
    assert views.keys.dtype == views.values.dtype == torch.float8_e4m3fn
    for i, (keys, values) in enumerate(ONE_OF_A_LAYER):
        assert views.keys.quantisation.scale[i].tolist() == pytest.approx([keys] * HEADS)
        assert views.values.quantisation.scale[i].tolist() == pytest.approx([values] * HEADS)
