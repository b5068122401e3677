"""The interface between a compression method and the worker that applies it.

A method sees tensors of flattened heads and answers which tokens stay. It knows neither vLLM nor
requests: moving the survivors is the worker's task, and so is gathering dense input unless the
method reads the paged cache itself. Read
``rkv.py`` next for the first method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from rkv_vllm.config import KVCompressionConfig
    from rkv_vllm.kernels.paged import PagedStates


class NonFiniteScoreError(ValueError):
    """A score is NaN or infinite, so the cache or the queries of one head are corrupt.

    Attributes:
        head: Index of the first such head in the flattened ``[heads, n, head_size]`` input.
    """

    def __init__(self, head: int) -> None:
        super().__init__(
            f"score of flattened head {head} is NaN or infinite; its keys or queries hold NaN, "
            "Inf or values beyond float32"
        )
        self.head = head


class CompressionMethod(ABC):
    """Decides for every KV head on its own which tokens of a cache to keep.

    An object holds parameters only, never state of a request: the same object serves all requests
    and layers, in any order.
    """

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
        block_ids: torch.Tensor,
        num_tokens: int,
        queries: torch.Tensor,
        budget: int,
    ) -> torch.LongTensor:
        """Choose from a paged cache; a method that can do without a dense copy overrides this.

        Args:
            keys: the cache's keys, heads flattened as in ``keep_indices``.
            values: the cache's values.
            block_ids: int64 [>= ceil(num_tokens / block_size)], the request's row of blocks.
            num_tokens: n, tokens to judge.
            queries: As for ``keep_indices``.
            budget: As for ``keep_indices``.

        Returns:
            As for ``keep_indices``.
        """
        dense_keys = keys.read(block_ids, num_tokens).flatten(0, 1)
        dense_values = values.read(block_ids, num_tokens).flatten(0, 1)
        return self.keep_indices(dense_keys, dense_values, queries, budget)
