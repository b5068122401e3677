"""The observation pool: post-RoPE queries of the requests that will soon be compacted.

Knows tensors and token rows; the scheduler assigns the slots (scheduling/planner.py). A slot holds
a ring of `ring_len` positions per layer, keyed by logical position, so a rejected and recomputed
token overwrites itself. Next: attention_hook.py, which calls `record` once per layer.
"""

import torch
from torch import Tensor

from rkv_vllm.kernels.observe import observe


class ObservationPool:
    """Fixed memory for the queries of watched requests.

    Args:
        num_slots: requests that can be watched at once.
        num_layers: attention layers of this rank.
        ring_len: positions per slot, >= window + tokens in flight.
        num_heads: query heads of one layer on this rank.
        head_size: elements of one query.
        dtype: dtype of the queries.
        device: where the model runs.
    """

    def __init__(
        self,
        num_slots: int,
        num_layers: int,
        ring_len: int,
        num_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.queries = torch.zeros(
            num_slots, num_layers, ring_len, num_heads, head_size, dtype=dtype, device=device
        )
        self._ring_len = ring_len
        self._rows: tuple[Tensor, Tensor, Tensor] | None = None

    def watch(self, rows: list[tuple[int, int, int, int]]) -> None:
        """Say which tokens of the coming forward to record.

        Args:
            rows: one (slot, first token index, number of tokens, first logical position) per
                watched request. Of a row longer than the ring its last tokens are recorded.
        """
        token_idx: list[int] = []
        slot_ids: list[int] = []
        ring_idx: list[int] = []
        for slot, first_token, num_tokens, first_position in rows:
            for i in range(max(0, num_tokens - self._ring_len), num_tokens):
                token_idx.append(first_token + i)
                slot_ids.append(slot)
                ring_idx.append((first_position + i) % self._ring_len)
        if not token_idx:
            self._rows = None
            return
        self._rows = (
            torch.tensor(token_idx, device=self.queries.device),
            torch.tensor(slot_ids, device=self.queries.device),
            torch.tensor(ring_idx, device=self.queries.device),
        )

    def unwatch(self) -> None:
        """Record nothing: dummy and profile runs must not touch live windows."""
        self._rows = None

    def record(self, layer_idx: int, query: Tensor) -> None:
        """Record the watched tokens of one layer's forward.

        Args:
            layer_idx: layer of the pool.
            query: [num_tokens, num_heads, head_size] after RoPE.
        """
        if self._rows is not None:
            observe(self.queries, layer_idx, query, *self._rows)

    def window(self, slot: int, end: int, window: int, layers: slice) -> Tensor:
        """The queries of the `window` logical positions before `end`, in temporal order.

        Returns:
            [num_layers, num_heads, window, head_size]
        """
        positions = torch.arange(end - window, end, device=self.queries.device)
        return self.queries[slot, layers][:, positions % self._ring_len].transpose(1, 2)
