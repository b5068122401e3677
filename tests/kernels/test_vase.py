"""Mean attention and the range of values: the reference against float64, the others against it."""

import math

import pytest
import torch

from rkv_vllm.kernels.ops import Ops, triton_ops
from tests.kernels.any_order import any_order
from tests.kernels.cases import (
    CPU,
    NAIVE,
    PACKED,
    PLAIN,
    SCORE_TOLERANCE,
    SMALL_STATES,
    Case,
    assert_same_scores,
    new_case,
)

TRITON = triton_ops(SMALL_STATES)
OTHERS = [CPU, TRITON]
# (settled_len, total_len, budget, prefix_len): prefixes inside a block, at its end, behind it.
RAGGED = [(70, 73, 30), (100, 100, 20, 31), (53, 53, 16, 32), (90, 92, 30, 33)]

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|All-NaN) .*:RuntimeWarning")


def attention(case: Case, ops: Ops, pool: int = 5, soft_cap: float = 0.0) -> torch.Tensor:
    caps = case.no_cap + soft_cap
    return ops.attention(case.states, case.batch, case.queries, case.scale, caps, pool=pool)


def assert_equal_to_naive(case: Case, ops: Ops, **options) -> None:
    assert_same_scores(
        attention(case, ops, **options), attention(case, NAIVE, **options), case.batch
    )
    ranges = [each.channel_range(case.states, case.batch) for each in (ops, NAIVE)]
    torch.testing.assert_close(*ranges, rtol=0, atol=0)


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize(("window", "pool", "soft_cap"), [(8, 5, 0.0), (13, 1, 0.0), (1, 9, 2.0)])
def test_the_reference_is_the_formula_in_float64(group, window, pool, soft_cap):
    case = new_case(RAGGED, group=group, window=window, num_layers=2, num_heads=2)
    got = attention(case, NAIVE, pool, soft_cap)
    ranges = NAIVE.channel_range(case.states, case.batch)
    for i, eviction in enumerate(case.batch.evictions):
        m = case.batch.num_candidates(i)
        dense = case.dense[i][:, :, eviction.prefix_len :][:, :, :m].double().flatten(0, 1)
        queries = case.batch.window_queries(i, case.queries).reshape(4, group, window, -1).double()
        logits = torch.einsum("hgwd,hnd->hgwn", queries, dense) * case.states.head_size**-0.5
        if soft_cap:
            logits = soft_cap * (logits / soft_cap).tanh()
        mean = logits.softmax(-1).mean(dim=(1, 2))
        near = [mean[:, max(j - pool // 2, 0) : j + pool // 2 + 1].mean(1) for j in range(m)]
        expected = torch.stack(near, dim=1).float()
        torch.testing.assert_close(got[i, :, :m], expected, **SCORE_TOLERANCE)
        assert got[i, :, m:].eq(-math.inf).all()
        expected = (dense.amax(-1) - dense.amin(-1)).float()
        torch.testing.assert_close(ranges[i, :, :m], expected)
        assert ranges[i, :, m:].eq(0).all()


@pytest.mark.parametrize("n", [2, 7, 63, 100, 1152])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", PACKED + PLAIN)
def test_cpp_equals_the_reference_on_odd_sizes_in_every_layout(n, dtype, layout):
    window = min(8, n - 1)
    options = {"dtype": dtype, "layout": layout, "group": 3, "window": window, "num_layers": 1}
    assert_equal_to_naive(new_case([(n, n, window + 1)], seed=n, **options), CPU)


@pytest.mark.parametrize(
    ("n", "group", "head_size", "window", "dtype", "options"),
    [
        (2, 1, 64, 1, torch.float32, {}),
        (63, 8, 80, 8, torch.bfloat16, {"pool": 1}),
        (65, 3, 128, 8, torch.float16, {"soft_cap": 2.0}),
        (200, 2, 32, 64, torch.bfloat16, {"pool": 9}),
    ],
)
def test_triton_equals_the_reference(n, group, head_size, window, dtype, options):
    case = new_case(
        [(n, n, window + 1)],
        head_size=head_size,
        dtype=dtype,
        group=group,
        window=window,
        num_layers=1,
        num_heads=2,
        seed=n,
    )
    assert_equal_to_naive(case, TRITON, **options)


@pytest.mark.parametrize("ops", OTHERS, ids=[ops.name for ops in OTHERS])
@pytest.mark.parametrize("layout", PLAIN)
def test_ragged_batches_behind_prefixes_equal_the_reference(ops, layout):
    case = new_case(RAGGED, layout=layout, dtype=torch.bfloat16, group=3, num_layers=2, num_heads=2)
    assert_equal_to_naive(case, ops)


@pytest.mark.parametrize("ops", [NAIVE, *OTHERS], ids=[ops.name for ops in [NAIVE, *OTHERS]])
@pytest.mark.parametrize("soft_cap", [0.0, 5.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_its_head_and_in_no_other(ops, soft_cap, bad):
    case = new_case([(40, 40, 20), (77, 77, 20, 7)], group=2, num_layers=1, num_heads=2)
    healthy = attention(case, ops, soft_cap=soft_cap), ops.channel_range(case.states, case.batch)
    case.dense[1][0, 1, 47, 3] = bad
    case.states.write(case.batch.old_block_table[1], case.dense[1])
    got = attention(case, ops, soft_cap=soft_cap), ops.channel_range(case.states, case.batch)
    # One number per token: those before the window, counted from the end of the prefix.
    assert not got[0][1, 1, :62].isfinite().any()
    assert not got[1][1, 1, 40].isfinite()
    got[1][1, 1, 40] = healthy[1][1, 1, 40]
    assert torch.equal(got[1], healthy[1])
    assert torch.equal(got[0][0], healthy[0][0])
    assert torch.equal(got[0][1, 0], healthy[0][1, 0])


def test_triton_is_the_same_in_any_order_and_has_no_race():
    lengths = [(70, 72, 40), (103, 104, 30, 33)]
    case = new_case(lengths, group=2, num_layers=1, num_heads=1, head_size=32)

    def run() -> list[bytes]:
        both = attention(case, TRITON), TRITON.channel_range(case.states, case.batch)
        return [tensor.numpy().tobytes() for tensor in both]

    expected = run()
    with any_order() as order:
        assert run() == expected
        assert order.races == []
        for order.mode in ("shuffled", "interleaved"):
            assert run() == expected, order.mode
    assert order.launches == {"stats_kernel", "combine_kernel", "average_kernel", "range_kernel"}


@pytest.mark.parametrize("ops", [NAIVE, *OTHERS], ids=[ops.name for ops in [NAIVE, *OTHERS]])
def test_shapes_that_do_not_fit_are_refused(ops):
    case = new_case([(100, 100, 20)], num_layers=1, num_heads=2)
    layers = (case.scale, case.no_cap)
    with pytest.raises(ValueError, match=r"queries: expected .* 64\] on cpu"):
        ops.attention(case.states, case.batch, case.queries[..., :63], *layers, pool=5)
    with pytest.raises(ValueError, match=r"scale: expected contiguous float32 \[1\]"):
        ops.attention(case.states, case.batch, case.queries, torch.ones(2), case.no_cap, pool=5)
    empty = new_case([])
    assert attention(empty, ops).shape == (0, 6, 0)
    assert ops.channel_range(empty.states, empty.batch).shape == (0, 6, 0)
