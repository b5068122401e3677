"""The query ring: post-RoPE queries of the requests that will soon be compacted.

Knows tensors and token rows; the scheduler assigns the seats (scheduling/planner.py). A seat holds
a ring of `ring_len` positions per layer, keyed by logical position, so a rejected and recomputed
token overwrites itself. Next: attention_hook.py, which calls `record` once per layer.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rkv_vllm.worker.lengths import DraftRows, GroupRows


class RingMemory:
    """One allocation for the rings of all layers, made before vLLM measures what is left.

    Which layers share a ring is known later, with the KV-cache groups.

    Args:
        seats: requests whose queries can be recorded at once.
        ring_len: positions per seat, >= window + tokens in flight.
        position_size: elements of one position in all layers together.
        dtype: dtype of the queries.
        device: where the model runs.

    Attributes:
        elements: the allocation.
    """

    def __init__(
        self,
        seats: int,
        ring_len: int,
        position_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._seats = seats
        self._ring_len = ring_len
        self._num_taken = 0
        self.elements = torch.zeros(seats * ring_len * position_size, dtype=dtype, device=device)

    def take(self, num_layers: int, num_heads: int, head_size: int) -> Tensor:
        """Hand out the next ring, [seats, num_layers, ring_len, num_heads, head_size]."""
        shape = torch.Size((self._seats, num_layers, self._ring_len, num_heads, head_size))
        first = self._num_taken
        self._num_taken += shape.numel()
        return self.elements[first : self._num_taken].view(shape)

    def take_back(self) -> None:
        """All rings are free again."""
        self._num_taken = 0


class QueryRing:
    """The queries of watched requests in the layers of one layer set.

    Args:
        queries: [seats, num_layers, ring_len, num_heads, head_size].
        rows: of the group or of its draft layers, whose `token_rows` say where each token of the
            forward is recorded.
        observe: writes the queries of one layer's watched tokens (`observe_naive`).
    """

    def __init__(
        self,
        queries: Tensor,
        rows: GroupRows | DraftRows,
        observe: Callable[..., None],
    ) -> None:
        self.queries = queries
        self._rows = rows
        self._observe = observe

    def record(self, layer_idx: int, query: Tensor, query_scale: Tensor | None = None) -> None:
        """Record the watched tokens of one layer's forward.

        Args:
            layer_idx: layer of the ring.
            query: [num_tokens, num_heads, head_size] after RoPE.
            query_scale: factor of a query of fp8, None with others (`observe_naive`).
        """
        if self._rows.records:
            rows = self._rows.token_rows
            if query_scale is None:
                self._observe(self.queries, layer_idx, query, rows)
            else:
                self._observe(self.queries, layer_idx, query, rows, query_scale)
