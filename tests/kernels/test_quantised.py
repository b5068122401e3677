"""Caches of fp8: keys are read as attention reads them, bytes are moved, in every back end."""

import math

import pytest
import torch

from rkv_vllm.kernels.batch import ALL_FINITE, EvictionBatch
from rkv_vllm.kernels.ops import ops_for, triton_ops
from rkv_vllm.kernels.paged import FLOATS_OF_A_BYTE, PagedStates, Quantisation
from tests.kernels.cases import (
    CPU,
    HEADS,
    LAYERS,
    NAIVE,
    NAN_OF_A_BYTE,
    PACKED,
    PLAIN,
    SCORE_TOLERANCE,
    SMALL_STATES,
    new_case,
    random_keep,
    rkv_scores,
    stored,
)
from tests.kernels.test_against_oracle import assert_oracle_agrees

LENGTHS = [(61, 61, 30), (90, 92, 21, 33)]
TRITON = triton_ops(SMALL_STATES)

pytestmark = pytest.mark.parametrize("dtype", FLOATS_OF_A_BYTE, ids=["e4m3", "e5m2"])


@pytest.fixture(params=[NAIVE, CPU, TRITON], ids=lambda ops: ops.name)
def ops(request):
    return request.param


@pytest.fixture(params=PACKED + PLAIN)
def layout(request, ops):
    if request.param in PACKED and ops.name == "triton":
        pytest.skip("a layout of CPUs")
    return request.param


def test_every_byte_is_read_as_the_number_it_stands_for(dtype):
    """All 256 of them, as values whose range tells one from the other."""
    shape = (1, 1, 1, 256, 2)
    cells = torch.zeros(shape, dtype=torch.uint8)
    cells[..., 0] = torch.arange(256)
    states = PagedStates(cells, None, 256, Quantisation(dtype, torch.tensor([[0.75]])))
    numbers = torch.arange(256).to(torch.uint8).view(dtype).float() * 0.75
    assert (
        states.numbers(torch.tensor([0]), 256)[0, 0, :, 0]
        .nan_to_num(-1.0)
        .equal(numbers.nan_to_num(-1.0))
    )
    case = new_case([(256, 256, 9)], num_layers=1, num_heads=1)
    row = case.batch.evictions[0]._replace(old_block_ids=[0], new_block_ids=[0])
    batch = EvictionBatch.of([row], 8, "cpu")
    m = 256 - 8
    # Zero is the other element, so the range is the size.
    want = torch.where(numbers.isfinite(), numbers.abs(), math.nan)[:m].nan_to_num(-1.0)
    for ops in (NAIVE, CPU, TRITON):
        got = ops.channel_range(states, batch)[0, 0]
        got = torch.where(got.isfinite(), got, math.nan).nan_to_num(-1.0)
        assert got.equal(want), ops.name


def test_scores_and_choice_are_the_oracles_on_the_numbers_that_attention_sees(ops, dtype, layout):
    sizes = {"layout": layout, "dtype": dtype, "group": 3, "num_heads": 2, "head_size": 32}
    case = new_case(LENGTHS, seed=4, **sizes)
    factors = case.states.quantisation.scale
    # Each head's own, or a scale in the wrong place would not show.
    assert len(factors.unique()) == factors.numel()
    scales = (0.4, 0.15)
    for lam in (0.1, 1.0):
        scores = rkv_scores(case, ops, lam=lam, scale=torch.tensor(scales))
        for layer, scale in enumerate(scales):
            assert_oracle_agrees(case, ops, scores, layer=layer, scale=scale, lam=lam)


def test_a_head_without_its_factor_would_be_scored_otherwise(ops, dtype):
    """What the test above relies on."""
    case = new_case(LENGTHS, dtype=dtype)
    plain = PagedStates(
        case.states.blocks,
        None,
        case.states.block_size,
        Quantisation(dtype, torch.ones_like(case.states.quantisation.scale)),
    )
    args = (case.batch, case.queries, case.scale, case.no_cap)
    own = ops.importance(case.states, *args, pool=7)
    other = ops.importance(plain, *args, pool=7)
    assert not torch.allclose(own[0], other[0], rtol=0.01)


