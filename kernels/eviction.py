"""The evictions of one flush, as the kernels take them: every length on the host and on the device.

Host integers size the grids and the buffers, device tensors hold what a kernel looks up per
request; both are filled from the same list, so that no kernel ever has to wait for the device.
Knows no scheduler and no vLLM. Next: score/, select/ and compact/, in this order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rkv_vllm.kernels.paged import PagedStates

# Dtypes that can be scored; fp8 caches hold bytes with a scale elsewhere.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# What `non_finite` holds for a request whose scores are all finite: beyond any head.
ALL_FINITE = 2**31 - 1


class Eviction(NamedTuple):
    """One request's share of a flush. Lengths are physical, in tokens.

    Attributes:
        old_block_ids: the blocks that hold tokens [0, total_len), in order.
        new_block_ids: the blocks for the survivors; block i is old block i or a foreign one.
        settled_len: C, tokens [0, C) are judged.
        total_len: L >= C, tokens [C, L) follow the survivors unchanged.
        budget: survivors among the settled tokens, window < budget <= C.
        slot: observation slot with the queries of the window.
        window_end: logical position behind the last settled token.
    """

    old_block_ids: Sequence[int]
    new_block_ids: Sequence[int]
    settled_len: int
    total_len: int
    budget: int
    slot: int
    window_end: int

    @property
    def new_len(self) -> int:
        """Tokens after the eviction."""
        return self.budget + self.total_len - self.settled_len


@dataclass(frozen=True, eq=False)
class EvictionBatch:
    """All evictions that are carried out together.

    Attributes:
        evictions: the requests, on the host.
        window: newest settled tokens of every request; their queries judge the others.
        old_block_table: int32 [R, widest row], zero behind a row's end.
        new_block_table: int32 [R, widest row], zero behind a row's end.
        settled_lens: int32 [R].
        total_lens: int32 [R].
        budgets: int32 [R].
        slots: int32 [R].
        window_ends: int32 [R].
        non_finite: int32 [R], the first flattened head with a NaN or infinite score, else
            ALL_FINITE. Written by kernels that cannot raise because they run on a stream.
        max_block_id: the largest id of all rows, -1 when there is none.
    """

    evictions: tuple[Eviction, ...]
    window: int
    old_block_table: Tensor
    new_block_table: Tensor
    settled_lens: Tensor
    total_lens: Tensor
    budgets: Tensor
    slots: Tensor
    window_ends: Tensor
    non_finite: Tensor
    max_block_id: int

    @classmethod
    def of(
        cls, evictions: Sequence[Eviction], window: int, device: torch.device | str
    ) -> "EvictionBatch":
        """Bring evictions to the device, in one copy that the host does not wait for.

        Args:
            evictions: the requests, any number.
            window: newest settled tokens of every request.
            device: where the cache lies.

        Returns:
            The batch.

        Raises:
            ValueError: the lengths of an eviction contradict each other or its rows.
        """
        for eviction in evictions:
            _check(eviction, window)
        rows = ("old_block_ids", "new_block_ids")
        columns = [_table([getattr(e, name) for e in evictions]) for name in rows]
        for name in ("settled_len", "total_len", "budget", "slot", "window_end"):
            columns.append(np.array([getattr(e, name) for e in evictions], dtype=np.int32))
        columns.append(np.full(len(evictions), ALL_FINITE, dtype=np.int32))
        flat = torch.from_numpy(np.concatenate([column.ravel() for column in columns]))
        device = torch.device(device)
        if device.type != "cpu":
            # Pinned memory from torch's pool, which reuses it only after the copy is done.
            flat = flat.pin_memory().to(device, non_blocking=True)
        parts = flat.split([column.size for column in columns])
        tensors = [part.view(c.shape) for part, c in zip(parts, columns, strict=True)]
        max_block_id = max(int(table.max(initial=-1)) for table in columns[:2])
        return cls(tuple(evictions), window, *tensors, max_block_id)

    @property
    def num_requests(self) -> int:
        """R."""
        return len(self.evictions)

    @property
    def max_settled_len(self) -> int:
        """Settled tokens of the longest request, 0 in an empty batch."""
        return max((e.settled_len for e in self.evictions), default=0)

    @property
    def max_candidates(self) -> int:
        """Settled tokens before the window of the longest request, 0 in an empty batch."""
        return max(self.max_settled_len - self.window, 0)

    @property
    def max_budget(self) -> int:
        """The largest budget, 0 in an empty batch."""
        return max((e.budget for e in self.evictions), default=0)

    def part(self, requests: slice, non_finite: Tensor | None = None) -> "EvictionBatch":
        """The same batch with some of its requests; shares the device tensors.

        Args:
            requests: which of them.
            non_finite: int32 [of these requests], where their flags go instead.
        """
        names = ("old_block_table", "new_block_table", "settled_lens", "total_lens", "budgets")
        parts = {name: getattr(self, name)[requests] for name in (*names, "slots", "window_ends")}
        flags = self.non_finite[requests] if non_finite is None else non_finite
        return replace(self, evictions=self.evictions[requests], non_finite=flags, **parts)

    def window_queries(self, request: int, observation_queries: Tensor) -> Tensor:
        """Copy the queries that judge one request, in temporal order.

        Args:
            request: index in this batch.
            observation_queries: [slots, num_layers, ring_len, num_query_heads, head_size]; the
                query of logical position p lies at p modulo ring_len.

        Returns:
            [num_layers * num_query_heads, window, head_size]
        """
        eviction = self.evictions[request]
        ring_len = observation_queries.shape[2]
        positions = range(eviction.window_end - self.window, eviction.window_end)
        ring_idx = [position % ring_len for position in positions]
        recorded = observation_queries[eviction.slot][:, ring_idx]
        return recorded.transpose(1, 2).flatten(0, 1)

    def check_rows(self, states: PagedStates) -> None:
        """Raise ValueError unless every row lies in this cache and holds its tokens."""
        if self.max_block_id >= states.num_blocks:
            raise ValueError(
                f"block ids: expected ids in [0, {states.num_blocks}), got {self.max_block_id}"
            )
        if self.settled_lens.device != states.device:
            raise ValueError(
                f"batch: expected on {states.device} like the cache, got {self.settled_lens.device}"
            )
        for i, e in enumerate(self.evictions):
            for name, row, length in (
                ("old_block_ids", e.old_block_ids, e.total_len),
                ("new_block_ids", e.new_block_ids, e.new_len),
            ):
                if len(row) * states.block_size < length:
                    raise ValueError(
                        f"{name} of request {i}: expected blocks for {length} tokens, got "
                        f"{len(row)} of {states.block_size}"
                    )

    def check_observations(self, observation_queries: Tensor, keys: PagedStates) -> int:
        """Query heads per KV head; ValueError unless every window lies in this pool."""
        shape = list(observation_queries.shape)
        fits = (
            len(shape) == 5
            and shape[1] == keys.num_layers
            and shape[2] >= self.window
            and shape[3] >= keys.num_heads
            and shape[3] % keys.num_heads == 0
            and shape[4] == keys.head_size
        )
        if not fits or observation_queries.device != keys.device:
            raise ValueError(
                f"observation_queries: expected [slots, {keys.num_layers}, >= {self.window}, "
                f"multiple of {keys.num_heads}, {keys.head_size}] on {keys.device}, got {shape} "
                f"on {observation_queries.device}"
            )
        for name, dtype in (
            ("keys", keys.dtype),
            ("observation_queries", observation_queries.dtype),
        ):
            if dtype not in FLOATS:
                raise ValueError(f"{name}: expected one of {FLOATS}, got {dtype}")
        slots = [eviction.slot for eviction in self.evictions]
        if any(not 0 <= slot < shape[0] for slot in slots):
            raise ValueError(f"slots: expected ids in [0, {shape[0]}), got {slots}")
        return shape[3] // keys.num_heads

    def check_scores(self, scores: Tensor) -> None:
        """Raise ValueError unless these are scores of this batch."""
        shape = list(scores.shape)
        fits = len(shape) == 3 and shape[0] == self.num_requests and shape[2] == self.max_candidates
        if not fits or scores.dtype != torch.float32 or scores.device != self.settled_lens.device:
            raise ValueError(
                f"scores: expected float32 [{self.num_requests}, heads, {self.max_candidates}] on "
                f"{self.settled_lens.device}, got {scores.dtype} {shape} on {scores.device}"
            )

    def check_keep(self, keep: Tensor, states: PagedStates) -> None:
        """Raise ValueError unless this is a choice for this batch and this cache."""
        num_heads = states.num_layers * states.num_heads
        expected = (self.num_requests, num_heads, self.max_budget)
        if keep.shape != expected or keep.dtype != torch.int32 or keep.device != states.device:
            raise ValueError(
                f"keep: expected int32 {list(expected)} on {states.device}, got {keep.dtype} "
                f"{list(keep.shape)} on {keep.device}"
            )


def _check(eviction: Eviction, window: int) -> None:
    _, _, settled_len, total_len, budget, _, window_end = eviction
    if not (0 < window < budget <= settled_len <= total_len and window <= window_end):
        raise ValueError(
            f"eviction: expected 0 < window < budget <= settled_len <= total_len and window <= "
            f"window_end, got window {window}, budget {budget}, settled_len {settled_len}, "
            f"total_len {total_len}, window_end {window_end}"
        )


def _table(rows: list[Sequence[int]]) -> np.ndarray:
    """Rows of blocks as one matrix, int32 [R, longest row]."""
    table = np.zeros((len(rows), max(map(len, rows), default=0)), dtype=np.int32)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    if table.min(initial=0) < 0:
        raise ValueError(f"block ids: expected no negative ids, got {table.min()}")
    return table
