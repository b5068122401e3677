"""The interface between a compression method and the worker that applies it.

A method answers one question: how much is each token of a head worth keeping? Everything else
belongs to the frame: the protected prefix, the window, ties, NaN, the choice of the best and their
order (`select`), moving survivors (`compact`). Nothing here knows vLLM or requests.
`DenseMethod` is the short way to a new method; `rkv.py` next is one that has kernels.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from rkv_vllm.kernels.batch import Eviction, EvictionBatch
from rkv_vllm.kernels.ops import Ops
from rkv_vllm.kernels.paged import PagedStates


class Need(NamedTuple):
    """What a method wants to be recorded while a request runs.

    Attributes:
        queries: the queries of the window; without them there is no ring, no launch, no seat.
    """

    queries: bool = False


class ModelFacts(NamedTuple):
    """What a method may know of the layers whose caches it sees, on this rank.

    Attributes:
        layers: their names, in the order of the cache's first dimension.
        first_kv_head: number, in the whole model, of the first KV head of this rank.
        num_kv_heads: KV heads of a layer on this rank.
        num_query_heads: query heads of a layer on this rank.
        head_size: elements of a key.
        scale: float32 [layers] on the cache's device, factor of each layer's attention logits.
        soft_cap: float32 [layers] there, c of c * tanh(logit / c), 0 for a layer without one.
    """

    layers: tuple[str, ...]
    first_kv_head: int
    num_kv_heads: int
    num_query_heads: int
    head_size: int
    scale: Tensor
    soft_cap: Tensor


def layer_number(name: str) -> int:
    """The number in the whole model that a layer's name holds: 3 of `model.layers.3.self_attn`.

    Raises:
        ValueError: it holds none, or several.
    """
    numbers = [part for part in name.split(".") if part.isdecimal()]
    if len(numbers) != 1:
        raise ValueError(f"layer {name!r}: got {len(numbers)} numbers in its name, wanted one")
    return int(numbers[0])


class ModelShape(NamedTuple):
    """A whole model, whichever part of it a rank holds.

    Attributes:
        name: as the user gave it, a folder or a hub id.
        num_layers: attention layers.
        num_query_heads: query heads of a layer.
        num_kv_heads: KV heads of a layer.
        head_size: elements of a key.
    """

    name: str
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_size: int


class Heads(NamedTuple):
    """The caches of some layers.

    Attributes:
        layers: which of `ModelFacts.layers`.
        keys: their keys after RoPE.
        values: their values.
        queries: [seats, these layers, ring_len, query heads, head_size] after RoPE, None unless the
            method needs them; the query of logical position p lies at p modulo ring_len.
    """

    layers: slice
    keys: PagedStates
    values: PagedStates
    queries: Tensor | None


@dataclass(frozen=True)
class NoOptions:
    """A method without options of its own."""


class Method(ABC):
    """Says of every token, KV head by KV head, how much it is worth keeping.

    An object holds parameters only, never state of a request: the same object serves all requests
    of equal options, in any order.

    Attributes:
        Options: frozen dataclass of the method's options, each with a default; its fields are made
            by `rkv_vllm.option_field.option`, or plain ones.
        depends_on_prefix_only: whether the tokens that it keeps depend on nothing of a request but
            the tokens so far and the options, so that others with the same prefix may share them.
        options: the values of this object.
        model: the layers that it serves.
        ops: the kernels of their caches.
    """

    Options: ClassVar[type] = NoOptions
    depends_on_prefix_only: ClassVar[bool] = False

    @classmethod
    def need(cls, options: Any) -> Need:
        """What to record for a method with these options.

        The server's decide: a request whose own would need more is refused.
        """
        return Need()

    @classmethod  # noqa: B027 (most methods fit every model)
    def check_model(cls, options: Any, shape: ModelShape) -> None:
        """Refuse a model that does not fit the options, such as a file made for another one.

        Called in several processes, with the server's options, before the model is loaded.

        Raises:
            ValueError: it does not; says in one line what was got, wanted, and the way out.
        """

    def __init__(self, options: Any, model: ModelFacts, ops: Ops) -> None:
        self.options = options
        self.model = model
        self.ops = ops

    @classmethod
    def layer_budgets(cls, options: Any, budget: int, num_layers: int) -> Sequence[int]:
        """Tokens that each compressed layer of the model keeps.

        Args:
            options: the server's.
            budget: what the user asked for, the mean to aim at.
            num_layers: compressed layers of the whole model.
        """
        return [budget] * num_layers

    @abstractmethod
    def score(self, heads: Heads, batch: EvictionBatch) -> Tensor:
        """Score the candidates of a batch of requests, straight from the paged cache.

        Args:
            heads: some layers; heads must not see each other.
            batch: the requests. The candidates of request r are its settled tokens behind the
                protected prefix and before the window; their physical positions start at
                `prefix_len`.

        Returns:
            float32 [requests, layers * KV heads, most candidates]; larger means more worth keeping.
            Of request r the first `batch.num_candidates(r)` of each row count. A head with a NaN
            or infinite score keeps its newest tokens.
        """


class DenseMethod(Method):
    """A method that is one function of dense tensors: one request and one layer at a time."""

    @abstractmethod
    def score_dense(
        self,
        keys: Tensor,
        values: Tensor,
        queries: Tensor | None,
        layer: int,
        eviction: Eviction,
    ) -> Tensor:
        """Score the candidates of one request in one layer.

        Args:
            keys: [KV heads, n, head_size] after RoPE, in the cache's dtype, of a quantised cache
                float32; the settled tokens behind the protected prefix in temporal order. The last
                `window` of them are always kept.
            values: the same of the values.
            queries: [query heads, window, head_size] of the last `window` tokens, after RoPE, None
                unless `need` asks for them. Query head `h * group + g` reads KV head `h`.
            layer: index into `model.layers`.
            eviction: the request's numbers: its budget, lengths, and the seed of this compaction.

        Returns:
            [KV heads, n - window] or, where that is easier, [KV heads, n], of which the window's
            are left out; any float dtype. Larger means more worth keeping.
        """

    def score(self, heads: Heads, batch: EvictionBatch) -> Tensor:
        """Ask `score_dense` about each request and layer. See the base class.

        Raises:
            ValueError: it returned another shape than promised, or no floats.
        """
        keys, num_heads = heads.keys, heads.keys.num_heads
        shape = (batch.num_requests, keys.num_layers * num_heads, batch.max_candidates)
        scores = torch.full(shape, -torch.inf, dtype=torch.float32, device=keys.device)
        layers = range(len(self.model.layers))[heads.layers]
        for i, eviction in enumerate(batch.evictions):
            num_candidates, row = batch.num_candidates(i), batch.old_block_table[i]
            if not num_candidates:
                continue
            for own, layer in enumerate(layers):
                only = slice(own, own + 1)
                dense = (
                    states.layers(only).numbers(row, eviction.settled_len, eviction.prefix_len)[0]
                    for states in (heads.keys, heads.values)
                )
                queries = heads.queries
                if queries is not None:
                    queries = batch.window_queries(i, queries[:, only])
                part = self.score_dense(*dense, queries, layer, eviction)
                self._check_dense(part, num_heads, eviction.num_judged, num_candidates)
                own_heads = slice(own * num_heads, (own + 1) * num_heads)
                scores[i, own_heads, :num_candidates] = part[:, :num_candidates]
        return scores

    def _check_dense(self, part: Tensor, num_heads: int, n: int, num_candidates: int) -> None:
        wanted = [num_heads, num_candidates]
        if list(part.shape) not in (wanted, [num_heads, n]) or not part.is_floating_point():
            raise ValueError(
                f"{type(self).__name__}.score_dense: got {part.dtype} {list(part.shape)}, wanted "
                f"floats {wanted} or {[num_heads, n]}: one per KV head and token, the window left "
                "out or not"
            )


def check_scores(method: Method, scores: Tensor, heads: Heads, batch: EvictionBatch) -> None:
    """Raise ValueError, naming the method, unless its scores are what `Method.score` promises.

    What the scores hold is not looked at, which would wait for the device: `select` takes care of
    those that are not finite.
    """
    num_heads = heads.keys.num_layers * heads.keys.num_heads
    shape, device = (batch.num_requests, num_heads, batch.max_candidates), heads.keys.device
    if scores.shape != shape or scores.dtype != torch.float32 or scores.device != device:
        raise ValueError(
            f"{type(method).__name__}.score: got {scores.dtype} {list(scores.shape)} on "
            f"{scores.device}, wanted {torch.float32} {list(shape)} on {device}"
        )