@pytest.mark.parametrize(
    ("ops", "layout"), [(CPU, "vec values"), (CPU, "tokens first"), (TRITON, "small blocks")]
)
def test_attention_and_widths_are_the_references(ops, dtype, layout):
    case = new_case(LENGTHS, layout=layout, dtype=dtype, group=2)
    args = (case.states, case.batch, case.queries, case.scale, case.no_cap)
    for i in range(2):
        m = case.batch.num_candidates(i)
        got, want = (each.attention(*args, pool=5)[i, :, :m] for each in (ops, NAIVE))
        torch.testing.assert_close(got, want, **SCORE_TOLERANCE)
        got, want = (each.channel_range(*args[:2])[i, :, :m] for each in (ops, NAIVE))
        torch.testing.assert_close(got, want, **SCORE_TOLERANCE)


@pytest.mark.parametrize("fresh", ["in place", "all fresh", "first fresh"])
def test_compaction_moves_bytes(ops, dtype, layout, fresh):
    lengths = [(150, 153, 70), (70, 70, 70), (80, 85, 9, 33)]
    case = new_case(lengths, layout=layout, dtype=dtype, fresh=fresh)
    keep = random_keep(case.batch, LAYERS * HEADS)
    new = {i for eviction in case.batch.evictions for i in eviction.new_block_ids}
    others = [i for i in range(case.states.num_blocks) if i not in new]
    before = case.states.cells[:, others].clone()
    ops.compact(case.states, case.batch, keep)
    for i, eviction in enumerate(case.batch.evictions):
        after = case.states.numbers(case.batch.new_block_table[i], eviction.new_len)
        assert after.equal(case.kept_and_tail(keep, i))
    assert case.states.cells[:, others].equal(before)


def test_a_byte_that_is_no_number_costs_its_head_the_choice_and_no_other(ops, dtype):
    case = new_case([(77, 77, 20)], dtype=dtype, num_heads=2)
    ops.select(rkv_scores(case, ops), case.batch)
    assert case.batch.non_finite.tolist() == [ALL_FINITE]
    cells = stored(case.states, case.dense[0])
    cells[1, 0, 47, 3] = NAN_OF_A_BYTE
    case.states.write(case.batch.old_block_table[0], cells)
    keep = ops.select(rkv_scores(case, ops), case.batch)
    assert case.batch.non_finite.tolist() == [2]
    assert keep[0, 2].tolist() == [*range(57, 77)]


def test_the_cpp_kernels_take_such_a_cache_and_some_layers_of_it(dtype):
    case = new_case(LENGTHS, dtype=dtype)
    assert ops_for(case.states).name == "cpu"
    last = case.states.layers(slice(1, 2))
    assert last.numbers(case.batch.old_block_table[0], 61).equal(case.dense[0][1:])
    case.states.fill_with_noise(0)
    noise = case.states.numbers(torch.tensor([0]), 32)
    assert noise.isfinite().all()
    assert len(noise.unique()) > 20


def test_what_is_no_quantisation_is_refused(dtype):
    cells, scale = torch.zeros(2, 3, 4, 32, 64, dtype=torch.uint8), torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"bytes read as one of .* got torch.float16 read as"):
        PagedStates(cells.half(), None, 32, Quantisation(dtype, scale))
    with pytest.raises(ValueError, match=r"got torch.uint8 read as torch.int8"):
        PagedStates(cells, None, 32, Quantisation(torch.int8, scale))
    with pytest.raises(ValueError, match=r"scale float32 \[2, 4\] on cpu, got torch.float32 \[2\]"):
        PagedStates(cells, None, 32, Quantisation(dtype, scale[:, 0]))
