"""A draft model beside a compacted target: its layers stand in the target's group.

They are compacted by the same directives as the target's, each by the scores of its own heads, so
that one block table serves all; what they keep moves the share of accepted drafts, never the text.
What vLLM's speculators know of lengths is made physical here, in copies; the slots of their steps
are computed by block_table_v2.py. Knows one speculator of the V2 runner. Next: runner_v2.py.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from rkv_vllm.fit.overrides import overrides
from rkv_vllm.worker.block_table_v2 import StateRows


def draft_at_physical_lengths(speculator: DraftModelSpeculator) -> None:
    """Let a speculator attend to as many tokens as its layers' cache holds.

    Until it has rows (`draft_in`) it profiles without a cache.
    """
    speculator.__class__ = _physical_class(type(speculator))
    speculator.state_rows = None


def draft_in(
    speculator: DraftModelSpeculator, state_rows: StateRows, layer_names: dict[int, set[str]]
) -> None:
    """Give a speculator the rows of the group that its layers stand in.

    Args:
        speculator: after `draft_at_physical_lengths`.
        state_rows: of the runner.
        layer_names: of every KV-cache group of the model, target and draft.

    Raises:
        ValueError: its layers stand in several groups, or in one that is not compressed.
    """
    drafting = speculator.draft_attn_layer_names
    groups = [group_id for group_id, names in layer_names.items() if names & drafting]
    if len(groups) != 1 or groups[0] not in state_rows.groups:
        raise ValueError(
            "speculative decoding with a draft model: got its layers in the KV-cache groups "
            f"{groups}, of which {sorted(state_rows.groups)} are compressed, wanted all in one "
            "compressed group; draft without a cache (ngram), or remove --kv-compression"
        )
    speculator.state_rows = state_rows
    speculator.draft_group_id = groups[0]
    state_rows.drafting = state_rows.groups[groups[0]].draft


@overrides(
    "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator"
    ":TargetDependentARSpeculator.propose",
    "vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator:StandaloneARSpeculator.propose",
)
@cache
def _physical_class(base: type) -> type:
    """A subclass of one speculator, single inheritance as __class__ demands."""

    @torch.inference_mode()
    def propose(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state_rows is None:
            return base.propose(self, input_batch, *args, **kwargs)
        if kwargs.get("dummy_run"):
            # Its row numbers coincide with those of live requests.
            with self.state_rows.nobodys_call():
                return base.propose(self, input_batch, *args, **kwargs)
        physical = _at_physical_lengths(input_batch, self.state_rows, self.draft_group_id)
        try:
            return base.propose(self, physical, *args, **kwargs)
        finally:
            self.state_rows.drafting.end_step()

    return type(f"Physical{base.__name__}", (base,), {"propose": propose})


def _at_physical_lengths(
    input_batch: InputBatch, state_rows: StateRows, group_id: int
) -> InputBatch:
    """The same batch for attention: copies, because the sampler reads the logical lengths."""
    num_reqs = input_batch.num_reqs
    seq_lens = input_batch.seq_lens.clone()
    seq_lens[:num_reqs] -= state_rows.num_evicted_on_device(group_id)[input_batch.idx_mapping]
    upper_bound = input_batch.seq_lens_cpu_upper_bound.clone()
    evicted = state_rows.num_evicted[group_id][input_batch.idx_mapping_np[:num_reqs]]
    upper_bound[:num_reqs] -= torch.from_numpy(evicted)
    return replace(input_batch, seq_lens=seq_lens, seq_lens_cpu_upper_bound=upper_bound)
