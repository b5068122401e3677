"""Block table of the V1 runner whose slots follow physical positions.

vLLM hands in logical positions (RoPE needs them); a compacted request's token lies `num_evicted`
slots earlier. Next: runner_v1.py, which fills `num_evicted` before each step.
"""

import torch
from vllm.v1.worker.block_table import MultiGroupBlockTable

from rkv_vllm.fit.overrides import calls, overrides


class PhysicalBlockTable(MultiGroupBlockTable):
    """MultiGroupBlockTable that subtracts the evicted tokens of each row.

    Attributes:
        num_evicted: by KV-cache group, int64 [num_reqs]; groups of which no row of the step was
            ever compacted are missing.
    """

    num_evicted: dict[int, torch.Tensor]

    @overrides("vllm.v1.worker.block_table:MultiGroupBlockTable.compute_slot_mapping")
    @calls("vllm.v1.worker.block_table:BlockTable.compute_slot_mapping")
    def compute_slot_mapping(
        self, num_reqs: int, query_start_loc: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """Map each token to the slot of its physical position.

        Args:
            num_reqs: rows of the step.
            query_start_loc: int32 [num_reqs + 1].
            positions: int64 [num_tokens], logical.
        """
        for group_id, table in enumerate(self.block_tables):
            physical = positions
            if group_id in self.num_evicted:
                num_tokens = query_start_loc.diff()
                physical = positions - self.num_evicted[group_id].repeat_interleave(num_tokens)
            table.compute_slot_mapping(num_reqs, query_start_loc, physical)
