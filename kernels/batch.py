"""The evictions of one flush, as the kernels take them: every length on the host and on the device.

Host integers size the grids and the buffers, device tensors hold what a kernel looks up per
request; both are filled from the same list, so that no kernel ever has to wait for the device.
Knows no scheduler and no vLLM. Next: ops.py for what is done with a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rkv_vllm.kernels.paged import PagedStates

# What `non_finite` holds for a request whose scores are all finite: beyond any head.
ALL_FINITE = 2**31 - 1

# Windows are tiles of the kernels, in registers; a longer one would spill.
MAX_WINDOW = 128


class Eviction(NamedTuple):
    """One request's share of a flush. Lengths are physical, in tokens.

    With 16 tokens per block, prefix_len 20, settled_len 100, total_len 101 and budget 40: tokens
    [0, 20) stay in place, 40 of [20, 100) survive at [20, 60), token 100 follows at 60. Block 0 is
    full of prefix and never touched; block 1 holds tokens 16 to 19 of it.

    Attributes:
        old_block_ids: the blocks that hold tokens [0, total_len), in order.
        new_block_ids: the blocks for the survivors; block i is old block i or a foreign one, and
            old block i where it is full of prefix.
        settled_len: C, tokens [prefix_len, C) are judged.
        total_len: L >= C, tokens [C, L) follow the survivors unchanged.
        budget: survivors among the judged tokens, window <= budget <= C - prefix_len.
        prefix_len: P, tokens [0, P) stay where they are and are no candidates.
        seat: place in the query ring with the queries of the window, -1 without queries.
        window_end: logical position behind the last settled token.
        prompt_len: logical length of the prompt.
        seed: 64 bits, stable per (request, compaction), for methods that draw.
    """

    old_block_ids: Sequence[int]
    new_block_ids: Sequence[int]
    settled_len: int
    total_len: int
    budget: int
    prefix_len: int = 0
    seat: int = -1
    window_end: int = 0
    prompt_len: int = 0
    seed: int = 0

    @property
    def new_len(self) -> int:
        """Tokens after the eviction."""
        return self.prefix_len + self.budget + self.total_len - self.settled_len

    @property
    def num_judged(self) -> int:
        """Settled tokens behind the prefix, window included: n of SPEC 2."""
        return self.settled_len - self.prefix_len


@dataclass(frozen=True, eq=False)
class EvictionBatch:
    """All evictions that are carried out together.

    Attributes:
        evictions: the requests, on the host.
        window: newest settled tokens of every request, always kept.
        seeds: int64 [R].
        old_block_table: int32 [R, widest row], zero behind a row's end.
        new_block_table: int32 [R, widest row], zero behind a row's end.
        settled_lens: int32 [R].
        total_lens: int32 [R].
        budgets: int32 [R].
        prefix_lens: int32 [R].
        seats: int32 [R].
        window_ends: int32 [R].
        prompt_lens: int32 [R].
        non_finite: int32 [R], the first flattened head with a NaN or infinite score, else
            ALL_FINITE. Written by `select`, which on a device cannot raise.
        max_block_id: the largest id of all rows, -1 when there is none.
    """

    evictions: tuple[Eviction, ...]
    window: int
    seeds: Tensor
    old_block_table: Tensor
    new_block_table: Tensor
    settled_lens: Tensor
    total_lens: Tensor
    budgets: Tensor
    prefix_lens: Tensor
    seats: Tensor
    window_ends: Tensor
    prompt_lens: Tensor
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
        # Two int32 each, at the front, where they are aligned.
        seeds = np.array([e.seed & (2**64 - 1) for e in evictions], dtype=np.uint64)
        tables = [
            _table([getattr(e, name) for e in evictions])
            for name in ("old_block_ids", "new_block_ids")
        ]
        # One array for all lengths: making one costs more than filling it.
        lengths = np.array([e[_FIRST_LENGTH:_SEED] for e in evictions], dtype=np.int32)
        columns = [seeds.view(np.int32).reshape(-1, 2), *tables]
        columns.extend(lengths.reshape(-1, len(_LENGTHS)).T)
        columns.append(np.full(len(evictions), ALL_FINITE, dtype=np.int32))
        flat = torch.from_numpy(np.concatenate([column.ravel() for column in columns]))
        device = torch.device(device)
        if device.type != "cpu":
            # Pinned memory from torch's pool, which reuses it only after the copy is done.
            flat = flat.pin_memory().to(device, non_blocking=True)
        parts = flat.split([column.size for column in columns])
        tensors = [part.view(c.shape) for part, c in zip(parts, columns, strict=True)]
        max_block_id = max(int(table.max(initial=-1)) for table in tables)
        seeds_on_device = tensors[0].view(torch.int64).squeeze(1)
        return cls(tuple(evictions), window, seeds_on_device, *tensors[1:], max_block_id)

    @property
    def num_requests(self) -> int:
        """R."""
        return len(self.evictions)

    @cached_property
    def max_judged(self) -> int:
        """Most tokens that a request is judged on, 0 in an empty batch."""
        return max((e.num_judged for e in self.evictions), default=0)

    @cached_property
    def max_candidates(self) -> int:
        """Most candidates of a request, 0 in an empty batch."""
        return max(self.max_judged - self.window, 0)

    @cached_property
    def max_budget(self) -> int:
        """The largest budget, 0 in an empty batch."""
        return max((e.budget for e in self.evictions), default=0)

    def num_candidates(self, request: int) -> int:
        """Judged tokens of a request before its window: m of SPEC 2."""
        return self.evictions[request].num_judged - self.window

    def part(self, requests: slice, non_finite: Tensor | None = None) -> "EvictionBatch":
        """The same batch with some of its requests; shares the device tensors.

        Args:
            requests: which of them.
            non_finite: int32 [of these requests], where their flags go instead.
        """
        parts = {name: getattr(self, name)[requests] for name in _PER_REQUEST}
        flags = self.non_finite[requests] if non_finite is None else non_finite
        return replace(self, evictions=self.evictions[requests], non_finite=flags, **parts)

    def reseated(self) -> "EvictionBatch":
        """The same batch for queries that were copied request by request: i has seat i."""
        evictions = tuple(e._replace(seat=i) for i, e in enumerate(self.evictions))
        return replace(self, evictions=evictions, seats=torch.arange(len(evictions)).to(self.seats))

    def window_queries(self, request: int, queries: Tensor) -> Tensor:
        """Copy the queries that judge one request, in temporal order.

        Args:
            request: index in this batch.
            queries: [seats, num_layers, ring_len, num_query_heads, head_size]; the query of
                logical position p lies at p modulo ring_len.

        Returns:
            [num_layers * num_query_heads, window, head_size]
        """
        eviction = self.evictions[request]
        ring_len = queries.shape[2]
        positions = range(eviction.window_end - self.window, eviction.window_end)
        ring_idx = [position % ring_len for position in positions]
        recorded = queries[eviction.seat][:, ring_idx]
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
            full = e.prefix_len // states.block_size
            if list(e.old_block_ids[:full]) != list(e.new_block_ids[:full]):
                raise ValueError(
                    f"new_block_ids of request {i}: expected its {full} blocks full of prefix to "
                    f"stay {list(e.old_block_ids[:full])}, got {list(e.new_block_ids[:full])}"
                )


# Those of an Eviction, which the batch has as tensors.
_FIRST_LENGTH, _SEED = (Eviction._fields.index(name) for name in ("settled_len", "seed"))
_LENGTHS = Eviction._fields[_FIRST_LENGTH:_SEED]
_PER_REQUEST = ("seeds", "old_block_table", "new_block_table", *(f"{name}s" for name in _LENGTHS))


def _check(eviction: Eviction, window: int) -> None:
    _, _, settled_len, total_len, budget, prefix_len, seat, window_end, prompt_len, _ = eviction
    fits = (
        0 < window <= MAX_WINDOW
        and window <= budget <= settled_len - prefix_len
        and prefix_len >= 0
        and settled_len <= total_len
        and prompt_len >= 0
        and (seat < 0 or window <= window_end)
    )
    if not fits:
        raise ValueError(
            f"eviction: expected 0 < window <= {MAX_WINDOW}, window <= budget <= settled_len - "
            f"prefix_len, settled_len <= total_len, and with a seat window <= window_end, got "
            f"window {window}, budget {budget}, settled_len {settled_len}, total_len {total_len}, "
            f"prefix_len {prefix_len}, seat {seat}, window_end {window_end}, "
            f"prompt_len {prompt_len}"
        )


def _table(rows: list[Sequence[int]]) -> np.ndarray:
    """Rows of blocks as one matrix, int32 [R, longest row]."""
    table = np.zeros((len(rows), max(map(len, rows), default=0)), dtype=np.int32)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    if table.min(initial=0) < 0:
        raise ValueError(f"block ids: expected no negative ids, got {table.min()}")
    return table
