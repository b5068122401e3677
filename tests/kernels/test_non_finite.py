"""What is not finite in keys or queries is never hidden, costs one head its choice, and no more."""

import math

import pytest
import torch

from rkv_vllm.kernels.batch import ALL_FINITE, Eviction, EvictionBatch
from rkv_vllm.kernels.ops import triton_ops
from tests.kernels.cases import CPU, NAIVE, SMALL_STATES, new_case, rkv_scores

ALL = [NAIVE, CPU, triton_ops(SMALL_STATES)]

pytestmark = [
    pytest.mark.parametrize("ops", ALL, ids=[ops.name for ops in ALL]),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]


@pytest.mark.parametrize("changed", [False, True], ids=["plain", "centred, defensive"])
@pytest.mark.parametrize(
    "fault", ["nan in a candidate", "inf in the window", "-inf in the last key", "hidden -inf"]
)
def test_the_head_keeps_its_newest_tokens_and_is_noted_and_no_other_is_touched(ops, fault, changed):
    method = {"center": changed, "defensive": changed}
    case = new_case([(40, 40, 20), (77, 77, 20, 7)], group=2, num_heads=2)
    healthy = ops.select(rkv_scores(case, ops, **method), case.batch)
    assert case.batch.non_finite.tolist() == [ALL_FINITE, ALL_FINITE]
    keys = case.dense[1][1, 1]
    if fault == "nan in a candidate":
        keys[47, 3] = math.nan
    elif fault == "inf in the window":
        keys[75, 3] = math.inf
    elif fault == "-inf in the last key":
        keys[76, 63] = -math.inf
    else:
        # One product overflows; both the other head of the group and the softmax would hide it.
        case.queries[1, 1, :, 3, 3] = -3e38
        keys[:, 3] = 0.5
        keys[47, 3] = 2000.0
    case.states.write(case.batch.old_block_table[1], case.dense[1])
    keep = ops.select(rkv_scores(case, ops, **method), case.batch)
    assert case.batch.non_finite.tolist() == [ALL_FINITE, 3]
    assert keep[1, 3].tolist() == [*range(57, 77)]
    assert torch.equal(keep[:, :3], healthy[:, :3])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 40, 1050])
def test_select_notes_the_first_bad_head_wherever_the_score_stands(ops, value, where):
    lengths = [(1100, 30), (30, 8), (1100, 1100)]
    evictions = [Eviction([], [], n + 5, n + 5, budget, 5) for n, budget in lengths]
    batch = EvictionBatch.of(evictions, 8, "cpu")
    scores = torch.randn(3, 4, 1092, generator=torch.Generator().manual_seed(where))
    # Behind the candidates of the short request anything may stand.
    scores[1, :, 22:] = value
    expected = ops.select(scores, batch)
    assert batch.non_finite.tolist() == [ALL_FINITE] * 3
    scores[0, 2:, where] = value
    scores[2, 1, where] = value
    keep = ops.select(scores, batch)
    assert batch.non_finite.tolist() == [2, ALL_FINITE, 1]
    for head in (2, 3):
        assert keep[0, head, :30].tolist() == [*range(1075, 1105)]
    assert torch.equal(keep[0, :2], expected[0, :2])
    assert torch.equal(keep[1:], expected[1:])


def test_a_head_noted_by_an_earlier_call_stays_noted(ops):
    batch = EvictionBatch.of([Eviction([], [], 30, 30, 10)], 8, "cpu")
    scores = torch.zeros(1, 4, 22)
    scores[0, 1, 3] = math.nan
    ops.select(scores, batch)
    scores[0, 1, 3], scores[0, 2, 3] = 0.0, math.nan
    ops.select(scores, batch)
    assert batch.non_finite.tolist() == [1]
