"""Lengths that attention reads in compressed groups, and nobody's in dummy batches."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.utils import AttentionGroup

from rkv_vllm.worker.attention_group import attend_to_physical_lengths
from rkv_vllm.worker.block_table_v2 import StateRows
from rkv_vllm.worker.lengths import GroupRows
from rkv_vllm.worker.query_ring import QueryRing


def common(seq_lens: list[int]) -> CommonAttentionMetadata:
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    starts = torch.arange(len(seq_lens) + 1, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lens,
        seq_lens_cpu_upper_bound=lens.clone(),
        num_reqs=len(seq_lens),
        num_actual_tokens=len(seq_lens),
        max_query_len=1,
        max_seq_len=max(seq_lens),
        block_table_tensor=torch.zeros(len(seq_lens), 1),
        slot_mapping=torch.zeros(len(seq_lens)),
    )


class Builder:
    supports_update_block_table = True

    def __init__(self) -> None:
        self.built = []

    def build(self, common_prefix_len, metadata):
        self.built.append(metadata)

    def build_for_cudagraph_capture(self, metadata):
        self.built.append(metadata)


def new_group() -> tuple[GroupRows, AttentionGroup, Builder]:
    rows = GroupRows(4, 16, 9, torch.device("cpu"))
    builder = Builder()
    spec = SimpleNamespace()
    group = AttentionGroup(SimpleNamespace(), ["a"], spec, 0, metadata_builders=[builder])
    attend_to_physical_lengths([group], rows)
    return rows, group, builder


def test_attention_sees_physical_lengths_and_everybody_else_logical_ones():
    rows, group, builder = new_group()
    logical = common([100, 50, 0])
    # The last row is padding.
    rows.begin_step(torch.tensor([30, 0], dtype=torch.int32), subtract=True)
    # Before: what vLLM may have worked out from the logical lengths must not be handed on.
    assert logical.compute_num_computed_tokens().tolist() == [99, 49, -1]
    for _ in range(2):
        group.build_metadata(logical)
    for seen in builder.built:
        assert seen.seq_lens.tolist() == [70, 50, 0]
        assert seen.seq_lens_cpu_upper_bound.tolist() == [70, 50, 0]
        assert seen.max_seq_len == 70
        assert seen.compute_num_computed_tokens().tolist() == [69, 49, -1]
        assert seen.seq_lens.data_ptr() == rows.seq_lens.data_ptr()
    assert logical.seq_lens.tolist() == [100, 50, 0]
    assert logical.seq_lens_cpu_upper_bound.tolist() == [100, 50, 0]


def test_lengths_that_a_kernel_has_written_are_not_subtracted_again():
    rows, group, builder = new_group()
    rows.begin_step(torch.tensor([30, 0], dtype=torch.int32), subtract=False)
    rows.seq_lens[:2] = torch.tensor([70, 50])
    group.build_metadata(common([100, 50]))
    (seen,) = builder.built
    assert seen.seq_lens.tolist() == [70, 50]
    assert seen.seq_lens_cpu_upper_bound.tolist() == [70, 50]


def test_captured_and_dummy_batches_belong_to_nobody_and_use_the_same_buffer():
    rows, group, builder = new_group()
    rows.begin_step(torch.tensor([30, 0], dtype=torch.int32), subtract=True)
    group.build_metadata(common([100, 50]))
    rows.end_step()
    group.build_metadata_for_cudagraph_capture(common([1000, 1000]))
    group.build_metadata(common([1, 1]))
    assert [seen.max_seq_len for seen in builder.built] == [70, 1000, 1]
    assert len({seen.seq_lens.data_ptr() for seen in builder.built}) == 1
    assert builder.built[-1].seq_lens.tolist() == [1, 1]
    assert (rows.token_rows == -1).all()


def test_metadata_is_not_handed_on_to_another_group_of_an_equal_spec():
    """V1 would reuse it with another block table, and this group's lengths."""
    _, group, builder = new_group()
    assert group.metadata_builders == [builder]
    assert not builder.supports_update_block_table
    assert Builder.supports_update_block_table


@pytest.mark.parametrize(("row", "is_recorded"), [(1, True), (2, False)])
def test_layers_look_for_watched_tokens_only_in_steps_that_have_some_and_in_captures(
    row, is_recorded
):
    rows = GroupRows(4, 16, 9, torch.device("cpu"))
    looked = []
    ring = QueryRing(torch.zeros(1), rows, lambda *args: looked.append(args))
    states = StateRows({0: rows}, 4, torch.device("cpu"))
    states.seats[0][1] = 2
    # A captured or dummy run before the first step.
    ring.record(0, torch.zeros(1))
    states.begin_step(np.array([0, row]))
    ring.record(0, torch.zeros(1))
    assert len(looked) == 1 + is_recorded
    rows.end_step()
    ring.record(0, torch.zeros(1))
    assert len(looked) == 2 + is_recorded


def test_a_draft_models_layers_record_what_the_step_records_until_it_ends():
    rows = GroupRows(4, 16, 9, torch.device("cpu"))
    rows.token_rows[:3] = torch.tensor([7, -1, 8])
    rows.records = False
    rows.draft.begin_step(rows)
    assert rows.draft.token_rows[:16].equal(rows.token_rows)
    assert not rows.draft.records
    rows.draft.end_step()
    assert (rows.draft.token_rows == -1).all()
    assert rows.draft.records
