"""vLLM's V2 model runner with compaction: where its lengths become physical.

A request keeps its state index for as long as it runs, so the evicted tokens are kept per index
(`StateRows`). Slots and lengths are made physical in one kernel before the forward; captured graphs
then read them at fixed addresses. Nothing here waits for the device. Next:
block_table_v2.py for that kernel's buffers, runner.py for what V1 shares.
"""

import numpy as np
import torch
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from rkv_vllm.fit.overrides import overrides
from rkv_vllm.scheduling.directive import EvictionDirective
from rkv_vllm.worker.block_table_v2 import PhysicalBlockTables, StateRows
from rkv_vllm.worker.drafting import draft_at_physical_lengths, draft_in
from rkv_vllm.worker.runner import CompressionRunner


class CompressionRunnerV2(CompressionRunner):
    """Compaction for vllm.v1.worker.gpu.model_runner.GPUModelRunner."""

    state_rows: StateRows

    @overrides("vllm.v1.worker.gpu.model_runner:GPUModelRunner.load_model")
    def load_model(self, *args, **kwargs) -> None:
        """Load the model; count the tokens of each request state from then on."""
        super().load_model(*args, **kwargs)
        if isinstance(self.speculator, DraftModelSpeculator):
            draft_at_physical_lengths(self.speculator)
        # As of its last step, the sampled token included.
        self._num_tokens = np.zeros(self.max_num_reqs, dtype=np.int32)

    @overrides("vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_attn")
    def prepare_attn(
        self, input_batch: InputBatch
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Gather the block tables and slots of a real step."""
        rows = self.state_rows
        idx = input_batch.idx_mapping_np[: input_batch.num_reqs]
        for seats in rows.seats.values():
            seats.fill(-1)
        for group_id, watched in self._watched.items():
            for req_id, seat in watched.items():
                rows.seats[group_id][self.req_states.req_id_to_index[req_id]] = seat
        rows.begin_step(idx)
        self._num_tokens[idx] = (
            input_batch.num_computed_tokens_np + input_batch.num_scheduled_tokens + 1
        )
        with rows.own_call():
            prepared = super().prepare_attn(input_batch)
        if rows.drafting is not None:
            rows.drafting.begin_step(self.rows[self.speculator.draft_group_id])
        return prepared

    def _follow_physical_positions(self) -> None:
        self.state_rows = StateRows(self.rows, self.max_num_reqs, self.device)
        self.block_tables.__class__ = PhysicalBlockTables
        self.block_tables.rows = self.state_rows
        if isinstance(self.speculator, DraftModelSpeculator):
            groups = enumerate(self.kv_cache_config.kv_cache_groups)
            names = {group_id: set(group.layer_names) for group_id, group in groups}
            draft_in(self.speculator, self.state_rows, names)

    def _exchange_rows(self, directives: list[EvictionDirective]) -> None:
        state_idx = self.req_states.req_id_to_index
        for group_id, group in self.compactor.groups.items():
            running = [d for d in directives if d.group_id == group_id and d.req_id in state_idx]
            idx = [state_idx[directive.req_id] for directive in running]
            self.block_tables.exchange_rows(group_id, running, idx)
            for i, directive in zip(idx, running, strict=True):
                self.state_rows.num_evicted[group_id][i] = group.num_evicted(directive.req_id)

    @overrides("vllm.v1.worker.gpu.model_runner:GPUModelRunner.add_requests")
    def add_requests(self, scheduler_output) -> None:
        """Admit new and resumed requests: their cache is as long as their text, or swapped in."""
        super().add_requests(scheduler_output)
        for new_request in scheduler_output.scheduled_new_reqs:
            idx = self.req_states.req_id_to_index[new_request.req_id]
            for group_id, num_evicted in self.state_rows.num_evicted.items():
                num_evicted[idx] = self.compactor.groups[group_id].num_evicted(new_request.req_id)
            self._num_tokens[idx] = new_request.prompt_len

    def _live_ids(self) -> list[str]:
        return list(self.req_states.req_id_to_index)

    def _lengths(self, req_id: str) -> tuple[int, int, int]:
        idx = self.req_states.req_id_to_index[req_id]
        prompt_tokens = int(self.req_states.prompt_len.np[idx])
        # In the middle of a chunked prefill nothing is sampled yet.
        output_tokens = max(0, int(self._num_tokens[idx]) - prompt_tokens)
        blocks_held = int(self.block_tables.num_blocks.np[list(self.rows), idx].sum())
        return prompt_tokens, output_tokens, blocks_held
