"""What a flush brings to the device is what the evictions say, and which kernels then serve."""

from types import SimpleNamespace

import pytest
import torch

from rkv_vllm.kernels import ops
from rkv_vllm.kernels.batch import ALL_FINITE, MAX_WINDOW, Eviction, EvictionBatch
from rkv_vllm.kernels.ops import ops_for
from tests.kernels.cases import CPU, NAIVE, TorchCalls, new_case, rkv_scores

EVICTIONS = [
    Eviction([3, 1, 4], [3, 5], 40, 41, 12, 17, 2, 90, 30, seed=2**64 - 1),
    Eviction([2], [2], 16, 16, 8),
    Eviction([6, 7], [8, 9], 30, 32, 20, 1, 0, 30, 5, seed=2**63),
]


def test_the_tensors_say_what_the_evictions_say():
    batch = EvictionBatch.of(EVICTIONS, 8, "cpu")
    for name in (*column_names(), "seed"):
        expected = [getattr(eviction, name) for eviction in EVICTIONS]
        got = getattr(batch, f"{name}s")
        if name == "seed":
            assert got.dtype == torch.int64
            assert [seed % 2**64 for seed in got.tolist()] == expected
        else:
            assert got.dtype == torch.int32
            assert got.tolist() == expected
    assert batch.old_block_table.tolist() == [[3, 1, 4], [2, 0, 0], [6, 7, 0]]
    assert batch.new_block_table.tolist() == [[3, 5], [2, 0], [8, 9]]
    assert batch.non_finite.tolist() == [ALL_FINITE] * 3
    assert batch.max_block_id == 9
    assert [e.num_judged for e in EVICTIONS] == [23, 16, 29]
    assert [batch.num_candidates(i) for i in range(3)] == [15, 8, 21]
    assert (batch.max_judged, batch.max_candidates, batch.max_budget) == (29, 21, 20)
    assert [e.new_len for e in EVICTIONS] == [30, 8, 23]
    part = batch.part(slice(1, 3))
    for name in (*column_names(), "seed"):
        assert torch.equal(getattr(part, f"{name}s"), getattr(batch, f"{name}s")[1:])


def column_names() -> list[str]:
    lengths = ["settled_len", "total_len", "budget", "prefix_len", "window_end", "prompt_len"]
    return [*lengths, "seat"]


def test_an_empty_batch_has_empty_tensors_of_the_same_kinds():
    empty = EvictionBatch.of([], 8, "cpu")
    assert (empty.seeds.dtype, empty.seeds.shape) == (torch.int64, (0,))
    assert (empty.max_judged, empty.max_candidates, empty.max_budget) == (0, 0, 0)
    assert empty.max_block_id == -1


@pytest.mark.parametrize("window", [0, MAX_WINDOW + 1])
def test_a_window_that_no_kernel_takes_is_refused(window):
    with pytest.raises(ValueError, match=rf"0 < window <= {MAX_WINDOW}, .* got window {window},"):
        EvictionBatch.of([Eviction([], [], 500, 500, 200)], window, "cpu")


def states_of(device: str, num_token_dims: int) -> SimpleNamespace:
    cells = torch.zeros(1, 1, 1, *[1] * num_token_dims, 64)
    return SimpleNamespace(
        device=torch.device(device),
        dtype=torch.bfloat16,
        head_size=64,
        num_token_dims=num_token_dims,
        cells=cells,
        quantisation=None,
    )


def test_triton_serves_a_gpu_and_records_queries_even_of_layouts_that_it_cannot_address(
    monkeypatch,
):
    plain, packed = states_of("cuda", 2), states_of("cuda", 3)
    assert ops_for(plain).name == "triton"
    assert ops_for(plain, 40).scratch_bytes_per_token > ops_for(plain).scratch_bytes_per_token
    assert ops_for(packed).name == "naive"
    assert ops_for(packed).observe is ops_for(plain).observe
    monkeypatch.setattr(ops, "find_spec", lambda name: None)
    assert ops_for(plain) == ops_for(packed) == ops.naive_ops(plain)


@pytest.mark.parametrize("version", [CPU, NAIVE], ids=["cpu", "naive"])
def test_scratch_of_a_compaction_on_a_cpu_is_what_is_told(version):
    case = new_case([(3000, 3000, 2000)], num_layers=3, num_heads=2, head_size=32)
    with TorchCalls() as calls:
        version.select(rkv_scores(case, version), case.batch)
    heads = 6
    told = ops.naive_ops(case.states) if version.name == "naive" else version
    # Of torch besides a few bounded temporaries of 4 MiB; of C++ what is no tensor.
    bounded = 8 * 2**22 if version.name == "naive" else 2**14
    assert calls.peak < told.scratch_bytes_per_token * heads * 3000 + bounded
