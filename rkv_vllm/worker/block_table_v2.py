"""Block tables of the V2 runner whose slots follow physical positions.

vLLM hands in logical positions (RoPE needs them); a compacted request's token lies `num_evicted`
slots earlier. The same kernel fills the lengths that attention reads and the tokens to record.
Next: kernels/slots for that kernel, runner_v2.py for who fills `StateRows`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.block_table import BlockTables

from rkv_vllm.fit.overrides import calls, overrides
from rkv_vllm.kernels.slots import StepRows, StepSlots
from rkv_vllm.kernels.slots.triton import slots_triton
from rkv_vllm.scheduling.directive import EvictionDirective
from rkv_vllm.worker.lengths import DraftRows, GroupRows


class StateRows:
    """What compression knows of each request state of the V2 runner.

    Args:
        groups: rows of the compressed groups, by KV-cache group.
        max_num_reqs: request states of the runner.
        device: where the model runs.

    Attributes:
        groups: see above.
        num_evicted: by group, int32 [max_num_reqs] on the host, tokens evicted from each request.
        seats: by group, int32 [max_num_reqs] on the host, seat in the step at hand, -1 = none.
        drafting: rows of a draft model's layers; None without one.
    """

    drafting: DraftRows | None = None

    def __init__(
        self, groups: Mapping[int, GroupRows], max_num_reqs: int, device: torch.device
    ) -> None:
        self.groups = groups
        self._host = np.zeros((2, len(groups), max_num_reqs), dtype=np.int32)
        # Not `.to(device)`: on a CPU that would be the host's memory itself.
        self._device = torch.zeros(self._host.shape, dtype=torch.int32, device=device)
        self.num_evicted = dict(zip(groups, self._host[0], strict=True))
        self.seats = dict(zip(groups, self._host[1], strict=True))
        self._host[1].fill(-1)
        self._is_own_call = False
        self._is_nobodys_call = False
        self._nobody = torch.zeros_like(self._device[:, 0])
        self._nobody[1] = -1
        # Written in place of the step's own buffers, which attention reads.
        self._unread: Tensor | None = None

    @calls("vllm.utils.torch_utils:async_tensor_h2d")
    def begin_step(self, state_idx: np.ndarray) -> None:
        """Send the host's rows to the device; the next metadata is that of a real step.

        Args:
            state_idx: int [rows of the step], request state of each row.
        """
        async_tensor_h2d(self._host, out=self._device)
        for group_id, rows in self.groups.items():
            evicted = torch.from_numpy(self.num_evicted[group_id][state_idx])
            rows.begin_step(evicted, subtract=False)
            rows.records = bool((self.seats[group_id][state_idx] >= 0).any())

    @contextmanager
    def own_call(self) -> Iterator[None]:
        """The slots computed within are those of the step, not those of a draft model."""
        self._is_own_call = True
        try:
            yield
        finally:
            self._is_own_call = False

    @contextmanager
    def nobodys_call(self) -> Iterator[None]:
        """The requests within are made up: nothing was evicted from them, none is recorded."""
        self._is_nobodys_call = True
        try:
            yield
        finally:
            self._is_nobodys_call = False

    def num_evicted_on_device(self, group_id: int) -> Tensor:
        """int32 [max_num_reqs], as of the last step."""
        return self._on_device(group_id)[0]

    def _on_device(self, group_id: int) -> Tensor:
        """int32 [2, max_num_reqs]: evicted tokens and seats of one group."""
        return self._device[:, list(self.groups).index(group_id)]

    def inputs(self, group_id: int, state_idx: Tensor, query_start_loc: Tensor) -> StepRows:
        """The rows of one group as the slots kernel reads them."""
        num_evicted, seats = self._nobody if self._is_nobodys_call else self._on_device(group_id)
        return StepRows(
            state_idx, query_start_loc, num_evicted, seats, self.groups[group_id].ring_len
        )

    def outputs(self, group_id: int, slot_mapping: Tensor) -> StepSlots:
        """Where the slots kernel writes."""
        rows = self.groups[group_id]
        if self._is_own_call:
            return StepSlots(slot_mapping, rows.token_rows, rows.seq_lens)
        # A draft model's mapping may be wider than a step; its lengths are kept by itself.
        most = rows.draft.token_rows.shape[0]
        if slot_mapping.shape[0] > most:
            raise ValueError(
                f"slots of a draft model: got a mapping of {slot_mapping.shape[0]} tokens, wanted "
                f"at most {most}, those of a step and one per request"
            )
        if self._unread is None:
            self._unread = torch.empty_like(rows.seq_lens)
        return StepSlots(slot_mapping, rows.draft.token_rows, self._unread)


class PhysicalBlockTables(BlockTables):
    """BlockTables that subtract the evicted tokens of each request in compressed groups.

    Made by exchanging the class of a constructed BlockTables.
    """

    rows: StateRows

    @overrides("vllm.v1.worker.gpu.block_table:BlockTables.compute_slot_mappings")
    def compute_slot_mappings(
        self,
        idx_mapping: torch.Tensor,
        query_start_loc: torch.Tensor,
        positions: torch.Tensor,
        num_tokens_padded: int,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map each token to its slot: that of its physical position in compressed groups.

        Args:
            idx_mapping: int64 [num_reqs], request state of each row; -1 is padding.
            query_start_loc: int32 [>= num_reqs + 1].
            positions: int64 [>= num_tokens], logical.
            num_tokens_padded: tokens of the result.
            out: int64 [num_groups, >= num_tokens_padded] to use in place of the persistent buffer.

        Returns:
            int64 [num_groups, num_tokens_padded], -1 behind the last token.
        """
        slot_mappings = self.slot_mappings if out is None else out
        if len(self.rows.groups) < self.num_kv_cache_groups:
            super().compute_slot_mappings(
                idx_mapping, query_start_loc, positions, num_tokens_padded, out
            )
        for group_id in self.rows.groups:
            slots_triton(
                self.rows.inputs(group_id, idx_mapping, query_start_loc),
                positions,
                self.block_tables[group_id].gpu,
                self.block_sizes[group_id],
                self.rows.outputs(group_id, slot_mappings[group_id]),
            )
        return slot_mappings[:, :num_tokens_padded]

    @calls("vllm.utils.torch_utils:async_tensor_h2d")
    def exchange_rows(
        self, group_id: int, directives: list[EvictionDirective], state_idx: list[int]
    ) -> None:
        """Give compacted requests their new blocks, in stream order.

        Not as staged writes: those of a reused row would race with its new owner's.

        Args:
            group_id: the KV-cache group of all directives.
            directives: evictions that were carried out.
            state_idx: request state of each.
        """
        if not directives:
            return
        widths = [len(directive.new_block_ids) for directive in directives]
        rows = np.zeros((len(directives), 1 + max(widths)), dtype=np.int32)
        rows[:, 0] = state_idx
        for row, directive, width in zip(rows, directives, widths, strict=True):
            row[1 : 1 + width] = directive.new_block_ids
        # What a row held behind its new end is dead, so zeros may lie there.
        on_device = async_tensor_h2d(rows, device=self.device)
        self.block_tables[group_id].gpu[on_device[:, 0].long(), : max(widths)] = on_device[:, 1:]
        self.num_blocks.np[group_id, state_idx] = widths
