"""Explicit eviction inside vLLM for multi-head latent attention.

transformers and vLLM differ on DeepSeek-V2 by themselves, so the reference is vLLM with its
attention exchanged: each layer keeps the latents of the one request that runs in a plain tensor,
attends to all of it in torch, and evicts from it by the rule of layered_reference.py.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from rkv_vllm.options import ServerOptions
from tests.layered_reference import LayerLengths
from tests.methods.dense import keep_indices
from tests.reference import LayerCache


class ExplicitLatents:
    """Stands in for `forward_impl` of one layer.

    Attributes:
        compactions: of each request so far.
    """

    def __init__(self, layer, config: ServerOptions) -> None:
        self._layer = layer
        self._config = config
        self.compactions: list[int] = []

    def forward_impl(
        self, q: Tensor, latents: Tensor, turned: Tensor, kv_cache, metadata, output, **_
    ):
        layer, num_tokens = self._layer, metadata.num_actual_tokens
        q, latents = q[:num_tokens], latents[:num_tokens]
        nope, rope = q.split([layer.qk_nope_head_dim, layer.qk_rope_head_dim], dim=-1)
        absorbed = torch.einsum("thp,hpl->htl", nope, layer.W_UK_T)
        queries = torch.cat([absorbed, rope.transpose(0, 1)], dim=-1)
        keys = torch.cat([latents, turned[:num_tokens].flatten(1)], dim=-1)
        if num_tokens > 1:
            self._begin(num_tokens)
        self._cache.append(queries, keys[None], latents[None])
        attended = self._attend(queries)
        output[:num_tokens] = torch.einsum("htl,hlv->thv", attended, layer.W_UV).flatten(1)
        if num_tokens == 1:
            self._lengths.compact_if_due(self._cache, 0)
            self.compactions[-1] = self._lengths.compactions
        return output

    def _begin(self, prompt_len: int) -> None:
        self._cache = LayerCache(0, self._config.window + 1)
        self._lengths = LayerLengths(0, self._config, prompt_len, self._keep)
        self.compactions.append(0)

    def _keep(self, number: int, settled_len: int, keys: Tensor, values, queries: Tensor) -> Tensor:
        config, own = self._config, self._config.method_options
        return keep_indices(
            keys,
            queries,
            config.budget,
            window=config.window,
            lam=own.lam,
            pool=own.pool,
            threshold=own.threshold,
            scale=self._layer.impl.scale,
        )

    def _attend(self, queries: Tensor) -> Tensor:
        """Latents [heads, n, size of a latent] that the newest tokens see, all cached ones."""
        keys, values = self._cache.keys[0], self._cache.values[0]
        visible = torch.ones(queries.shape[1], len(keys), dtype=torch.bool)
        visible = visible.tril(len(keys) - queries.shape[1])
        logits = queries @ keys.T * self._layer.impl.scale
        return logits.masked_fill(~visible, float("-inf")).softmax(-1) @ values


@contextmanager
def explicit_latents(layers: Iterable, config: ServerOptions) -> Iterator[list[ExplicitLatents]]:
    """Layers of a running engine attend through caches of their own; one request at a time."""
    stand_ins = [ExplicitLatents(layer, config) for layer in layers]
    for each in stand_ins:
        each._layer.forward_impl = partial(each.forward_impl)
    try:
        yield stand_ins
    finally:
        for each in stand_ins:
            del each._layer.forward_impl
