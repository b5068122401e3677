"""The query ring: post-RoPE queries of the requests that will soon be compacted.

Knows tensors and token rows; the scheduler assigns the seats (scheduling/planner.py). A seat holds
a ring of `ring_len` positions per layer, keyed by logical position, so a rejected and recomputed
token overwrites itself. Next: attention_hook.py, which calls `record` once per layer.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class RingMemory:
    """One allocation for the rings of all layers, made before vLLM measures what is left.

    Which layers share a ring is known later, with the KV-cache groups.

    Args:
        num_elements: of all rings together.
        dtype: dtype of the queries.
        device: where the model runs.
    """

    def __init__(self, num_elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self.elements = torch.zeros(num_elements, dtype=dtype, device=device)
        self._num_taken = 0

    def take(self, *shape: int) -> Tensor:
        """Hand out the next part as a contiguous tensor."""
        first = self._num_taken
        self._num_taken += torch.Size(shape).numel()
        return self.elements[first : self._num_taken].view(shape)

    def take_back(self) -> None:
        """All parts are free again."""
        self._num_taken = 0


class QueryRing:
    """The queries of watched requests in the layers of one layer set.

    Args:
        queries: [seats, num_layers, ring_len, num_heads, head_size].
        token_rows: int32 [max_num_tokens], where each token of the step is recorded, -1 = nowhere.
        observe: writes the queries of one layer's watched tokens (`observe_naive`).
    """

    def __init__(
        self,
        queries: Tensor,
        token_rows: Tensor,
        observe: Callable[[Tensor, int, Tensor, Tensor], None],
    ) -> None:
        self.queries = queries
        self._token_rows = token_rows
        self._observe = observe

    def record(self, layer_idx: int, query: Tensor) -> None:
        """Record the watched tokens of one layer's forward.

        Args:
            layer_idx: layer of the ring.
            query: [num_tokens, num_heads, head_size] after RoPE.
        """
        self._observe(self.queries, layer_idx, query, self._token_rows)
