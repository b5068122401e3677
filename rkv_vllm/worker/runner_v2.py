"""vLLM's V2 model runner with compaction: where its lengths become physical.

A request keeps its state index for as long as it runs, so the evicted tokens are kept per index
(`PhysicalRows`). Slots and lengths are made physical in one kernel before the forward; captured
graphs then read them at fixed addresses. Nothing here waits for the device. Next:
block_table_v2.py for that kernel's buffers, runner.py for what V1 shares.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.interface import ModelState

from rkv_vllm.fit.overrides import overrides
from rkv_vllm.scheduling.directive import EvictionDirective
from rkv_vllm.worker.block_table_v2 import PhysicalBlockTables, PhysicalRows
from rkv_vllm.worker.runner import CompressionRunner


class CompressionRunnerV2(CompressionRunner):
    """Compaction for vllm.v1.worker.gpu.model_runner.GPUModelRunner."""

    physical_rows: PhysicalRows

    @overrides("vllm.v1.worker.gpu.model_runner:GPUModelRunner.load_model")
    def load_model(self, *args, **kwargs) -> None:
        """Load the model; attention metadata is made from physical lengths from then on."""
        super().load_model(*args, **kwargs)
        self.physical_rows = PhysicalRows(self.max_num_reqs, self.query_ring, self.device)
        # Tokens of each request state as of its last step, the sampled one included.
        self._num_tokens = np.zeros(self.max_num_reqs, dtype=np.int32)
        model_state = self.model_state
        model_state.__class__ = _physical_model_state(type(model_state))
        model_state.physical_rows = self.physical_rows

    @overrides("vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_attn")
    def prepare_attn(
        self, input_batch: InputBatch
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Gather the block tables and slots of a real step."""
        rows = self.physical_rows
        state_idx = self.req_states.req_id_to_index
        rows.slots.fill(-1)
        for req_id, slot in self._watched.items():
            rows.slots[state_idx[req_id]] = slot
        rows.begin_step()
        self._num_tokens[input_batch.idx_mapping_np] = (
            input_batch.num_computed_tokens_np + input_batch.num_scheduled_tokens + 1
        )
        return super().prepare_attn(input_batch)

    def _end_step(self) -> None:
        self.physical_rows.end_step()
        super()._end_step()

    def _follow_physical_positions(self) -> None:
        self.block_tables.__class__ = PhysicalBlockTables
        self.block_tables.rows = self.physical_rows

    def _exchange_rows(self, directives: list[EvictionDirective]) -> None:
        state_idx = self.req_states.req_id_to_index
        running = [directive for directive in directives if directive.req_id in state_idx]
        idx = [state_idx[directive.req_id] for directive in running]
        self.block_tables.exchange_rows(running, idx)
        for i, directive in zip(idx, running, strict=True):
            self.physical_rows.num_evicted[i] = self.compactor.num_evicted(directive.req_id)

    @overrides("vllm.v1.worker.gpu.model_runner:GPUModelRunner.add_requests")
    def add_requests(self, scheduler_output) -> None:
        """Admit new and resumed requests: their cache is as long as their text."""
        super().add_requests(scheduler_output)
        for new_request in scheduler_output.scheduled_new_reqs:
            idx = self.req_states.req_id_to_index[new_request.req_id]
            self.physical_rows.num_evicted[idx] = 0
            self._num_tokens[idx] = new_request.prompt_len

    def _live_ids(self) -> list[str]:
        return list(self.req_states.req_id_to_index)

    def _lengths(self, req_id: str) -> tuple[int, int, int]:
        idx = self.req_states.req_id_to_index[req_id]
        prompt_tokens = int(self.req_states.prompt_len.np[idx])
        # In the middle of a chunked prefill nothing is sampled yet.
        output_tokens = max(0, int(self._num_tokens[idx]) - prompt_tokens)
        return prompt_tokens, output_tokens, int(self.block_tables.num_blocks.np[0, idx])


@overrides("vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_attn")
@cache
def _physical_model_state(base: type[ModelState]) -> type[ModelState]:
    """A subclass of one model state whose attention metadata is made from physical lengths."""

    def prepare_attn(self, input_batch: InputBatch, *args, **kwargs) -> dict[str, Any]:
        batch = self.physical_rows.with_physical_lens(input_batch)
        return base.prepare_attn(self, batch, *args, **kwargs)

    return type(f"Physical{base.__name__}", (base,), {"prepare_attn": prepare_attn})
