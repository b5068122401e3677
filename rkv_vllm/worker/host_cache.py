"""Host memory of one rank, into which blocks and recorded queries of preempted requests go.

The scheduler hands out the host blocks (scheduling/swap.py), so nothing is kept here about any
request. Blocks are copied as they lie, bytes of all layers together; on a GPU in stream order,
which is all that protects what the copies read. Next: runner.py for when.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from rkv_vllm.scheduling.directive import SwapDirective
from rkv_vllm.scheduling.host_room import HostRoom
from rkv_vllm.worker.group import CompressedGroup

# Of one copy on the device: with what gathering takes, within the scratch of a flush.
_STAGING_BYTES = 64 << 20


class HostCache:
    """Saves and restores what the scheduler names.

    Args:
        groups: the compressed groups, by index in vLLM's configuration.
        room: of the engine.
        device: where the caches lie.

    Raises:
        ValueError: the host has no room for it.
    """

    def __init__(
        self, groups: dict[int, CompressedGroup], room: HostRoom, device: torch.device
    ) -> None:
        # By group, the views [layers, blocks, ...] whose rows make up one of its blocks.
        self._views = {
            group_id: [
                states.cells for layer_set in group.layer_sets for states in layer_set.stored
            ]
            for group_id, group in groups.items()
        }
        self._rings = {
            group_id: [each.ring.queries for each in group.layer_sets if each.ring is not None]
            for group_id, group in groups.items()
        }
        self._device = device
        self._row_bytes = max(sum(map(_bytes_of_block, views)) for views in self._views.values())
        self._rows_per_window = room.blocks_per_window
        self._memory = _allocate(room.num_blocks, self._row_bytes, device)
        self._check_windows()

    def save(self, directives: Iterable[SwapDirective]) -> None:
        """Copy requests to the host; call it right behind the flush."""
        for directive in directives:
            for block_ids, host_ids in self._pieces(directive):
                rows = self._new_rows(len(host_ids))
                for part, view in self._parts(rows, directive.group_id):
                    part.copy_(view[:, block_ids].transpose(0, 1))
                self._put(host_ids, rows)
            if directive.seat >= 0 and self._rings[directive.group_id]:
                rows = self._new_rows(self._rows_per_window)
                for part, queries in self._window_parts(rows, directive):
                    part.copy_(queries.reshape(-1).view(torch.uint8))
                self._put(directive.host_window_ids, rows)

    def restore(self, directives: Iterable[SwapDirective]) -> None:
        """Copy requests back; call it behind `save` and before the forward."""
        for directive in directives:
            for block_ids, host_ids in self._pieces(directive):
                rows = self._get(host_ids)
                for part, view in self._parts(rows, directive.group_id):
                    view[:, block_ids] = part.transpose(0, 1)
            if directive.seat >= 0 and self._rings[directive.group_id]:
                rows = self._get(directive.host_window_ids)
                for part, queries in self._window_parts(rows, directive):
                    queries.copy_(part.view(queries.dtype).view(queries.shape))

    def _pieces(self, directive: SwapDirective) -> Iterator[tuple[Tensor, list[int]]]:
        """Cut a request where the copy on the device would get too large."""
        if not self._views[directive.group_id]:
            return
        step = max(1, _STAGING_BYTES // self._row_bytes)
        for first in range(0, len(directive.block_ids), step):
            block_ids = directive.block_ids[first : first + step]
            yield (
                torch.tensor(block_ids, device=self._device),
                directive.host_block_ids[first : first + step],
            )

    def _parts(self, rows: Tensor, group_id: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Of rows uint8 [blocks, row bytes] the share [blocks, layers, ...] of each view."""
        first = 0
        for view in self._views[group_id]:
            end = first + _bytes_of_block(view)
            part = rows[:, first:end].view(view.dtype)
            yield part.unflatten(1, (view.shape[0], *view.shape[2:])), view
            first = end

    def _window_parts(
        self, rows: Tensor, directive: SwapDirective
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Of rows the bytes of each layer set's queries, beside these."""
        flat, first = rows.view(-1), 0
        for queries in self._rings[directive.group_id]:
            of_seat = queries[directive.seat]
            end = first + of_seat.nbytes
            yield flat[first:end], of_seat
            first = end

    def _check_windows(self) -> None:
        for group_id, rings in self._rings.items():
            needed = sum(queries[0].nbytes for queries in rings)
            if needed > self._rows_per_window * self._row_bytes:
                raise ValueError(
                    f"--kv-swap-space: the queries recorded for one request take {needed} bytes "
                    f"in KV-cache group {group_id} on this rank, wanted at most "
                    f"{self._rows_per_window * self._row_bytes}: its layers have heads of several "
                    "kinds; leave --kv-swap-space out"
                )

    def _new_rows(self, count: int) -> Tensor:
        return torch.empty(count, self._row_bytes, dtype=torch.uint8, device=self._device)

    def _put(self, host_ids: Sequence[int], rows: Tensor) -> None:
        for first, end, host_id in _runs(host_ids):
            on_host = self._memory[host_id : host_id + end - first]
            on_host.copy_(rows[first:end], non_blocking=True)

    def _get(self, host_ids: Sequence[int]) -> Tensor:
        rows = self._new_rows(len(host_ids))
        for first, end, host_id in _runs(host_ids):
            on_host = self._memory[host_id : host_id + end - first]
            rows[first:end].copy_(on_host, non_blocking=True)
        return rows


def _bytes_of_block(view: Tensor) -> int:
    return view.shape[0] * prod(view.shape[2:]) * view.element_size()


def _runs(host_ids: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Neighbouring host blocks: first and end of their places in the list, id of the first."""
    cuts = [i for i, (a, b) in enumerate(pairwise(host_ids), 1) if b != a + 1]
    for first, end in pairwise([0, *cuts, len(host_ids)]):
        yield first, end, host_ids[first]


def _allocate(num_blocks: int, row_bytes: int, device: torch.device) -> Tensor:
    try:
        memory = torch.empty(num_blocks, row_bytes, dtype=torch.uint8)
        if device.type == "cuda" and memory.nbytes:
            # Not `pin_memory=True`, which takes the next power of two.
            error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
            if error.value:
                raise RuntimeError(f"cudaHostRegister: {error}")
    except RuntimeError as error:
        raise ValueError(
            f"--kv-swap-space: this rank's share of {num_blocks * row_bytes / 2**30:.1f} GiB of "
            f"host memory is not to be had ({error}); lower it"
        ) from error
    return memory
