"""Views of the attention layers' KV caches, whatever the backend's layout.

Knows how attention backends pack a block; knows no requests. One view spans all layers, because
vLLM places the layers of one spec at a constant stride in one allocation. Next: kernels/paged.py
for what a view can do, flush.py for who uses it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import Attention

from rkv_vllm.fit.overrides import calls
from rkv_vllm.kernels.paged import Packing, PagedStates, Quantisation
from rkv_vllm.worker.cache_readings import TOLERANCE, Reading, readings_of, trial_numbers


@dataclass(frozen=True)
class CacheViews:
    """Keys and values of all compressed layers.

    Attributes:
        keys: the layers' keys.
        values: the layers' values.
        layer_names: names of the layers, in the order of the first dimension.
    """

    keys: PagedStates
    values: PagedStates
    layer_names: list[str]


def view_caches(layers: dict[str, Attention], block_size: int) -> CacheViews:
    """View the caches of attention layers.

    How a backend lays out a block and what it takes a byte for is found out, not believed: the
    layer itself writes a scratch block, and only a known way that reads it back is taken.

    Args:
        layers: attention layers by name, caches allocated.
        block_size: tokens per block of the scheduler; a backend may split such a block.

    Returns:
        The views.

    Raises:
        ValueError: an unknown backend, layers that do not lie at a constant stride, or no known
            layout reads back what the layer wrote.
    """
    backends = {layer.attn_backend.get_name() for layer in layers.values()}
    if len(backends) != 1 or not backends <= set(LAYOUTS):
        raise ValueError(
            f"KV cache compression knows the cache layouts of {', '.join(sorted(LAYOUTS))}, got "
            f"{', '.join(sorted(backends))}; choose one of the former by --attention-backend"
        )
    stacked = stack_layers([layer.kv_cache for layer in layers.values()])
    first = next(iter(layers.values()))
    layouts = LAYOUTS[backends.pop()]
    layout, reading = _probe(first, layouts(stacked.shape[3], first.head_size))
    quantisations = (None, None) if reading is None else reading.of_layers(layers.values())
    keys, values = layout.view(stacked, first.head_size, block_size, quantisations)
    return CacheViews(keys, values, list(layers))


@dataclass(frozen=True)
class Layout:
    """Where a block holds keys and values.

    Attributes:
        name: for messages.
        packings: of keys and values, each a half of a contiguous block of a head; None where a
            cell holds a token's key and behind it its value.
    """

    name: str
    packings: tuple[Packing, Packing] | None = None

    def view(
        self,
        stacked: Tensor,
        head_size: int,
        block_size: int,
        quantisations: tuple[Quantisation | None, Quantisation | None] = (None, None),
    ) -> tuple[PagedStates, PagedStates]:
        """Keys and values of [num_layers, num_blocks, num_kv_heads, tokens, elements per cell]."""
        if self.packings is None:
            parts = (stacked[..., :head_size], stacked[..., head_size:])
            packings = (None, None)
        else:
            # Keys fill the first half of a block of a head, values the second.
            parts = stacked.view(*stacked.shape[:3], 2, -1).unbind(3)
            packings = self.packings
        keys, values = (
            PagedStates(part, packing, block_size, quantisation)
            for part, packing, quantisation in zip(parts, packings, quantisations, strict=True)
        )
        return keys, values


def stack_layers(caches: Sequence[Tensor]) -> Tensor:
    """One [num_layers, *cache.shape] view over equal caches at a constant stride."""
    first = caches[0]
    offsets = [cache.storage_offset() for cache in caches]
    stride = offsets[1] - offsets[0] if len(caches) > 1 else 0
    for cache in caches:
        same_place = cache.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        same_form = cache.shape == first.shape and cache.stride() == first.stride()
        if not same_place or not same_form or cache.dtype != first.dtype:
            raise ValueError(
                "KV cache compression expected the caches of all layers in one allocation and of "
                f"one form, got {tuple(cache.shape)} {cache.dtype} beside {tuple(first.shape)} "
                f"{first.dtype}; serve this model without --kv-compression"
            )
    if offsets != [offsets[0] + i * stride for i in range(len(caches))]:
        raise ValueError(f"KV caches expected at a constant stride, got offsets {offsets}")
    return first.as_strided(
        (len(caches), *first.shape), (stride, *first.stride()), storage_offset=offsets[0]
    )


def cpu_attn_layouts(block_size: int, head_size: int) -> list[Layout]:
    """Layouts of CPU_ATTN, one for each way to pack a block for an instruction set."""
    layouts = [
        Layout(
            "vec",
            (
                Packing((head_size, block_size), (1, 0)),
                Packing((block_size, head_size), (0, 1)),
            ),
        )
    ]
    if block_size % 16 == 0 and head_size % 16 == 0:
        # AMX tiles: 16 tokens x 2 neighbouring dimensions of a key, 16 dimensions x 2
        # neighbouring tokens of a value.
        amx = (
            Packing((block_size // 16, head_size // 2, 16, 2), (0, 2, 1, 3)),
            Packing((head_size // 16, block_size // 2, 16, 2), (1, 3, 0, 2)),
        )
        layouts.append(Layout("amx", amx))
    return layouts


def cell_layouts(block_size: int, head_size: int) -> list[Layout]:
    """The layout of GPU backends: cells of a key and its value, dimensions in any order."""
    return [Layout("cells")]


# Layouts by name of the attention backend, given kernel block size and head size.
LAYOUTS: dict[str, Callable[[int, int], list[Layout]]] = {
    "CPU_ATTN": cpu_attn_layouts,
    "FLASH_ATTN": cell_layouts,
    "FLASHINFER": cell_layouts,
    "TRITON_ATTN": cell_layouts,
}


@calls(
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update",
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.do_kv_cache_update",
    "vllm.v1.attention.backends.flashinfer:FlashInferImpl.do_kv_cache_update",
    "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.do_kv_cache_update",
)
def _probe(layer: Attention, layouts: list[Layout]) -> tuple[Layout, Reading | None]:
    """Let the layer write two blocks of random tokens and find what reads them back."""
    readings = readings_of(layer)
    for layout, reading in product(layouts, readings):
        if _reads_back(layer, layout, reading):
            return layout, reading
    cache = layer.kv_cache
    known = ", ".join(layout.name for layout in layouts)
    bytes_are = ", ".join(sorted({str(each.dtype) for each in readings if each is not None}))
    raise ValueError(
        f"{layer.attn_backend.get_name()} lays out its cache {list(cache.shape)} of {cache.dtype} "
        f"with strides {cache.stride()} in an unknown way; known are {known}"
        + (f", of bytes that are {bytes_are} times the layer's scale" if bytes_are else "")
        + "; serve without --kv-compression, or choose another --attention-backend"
    )


def _reads_back(layer: Attention, layout: Layout, reading: Reading | None) -> bool:
    """Whether this is how the layer stores what it is given."""
    cache = layer.kv_cache
    num_heads, block_size, width = cache.shape[1:]
    # The strides of the cache decide where the layer writes, so the scratch has them too.
    scratch = torch.empty_strided(
        (2, *cache.shape[1:]), cache.stride(), dtype=cache.dtype, device=cache.device
    ).zero_()
    generator = torch.Generator().manual_seed(0)
    num_tokens, sizes = 2 * block_size, (layer.head_size, width - layer.head_size)
    shapes = [(num_tokens, num_heads, size) for size in sizes]
    if reading is None:
        expected = [torch.randn(shape, generator=generator).to(cache) for shape in shapes]
        written, quantisations, tolerance = expected, (None, None), 0.0
    else:
        trials = [
            trial_numbers(shape, factors, generator)
            for shape, factors in zip(shapes, reading.factors(layer), strict=True)
        ]
        expected, written = zip(*trials, strict=True)
        written = [states.to(layer.dtype) for states in written]
        quantisations, tolerance = reading.of_layers([layer]), TOLERANCE
    slots = torch.arange(num_tokens, device=cache.device)
    layer.impl.do_kv_cache_update(layer, *written, scratch, slots)
    block_ids = torch.arange(2, device=cache.device)
    views = layout.view(scratch.unsqueeze(0), layer.head_size, block_size, quantisations)
    return all(
        torch.allclose(
            view.numbers(block_ids, num_tokens)[0], states.transpose(0, 1), tolerance, atol=0.0
        )
        for view, states in zip(views, expected, strict=True)
    )
