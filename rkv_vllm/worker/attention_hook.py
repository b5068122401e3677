"""Makes an attention layer record its queries, without touching its code or its callers.

The class of `layer.impl` is exchanged for a subclass made here. vLLM calls the implementation
behind a custom op, so the exchange is invisible to torch.compile. Next: query_ring.py.
"""

from functools import cache

from torch import Tensor
from vllm.model_executor.layers.attention import Attention

from rkv_vllm.fit.overrides import overrides
from rkv_vllm.worker.query_ring import QueryRing


def observe_queries(layer: Attention, layer_idx: int, pool: QueryRing) -> None:
    """Record the queries of every later forward of `layer` in `pool`.

    Args:
        layer: an attention layer.
        layer_idx: its place in the pool.
        pool: where the queries go.
    """
    impl = layer.impl
    impl.__class__ = _observing_class(type(impl))
    impl.query_ring = pool
    impl.observed_layer_idx = layer_idx


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
        self.query_ring.record(self.observed_layer_idx, query)
        return base.forward(self, layer, query, *args, **kwargs)

    return type(f"Observing{base.__name__}", (base,), {"forward": forward})
