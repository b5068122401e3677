"""Layers of multi-head latent attention: what is cached, recorded and moved of them.

A token leaves one latent in a layer, from which all query heads make their keys and values, and
beside it one key that RoPE has turned. So a layer keeps one set of tokens for all its heads.
Attention to the cache is a dot product with that whole row, once a head's query is brought into the
space of latents ("absorbed"): so do the scores. What is recorded is the query before that, which is
three times smaller. Next: layer_set.py for layers with keys and values of their own.

Which part of a row tells that two tokens repeat each other is an open question; here it is all of
it, as for other layers. Source of the layout: DeepSeek-V2 (arXiv:2405.04434), section 2.1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import MLAAttention

from rkv_vllm.fit.overrides import calls
from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.ops import ops_for
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.methods.base import Heads, ModelFacts
from rkv_vllm.worker.attention_hook import query_size, record_in
from rkv_vllm.worker.cache_views import stack_layers
from rkv_vllm.worker.layer_set import LayerSet, alike
from rkv_vllm.worker.lengths import GroupRows
from rkv_vllm.worker.query_ring import QueryRing, RingMemory

# Those whose cache holds a token's latent and behind it its turned key, in the model's dtype.
BACKENDS = ("CPU_MLA",)


@dataclass(frozen=True)
class LatentSet(LayerSet):
    """Latents of some layers; values are the latents within the rows, a view and no copy.

    Attributes:
        absorbers: of each layer [query heads, elements without RoPE, elements of a latent].
    """

    absorbers: tuple[Tensor, ...]

    @property
    def stored(self) -> tuple[PagedStates, ...]:
        """What is moved and copied, without overlap."""
        return (self.keys,)

    @property
    def scratch_bytes_per_request(self) -> int:
        """Temporaries of `heads`, per request and layer: its absorbed queries, and their parts."""
        if self.ring is None:
            return 0
        ring_len, num_heads = self.ring.queries.shape[2:4]
        return 2 * ring_len * num_heads * self.keys.head_size * torch.float32.itemsize

    def heads(self, layers: slice, batch: EvictionBatch) -> tuple[Heads, EvictionBatch]:
        """The caches of some layers; their queries absorbed, those of request i in seat i."""
        keys, values = self.keys.layers(layers), self.values.layers(layers)
        if self.ring is None:
            return Heads(layers, keys, values, None), batch
        seats = [eviction.seat for eviction in batch.evictions]
        queries = self._absorb(self.ring.queries[seats][:, layers], self.absorbers[layers])
        return Heads(layers, keys, values, queries), batch.reseated()

    def compact(self, heads: Heads, batch: EvictionBatch, keep: Tensor) -> None:
        """Move the survivors."""
        self.ops.compact(heads.keys, batch, keep)

    def _absorb(self, queries: Tensor, absorbers: tuple[Tensor, ...]) -> Tensor:
        """Of [R, layers, ring_len, heads, size as recorded] float32 [..., size of a row]."""
        size = absorbers[0].shape[1]
        absorbed = [
            torch.einsum("rthp,hpl->rthl", queries[:, i, ..., :size].float(), absorber.float())
            for i, absorber in enumerate(absorbers)
        ]
        return torch.cat([torch.stack(absorbed, dim=1), queries[..., size:].float()], dim=-1)


def make_latent_sets(
    layers: dict[str, MLAAttention],
    block_size: int,
    rows: GroupRows,
    memory: RingMemory | None,
    window: int,
) -> list[LatentSet]:
    """View the layers of one compressed group and let them record their queries.

    Args:
        layers: by name, caches allocated.
        block_size: tokens per block of the group.
        rows: of the group.
        memory: where the queries go; None when the method asks for none.
        window: newest tokens whose queries judge.

    Raises:
        ValueError: a layer is of another kind, or its cache is not laid out as is known.
    """
    sets = []
    for run in alike(layers):
        for layer in run.values():
            _check_kind(layer)
        keys, values = _view(run, block_size)
        model = _model_facts(run, keys.device)
        ops = ops_for(keys, window)
        ring = None
        if memory is not None:
            first = next(iter(run.values()))
            queries = memory.take(len(run), first.num_heads, query_size(first))
            ring = QueryRing(queries, rows, ops.observe)
            for layer_idx, layer in enumerate(run.values()):
                record_in(layer, layer_idx, ring)
        absorbers = tuple(layer.W_UK_T for layer in run.values())
        sets.append(LatentSet(model, keys, values, ops, ring, absorbers))
    return sets


def _check_kind(layer: MLAAttention) -> None:
    backend = layer.attn_backend.get_name()
    if type(layer.impl).is_sparse or backend not in BACKENDS:
        raise ValueError(
            f"KV cache compression knows dense multi-head latent attention by "
            f"{', '.join(BACKENDS)}, got {layer.layer_name} by {backend}; choose that by "
            "--attention-backend, or serve this model without --kv-compression"
        )


def _model_facts(layers: dict[str, MLAAttention], device: torch.device) -> ModelFacts:
    first = next(iter(layers.values()))
    scale = torch.tensor([layer.impl.scale for layer in layers.values()], device=device)
    return ModelFacts(
        layers=tuple(layers),
        # Every rank holds the one that there is.
        first_kv_head=0,
        num_kv_heads=1,
        num_query_heads=first.num_heads,
        head_size=first.head_size,
        scale=scale.float(),
        soft_cap=torch.zeros_like(scale, dtype=torch.float32),
    )


def _view(layers: dict[str, MLAAttention], block_size: int) -> tuple[PagedStates, PagedStates]:
    """Rows of all layers, and the latents within them."""
    first = next(iter(layers.values()))
    _probe(first)
    # [num_layers, num_blocks, 1, tokens, elements of a row]
    stacked = stack_layers([layer.kv_cache for layer in layers.values()]).unsqueeze(2)
    latents = stacked[..., : first.kv_lora_rank]
    return tuple(PagedStates(part, None, block_size) for part in (stacked, latents))


@calls("vllm.v1.attention.backends.mla.cpu_mla:CPUMLAImpl.do_kv_cache_update")
def _probe(layer: MLAAttention) -> None:
    """Let the layer write two blocks of random tokens, and read them back."""
    cache = layer.kv_cache
    _, block_size, width = cache.shape
    scratch = torch.empty_strided(
        (2, block_size, width), cache.stride(), dtype=cache.dtype, device=cache.device
    ).zero_()
    generator = torch.Generator().manual_seed(0)
    written = torch.randn(2 * block_size, width, generator=generator).to(cache)
    latent, key = written.split([layer.kv_lora_rank, width - layer.kv_lora_rank], dim=-1)
    slots = torch.arange(2 * block_size, device=cache.device)
    layer.impl.do_kv_cache_update(
        latent, key.unsqueeze(1), scratch, slots, layer.kv_cache_dtype, layer._k_scale
    )
    if not scratch.flatten(0, 1).equal(written):
        raise ValueError(
            f"{layer.attn_backend.get_name()} lays out its cache {list(cache.shape)} of "
            f"{cache.dtype} with strides {cache.stride()} in an unknown way; serve this model "
            "without --kv-compression"
        )
