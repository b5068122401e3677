"""The observation pool: post-RoPE queries of the requests that will soon be compacted.

Knows tensors and token rows; the scheduler assigns the slots (scheduling/planner.py). A slot holds
a ring of `ring_len` positions per layer, keyed by logical position, so a rejected and recomputed
token overwrites itself. Next: attention_hook.py, which calls `record` once per layer.
"""

import numpy as np
import torch
from torch import Tensor

from rkv_vllm.kernels.ops import Ops


class QueryRing:
    """Fixed memory for the queries of watched requests.

    Args:
        num_slots: requests that can be watched at once.
        num_layers: attention layers of this rank.
        ring_len: positions per slot, >= window + tokens in flight.
        num_heads: query heads of one layer on this rank.
        head_size: elements of one query.
        max_num_tokens: most tokens of one step.
        dtype: dtype of the queries.
        device: where the model runs.

    Attributes:
        queries: [num_slots, num_layers, ring_len, num_heads, head_size].
        token_rows: int32 [max_num_tokens], where each token of the step is recorded, -1 = nowhere
            (`observe_naive` has the formula). Captured graphs hold its address.
        ring_len: see above.
        ops: the kernels of the cache, None as long as there is none; nothing is recorded then.
    """

    ops: Ops | None = None

    def __init__(
        self,
        num_slots: int,
        num_layers: int,
        ring_len: int,
        num_heads: int,
        head_size: int,
        max_num_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.queries = torch.zeros(
            num_slots, num_layers, ring_len, num_heads, head_size, dtype=dtype, device=device
        )
        self.token_rows = torch.full((max_num_tokens,), -1, dtype=torch.int32, device=device)
        self.ring_len = ring_len

    def watch(self, rows: list[tuple[int, int, int, int]]) -> None:
        """Say which tokens of the coming forward to record, all others not.

        Args:
            rows: one (slot, first token index, number of tokens, first logical position) per
                watched request. Of a row longer than the ring its last tokens are recorded.
        """
        self.unwatch()
        token_rows = self.token_rows.numpy()
        for slot, first_token, num_tokens, first_position in rows:
            recorded = np.arange(max(0, num_tokens - self.ring_len), num_tokens)
            ring_idx = (first_position + recorded) % self.ring_len
            token_rows[first_token + recorded] = slot * self.ring_len + ring_idx

    def unwatch(self) -> None:
        """Record nothing: dummy and profile runs must not touch live windows."""
        self.token_rows.fill_(-1)

    def record(self, layer_idx: int, query: Tensor) -> None:
        """Record the watched tokens of one layer's forward.

        Args:
            layer_idx: layer of the pool.
            query: [num_tokens, num_heads, head_size] after RoPE.
        """
        if self.ops is not None:
            self.ops.observe(self.queries, layer_idx, query, self.token_rows)
