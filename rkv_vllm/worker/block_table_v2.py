"""Block tables of the V2 runner whose slots follow physical positions.

vLLM hands in logical positions (RoPE needs them); a compacted request's token lies `num_evicted`
slots earlier. The same kernel fills the lengths that attention reads and the tokens to observe, so
compression adds no launch to a step here. Next: kernels/slots for that kernel, runner_v2.py for who
fills `PhysicalRows`.
"""

from dataclasses import replace

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch

from rkv_vllm.fit.overrides import calls, overrides
from rkv_vllm.kernels.slots import StepRows, StepSlots
from rkv_vllm.kernels.slots.triton import slots_triton
from rkv_vllm.scheduling.directive import EvictionDirective
from rkv_vllm.worker.query_ring import QueryRing


class PhysicalRows:
    """What compression knows of each request state of the V2 runner.

    Args:
        max_num_reqs: request states of the runner.
        pool: whose `token_rows` a step fills.
        device: where the model runs.

    Attributes:
        num_evicted: int32 [max_num_reqs] on the host, tokens evicted from each request.
        slots: int32 [max_num_reqs] on the host, observation slot in the step at hand, -1 = none.
        seq_lens: int32 [max_num_reqs] on the device, physical lengths in batch order. Attention
            reads this one buffer in captured, dummy and real runs: graphs hold its address.
        pool: see above.
    """

    def __init__(self, max_num_reqs: int, pool: QueryRing, device: torch.device) -> None:
        self._host = np.zeros((2, max_num_reqs), dtype=np.int32)
        self.num_evicted, self.slots = self._host
        self.slots.fill(-1)
        # Not `.to(device)`: on a CPU that would be the host's memory itself.
        self._device = torch.zeros(2, max_num_reqs, dtype=torch.int32, device=device)
        self.seq_lens = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        self.pool = pool
        self._is_real_step = False

    def begin_step(self) -> None:
        """Send the host's rows to the device; the next metadata is that of a real step."""
        async_tensor_h2d(self._host, out=self._device)
        self._is_real_step = True

    def end_step(self) -> None:
        """Nothing that follows, up to the next `begin_step`, belongs to a request."""
        self._is_real_step = False

    def step_rows(self, state_idx: torch.Tensor, query_start_loc: torch.Tensor) -> StepRows:
        """The rows as the slots kernel reads them."""
        num_evicted, slots = self._device
        return StepRows(state_idx, query_start_loc, num_evicted, slots, self.pool.ring_len)

    def with_physical_lens(self, batch: InputBatch) -> InputBatch:
        """A copy of the batch for attention alone: everybody else reads logical lengths.

        Rows of a captured or dummy run belong to nobody, so nothing is subtracted there, although
        their numbers coincide with those of live requests.
        """
        seq_lens = self.seq_lens[: batch.seq_lens.shape[0]]
        upper_bound = batch.seq_lens_cpu_upper_bound
        if self._is_real_step:
            upper_bound = upper_bound.clone()
            evicted = torch.from_numpy(self.num_evicted[batch.idx_mapping_np])
            upper_bound[: batch.num_reqs] -= evicted
        else:
            seq_lens.copy_(batch.seq_lens)
        return replace(batch, seq_lens=seq_lens, seq_lens_cpu_upper_bound=upper_bound)


class PhysicalBlockTables(BlockTables):
    """BlockTables of one KV-cache group that subtract the evicted tokens of each request.

    Made by exchanging the class of a constructed BlockTables.
    """

    rows: PhysicalRows

    @overrides("vllm.v1.worker.gpu.block_table:BlockTables.compute_slot_mappings")
    def compute_slot_mappings(
        self,
        idx_mapping: torch.Tensor,
        query_start_loc: torch.Tensor,
        positions: torch.Tensor,
        num_tokens_padded: int,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map each token to the slot of its physical position.

        Args:
            idx_mapping: int64 [num_reqs], request state of each row; -1 is padding.
            query_start_loc: int32 [>= num_reqs + 1].
            positions: int64 [>= num_tokens], logical.
            num_tokens_padded: tokens of the result.
            out: int64 [1, max_num_tokens] to use in place of the persistent buffer.

        Returns:
            int64 [1, num_tokens_padded], -1 behind the last token.
        """
        slot_mappings = self.slot_mappings if out is None else out
        slots_triton(
            self.rows.step_rows(idx_mapping, query_start_loc),
            positions,
            self.block_tables[0].gpu,
            self.block_sizes[0],
            StepSlots(slot_mappings[0], self.rows.pool.token_rows, self.rows.seq_lens),
        )
        return slot_mappings[:, :num_tokens_padded]

    @calls("vllm.utils.torch_utils:async_tensor_h2d")
    def exchange_rows(self, directives: list[EvictionDirective], state_idx: list[int]) -> None:
        """Give compacted requests their new blocks, in stream order.

        Not as staged writes: those of a reused row would race with its new owner's.

        Args:
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
        self.block_tables[0].gpu[on_device[:, 0].long(), : max(widths)] = on_device[:, 1:]
        self.num_blocks.np[0, state_idx] = widths
