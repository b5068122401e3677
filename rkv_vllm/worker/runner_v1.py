"""vLLM's V1 model runner with compaction: where its lengths become physical.

Rows move inside V1's batch, so all state is keyed by request. The slot mapping
(block_table_v1.py) and what attention sees (lengths.py) become physical. Next: runner.py for what
V2 shares.
"""

import numpy as np
import torch
from vllm.distributed.parallel_state import get_pp_group
from vllm.v1.core.sched.output import SchedulerOutput

from rkv_vllm.fit.overrides import calls, overrides
from rkv_vllm.scheduling.directive import EvictionDirective
from rkv_vllm.worker.block_table_v1 import PhysicalBlockTable
from rkv_vllm.worker.runner import CompressionRunner


class CompressionRunnerV1(CompressionRunner):
    """Compaction for vllm.v1.worker.gpu_model_runner.GPUModelRunner on a CPU."""

    @overrides("vllm.v1.worker.cpu_model_runner:CPUModelRunner.load_model")
    def load_model(self, *args, **kwargs) -> None:
        """Load the model; make the buffers that a later pipeline stage receives into."""
        super().load_model(*args, **kwargs)
        if not get_pp_group().is_first_rank and self.intermediate_tensors is None:
            # vLLM makes them in its warm-up run, which an eager engine on a CPU leaves out.
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.dtype, device=self.device
            )

    def _follow_physical_positions(self) -> None:
        block_table = self.input_batch.block_table
        block_table.__class__ = PhysicalBlockTable
        block_table.num_evicted = {}

    @overrides("vllm.v1.worker.cpu_model_runner:CPUModelRunner._prepare_inputs")
    def _prepare_inputs(self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray):
        num_evicted = self.input_batch.block_table.num_evicted
        for group_id, rows in self.rows.items():
            group = self.compactor.groups[group_id]
            evicted = torch.tensor(
                [group.num_evicted(req_id) for req_id in self.input_batch.req_ids]
            )
            rows.begin_step(evicted.to(torch.int32), subtract=True)
            if evicted.any():
                num_evicted[group_id] = evicted
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        for group_id, watched in self._watched.items():
            self.rows[group_id].watch(self._watched_rows(watched, num_scheduled_tokens))
        return prepared

    def _watched_rows(
        self, watched: dict[str, int], num_scheduled_tokens: np.ndarray
    ) -> list[tuple[int, int, int, int]]:
        """What `GroupRows.watch` wants of the requests with a seat."""
        rows = []
        for req_id, seat in watched.items():
            row = self.input_batch.req_id_to_index[req_id]
            first_token = int(self.query_start_loc.np[row])
            first_position = int(self.input_batch.num_computed_tokens_cpu[row])
            rows.append((seat, first_token, int(num_scheduled_tokens[row]), first_position))
        return rows

    def _end_step(self) -> None:
        super()._end_step()
        self.input_batch.block_table.num_evicted.clear()

    @calls("vllm.v1.worker.block_table:BlockTable.add_row")
    def _exchange_rows(self, directives: list[EvictionDirective]) -> None:
        for directive in directives:
            state = self.requests.get(directive.req_id)
            if state is None:
                continue
            group_id = directive.group_id
            block_ids = list(directive.new_block_ids)
            # One list per group, which vLLM appends to in place.
            state.block_ids = tuple(
                block_ids if i == group_id else ids for i, ids in enumerate(state.block_ids)
            )
            row = self.input_batch.req_id_to_index.get(directive.req_id)
            if row is not None:
                self.input_batch.block_table[group_id].add_row(block_ids, row)

    def _live_ids(self) -> list[str]:
        return list(self.requests)

    def _lengths(self, req_id: str) -> tuple[int, int, int]:
        state = self.requests[req_id]
        blocks_held = sum(len(state.block_ids[group_id]) for group_id in self.rows)
        return state.num_prompt_tokens, len(state.output_token_ids), blocks_held
