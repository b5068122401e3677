"""Makes an attention layer record its queries, without touching its code or its callers.

The class of `layer.impl`, of latent attention that of the layer itself, is exchanged for a subclass
made here. vLLM calls both behind a custom op, so the exchange is invisible to torch.compile. Next:
query_ring.py.
"""

from functools import cache

from torch import Tensor
from vllm.model_executor.layers.attention import Attention, MLAAttention

from rkv_vllm.fit.overrides import overrides
from rkv_vllm.kernels.paged import FLOATS_OF_A_BYTE
from rkv_vllm.worker.query_ring import QueryRing


def query_size(layer: Attention | MLAAttention) -> int:
    """Elements of a query as it is recorded; of latent attention before it is absorbed."""
    return layer.qk_head_dim if isinstance(layer, MLAAttention) else layer.head_size


def observe_queries(layer: Attention | MLAAttention) -> None:
    """Let `layer` record the queries of every forward, once it has a ring (`record_in`)."""
    observed = _observed(layer)
    make = _observing_class if observed is layer.impl else _observing_latent_class
    observed.__class__ = make(type(observed))
    observed.query_ring = None


def record_in(layer: Attention | MLAAttention, layer_idx: int, ring: QueryRing) -> None:
    """Give an observed layer its ring.

    Args:
        layer: an attention layer after `observe_queries`.
        layer_idx: its place in the ring.
        ring: where its queries go.
    """
    observed = _observed(layer)
    observed.query_ring = ring
    observed.observed_layer_idx = layer_idx


def _observed(layer: Attention | MLAAttention) -> object:
    """What is shown the queries of all tokens."""
    return layer if isinstance(layer, MLAAttention) else layer.impl


@overrides(
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward",
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.forward",
    "vllm.v1.attention.backends.flashinfer:FlashInferImpl.forward",
    "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.forward",
)
@cache
def _observing_class(base: type) -> type:
    """A subclass of one attention implementation, single inheritance as __class__ demands."""

    def forward(self, layer: Attention, query: Tensor, *args, **kwargs) -> Tensor:
        # None while there is no cache: vLLM profiles with dummy batches first.
        if self.query_ring is not None:
            # A layer that has quantised its queries (`query_quant`) knows their factor.
            scale = layer._q_scale if query.dtype in FLOATS_OF_A_BYTE else None
            self.query_ring.record(self.observed_layer_idx, query, scale)
        return base.forward(self, layer, query, *args, **kwargs)

    return type(f"Observing{base.__name__}", (base,), {"forward": forward})


@overrides("vllm.model_executor.layers.attention.mla_attention:MLAAttention.forward_impl")
@cache
def _observing_latent_class(base: type) -> type:
    """A subclass of one kind of latent attention layer, single inheritance as __class__ demands."""

    def forward_impl(self, q: Tensor, *args, **kwargs) -> Tensor:
        if self.query_ring is not None:
            self.query_ring.record(self.observed_layer_idx, q)
        return base.forward_impl(self, q, *args, **kwargs)

    return type(f"Observing{base.__name__}", (base,), {"forward_impl": forward_impl})
