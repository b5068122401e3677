"""Layers of one compressed group that are compacted together: equal heads, equally laid out caches.

A group has one layer set per geometry; most models have one in all. Knows layers and their caches,
no requests. Next: cache_views.py for how a cache is viewed, group.py for who compacts it,
latent_set.py for layers of latent attention.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import NamedTuple

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import Attention

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.ops import Ops, ops_for
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.methods.base import Heads, ModelFacts
from rkv_vllm.worker.attention_hook import record_in
from rkv_vllm.worker.cache_views import view_caches
from rkv_vllm.worker.lengths import GroupRows
from rkv_vllm.worker.query_ring import QueryRing, RingMemory


@dataclass(frozen=True)
class LayerSet:
    """Keys, values and recorded queries of some layers, over all of them at once.

    Attributes:
        model: what a method may know of the layers; their names, in the order of the first
            dimension of keys and values.
        keys: their keys.
        values: their values.
        ops: the kernels for this cache.
        ring: their queries; None when the method asks for none.
    """

    model: ModelFacts
    keys: PagedStates
    values: PagedStates
    ops: Ops
    ring: QueryRing | None

    @property
    def stored(self) -> tuple[PagedStates, ...]:
        """What is moved and copied, without overlap."""
        return self.keys, self.values

    @property
    def scratch_bytes_per_request(self) -> int:
        """Temporaries of `heads`, per request and layer."""
        return 0

    def heads(self, layers: slice, batch: EvictionBatch) -> tuple[Heads, EvictionBatch]:
        """The caches of some layers, as a method sees them.

        Args:
            layers: which of this set.
            batch: the requests.

        Returns:
            The caches, and the requests with the seats in which their queries lie there.
        """
        queries = None if self.ring is None else self.ring.queries[:, layers]
        return Heads(layers, self.keys.layers(layers), self.values.layers(layers), queries), batch

    def compact(self, heads: Heads, batch: EvictionBatch, keep: Tensor) -> None:
        """Move the survivors.

        Args:
            heads: the caches of some layers.
            batch: the requests.
            keep: int32 [requests, these layers * KV heads, largest budget], physical positions.
        """
        self.ops.compact_both(heads.keys, heads.values, batch, keep)


def make_layer_sets(
    layers: dict[str, Attention],
    block_size: int,
    rows: GroupRows,
    memory: RingMemory | None,
    kv_shard: int,
    window: int,
) -> list[LayerSet]:
    """View the layers of one compressed group and let them record their queries.

    Args:
        layers: attention layers by name, caches allocated.
        block_size: tokens per block of the group.
        rows: of the group.
        memory: where the queries go; None when the method asks for none.
        kv_shard: which share of a layer's KV heads lies on this rank.
        window: newest tokens whose queries judge.
    """
    sets = []
    for run in alike(layers):
        views = view_caches(run, block_size)
        model = _model_facts(run, kv_shard, views.keys.device)
        ops = ops_for(views.keys, window)
        ring = None
        if memory is not None:
            queries = memory.take(len(run), model.num_query_heads, model.head_size)
            is_draft = next(iter(run.values())).is_draft_layer
            ring = QueryRing(queries, rows.draft if is_draft else rows, ops.observe)
            for layer_idx, layer in enumerate(run.values()):
                record_in(layer, layer_idx, ring)
        sets.append(LayerSet(model, views.keys, views.values, ops, ring))
    return sets


def _model_facts(layers: dict[str, Attention], kv_shard: int, device: torch.device) -> ModelFacts:
    first = next(iter(layers.values()))
    impls = [layer.impl for layer in layers.values()]
    # vLLM's backends spell "no soft cap" as None or as zero.
    soft_caps = [impl.logits_soft_cap or 0.0 for impl in impls]
    return ModelFacts(
        layers=tuple(layers),
        first_kv_head=kv_shard * first.num_kv_heads,
        num_kv_heads=first.num_kv_heads,
        num_query_heads=first.num_heads,
        head_size=first.head_size,
        scale=torch.tensor([impl.scale for impl in impls], dtype=torch.float32, device=device),
        soft_cap=torch.tensor(soft_caps, dtype=torch.float32, device=device),
    )


def alike(layers: dict[str, Attention]) -> Iterator[dict[str, Attention]]:
    """Cut layers into runs that one view can span: one geometry, one constant stride."""
    by_form: dict[_Form, list[str]] = {}
    for name, layer in layers.items():
        by_form.setdefault(_Form.of(layer), []).append(name)
    for names in by_form.values():
        names.sort(key=lambda name: layers[name].kv_cache.storage_offset())
        while names:
            length = _num_at_constant_stride([layers[n].kv_cache.storage_offset() for n in names])
            yield {name: layers[name] for name in names[:length]}
            names = names[length:]


def _num_at_constant_stride(offsets: list[int]) -> int:
    """How many of the offsets, from the first, lie as far apart as the first two."""
    steps = [after - before for before, after in pairwise(offsets)]
    return 1 + sum(1 for _ in takewhile(lambda step: step == steps[0], steps))


class _Form(NamedTuple):
    """What the layers of one set have in common."""

    is_draft: bool
    backend: str
    num_heads: int
    head_size: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    allocation: int

    @classmethod
    def of(cls, layer: Attention) -> "_Form":
        cache: Tensor = layer.kv_cache
        return cls(
            layer.is_draft_layer,
            layer.attn_backend.get_name(),
            layer.num_heads,
            layer.head_size,
            tuple(cache.shape),
            cache.stride(),
            cache.dtype,
            cache.untyped_storage().data_ptr(),
        )
