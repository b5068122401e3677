"""Views of the attention layers' KV caches, whatever the backend's layout.

Knows how attention backends pack a block; knows no requests. One view spans all layers, because
vLLM places the layers of one spec at a constant stride in one allocation. Next: kernels/paged.py
for what a view can do, compactor.py for who uses it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import Attention

from rkv_vllm.kernels.paged import Packing, PagedStates


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


def cpu_attn_views(layers: dict[str, Attention]) -> CacheViews:
    """View the caches of CPU_ATTN layers.

    CPU_ATTN packs blocks for the instruction set it picked. Which packing that is, is found out by
    letting the layer itself write a scratch block and reading it back.

    Args:
        layers: attention layers by name, caches allocated.

    Returns:
        The views.

    Raises:
        ValueError: the layers do not lie at a constant stride, or no known packing reads back
            what the layer wrote.
    """
    stacked = stack_layers([layer.kv_cache for layer in layers.values()])
    block_size, width = stacked.shape[3:]
    head_size = width // 2
    # [L, B, H, 2, block_size * head_size]: a block of a head is its keys, then its values.
    halves = stacked.view(*stacked.shape[:3], 2, block_size * head_size)
    first = next(iter(layers.values()))
    key_packing, value_packing = _probe_packing(first, block_size, head_size)
    return CacheViews(
        keys=PagedStates(halves[:, :, :, 0], key_packing, block_size),
        values=PagedStates(halves[:, :, :, 1], value_packing, block_size),
        layer_names=list(layers),
    )


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


def known_packings(block_size: int, head_size: int) -> dict[str, tuple[Packing, Packing]]:
    """Packings of CPU_ATTN by instruction set: (keys, values)."""
    packings = {
        "vec": (
            Packing((head_size, block_size), (1, 0)),
            Packing((block_size, head_size), (0, 1)),
        )
    }
    if block_size % 16 == 0 and head_size % 16 == 0:
        # AMX tiles: 16 tokens x 2 neighbouring dimensions of a key, 16 dimensions x 2
        # neighbouring tokens of a value.
        packings["amx"] = (
            Packing((block_size // 16, head_size // 2, 16, 2), (0, 2, 1, 3)),
            Packing((head_size // 16, block_size // 2, 16, 2), (1, 3, 0, 2)),
        )
    return packings


def _probe_packing(layer: Attention, block_size: int, head_size: int) -> tuple[Packing, Packing]:
    """Let the layer write one block of random tokens and find the packing that reads them back."""
    cache = layer.kv_cache
    scratch = torch.zeros(1, *cache.shape[1:], dtype=cache.dtype)
    generator = torch.Generator().manual_seed(0)
    shape = (block_size, cache.shape[1], head_size)
    keys = torch.randn(shape, generator=generator).to(cache.dtype)
    values = torch.randn(shape, generator=generator).to(cache.dtype)
    layer.impl.do_kv_cache_update(layer, keys, values, scratch, torch.arange(block_size))
    halves = scratch.view(1, 1, cache.shape[1], 2, -1)
    block_ids = torch.zeros(1, dtype=torch.int64)
    written = (keys.transpose(0, 1), values.transpose(0, 1))
    for packings in known_packings(block_size, head_size).values():
        if all(
            torch.equal(
                PagedStates(halves[:, :, :, i], packing, block_size).read(block_ids, block_size)[0],
                written[i],
            )
            for i, packing in enumerate(packings)
        ):
            return packings
    raise ValueError(
        f"CPU_ATTN packs its cache for the instruction set {layer.isa!r} in an unknown way; "
        f"known are {sorted(known_packings(block_size, head_size))}; "
        "serve without --kv-compression on this machine"
    )
