"""The interface between a compression method and the worker that applies it.

A method sees tensors of flattened heads and answers which tokens stay. It knows neither vLLM nor
requests: moving the survivors is the worker's task, and so is gathering dense input unless the
method reads the paged cache itself. Read
``rkv.py`` next for the first method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

if TYPE_CHECKING:
    from rkv_vllm.config import KVCompressionConfig
    from rkv_vllm.kernels.eviction import EvictionBatch
    from rkv_vllm.kernels.paged import PagedStates


class NonFiniteScoreError(ValueError):
    """A score is NaN or infinite, so the cache or the queries of one head are corrupt.

    Attributes:
        head: Index of the first such head in the flattened ``[heads, n, head_size]`` input.
        request: Its index in the batch, 0 where there is only one.
    """

    def __init__(self, head: int, request: int = 0) -> None:
        super().__init__(
            f"score of flattened head {head} is NaN or infinite; its keys or queries hold NaN, "
            "Inf or values beyond float32"
        )
        self.head = head
        self.request = request


@dataclass(frozen=True)
class NoOptions:
    """Of a method that has none."""


class CompressionMethod(ABC):
    """Decides for every KV head on its own which tokens of a cache to keep.

    An object holds parameters only, never state of a request: the same object serves all requests
    and layers, in any order.
    """

    Options: ClassVar[type] = NoOptions

    @classmethod
    @abstractmethod
    def from_config(cls, config: KVCompressionConfig) -> CompressionMethod:
        """Make a method object from the validated options of the engine."""

    @abstractmethod
    def keep_indices(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        queries: torch.Tensor,
        budget: int,
    ) -> torch.LongTensor:
        """Choose the ``budget`` tokens that each head keeps.

        The heads of several layers (of one request) may be flattened into the first dimension; a
        method must not let them see each other.

        Args:
            keys: [heads, n, head_size], cache dtype, cache order, after RoPE.
            values: [heads, n, head_size], cache dtype, cache order.
            queries: [heads * group, window, head_size], after RoPE, of the last ``window`` of the
                n tokens in temporal order. Query head ``h * group + g`` reads KV head ``h``.
            budget: Tokens to keep per head, with ``window < budget <= n``.

        Returns:
            int64 [heads, budget], ascending in every row and without repetition. The last
            ``window`` tokens are always among them.

        Raises:
            ValueError: The shapes do not fit each other.
            NonFiniteScoreError: A score is NaN or infinite; the worker names its layer.
        """

    def keep_paged(
        self,
        keys: PagedStates,
        values: PagedStates,
        batch: EvictionBatch,
        observation_queries: torch.Tensor,
    ) -> torch.Tensor:
        """Choose for a batch of requests, straight from a paged cache.

        This version copies one request after the other out of the cache and asks ``keep_indices``;
        a method that has kernels overrides it.

        Args:
            keys: The cache's keys after RoPE.
            values: The cache's values.
            batch: The requests with their rows, lengths and budgets.
            observation_queries: [slots, layers, ring_len, query heads, head_size], after RoPE;
                the query of logical position p lies at p modulo ring_len.

        Returns:
            int32 [requests, layers * KV heads, largest budget]; of each row the request's
            ``budget`` entries as ``keep_indices`` returns them, -1 behind them.

        Raises:
            ValueError: ``keep_indices`` returned another shape than promised.
            NonFiniteScoreError: A score is NaN or infinite; the worker names request and layer.
        """
        num_heads = keys.num_layers * keys.num_heads
        shape = (batch.num_requests, num_heads, batch.max_budget)
        keep = torch.full(shape, -1, dtype=torch.int32, device=keys.device)
        for i, eviction in enumerate(batch.evictions):
            row = batch.old_block_table[i]
            dense = [s.read(row, eviction.settled_len).flatten(0, 1) for s in (keys, values)]
            queries = batch.window_queries(i, observation_queries)
            try:
                kept = self.keep_indices(*dense, queries, eviction.budget)
            except NonFiniteScoreError as error:
                raise NonFiniteScoreError(error.head, request=i) from error
            if kept.shape != (num_heads, eviction.budget):
                raise ValueError(
                    f"{type(self).__name__}.keep_indices returned {list(kept.shape)}, expected "
                    f"{[num_heads, eviction.budget]}"
                )
            keep[i, :, : eviction.budget] = kept
        return keep

    def score_paged(
        self, keys: PagedStates, batch: EvictionBatch, observation_queries: torch.Tensor
    ) -> torch.Tensor | None:
        """Return the scores behind ``keep_paged``'s choice, for people who look at it.

        Serving never asks. A method that ranks tokens overrides it; this version has no scores.

        Args:
            keys: As for ``keep_paged``.
            batch: As for ``keep_paged``.
            observation_queries: As for ``keep_paged``.

        Returns:
            float32 [requests, layers * KV heads, most candidates], larger means more worth keeping;
            of request r the first ``settled_len - window`` of each row count. None without scores.
        """
        return None
