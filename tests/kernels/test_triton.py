"""The Triton kernels against their torch references, run by Triton's interpreter (conftest.py).

The interpreter runs one program after the other and every operation of a program for all of its
threads at once, so races stay unseen here; test_triton_compiles.py shows that a GPU's compiler
takes the kernels.
"""

from dataclasses import replace

import pytest
import torch

from rkv_vllm.kernels.batch import ALL_FINITE, Eviction, EvictionBatch
from rkv_vllm.kernels.compact.triton import compact_both_triton, compact_kernel, compact_triton
from rkv_vllm.kernels.ops import triton_ops
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.kernels.rkv.triton import importance_triton, redundancy_triton
from rkv_vllm.kernels.select.naive import select_naive
from rkv_vllm.kernels.select.triton import select_triton
from rkv_vllm.kernels.tiles import is_interpreted
from tests.kernels.cases import (
    ADVERSARIAL,
    DTYPES,
    NAIVE,
    PLAIN,
    SMALL_STATES,
    TorchCalls,
    adversarial_keys,
    assert_equivalent_choice,
    assert_same_scores,
    new_case,
    random_keep,
    rkv_scores,
)

TRITON = triton_ops(SMALL_STATES)

# The interpreter takes about 10 ms per program and operation-heavy tile: one layer, two heads.
SMALL = {"num_layers": 1, "num_heads": 2}

pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|divide by zero) encountered:RuntimeWarning"
)


def test_the_kernels_are_interpreted():
    # Without this the tests below would look for a GPU.
    assert is_interpreted()


# Every size, group, head size and dtype with some others; 64 tokens are one tile.
@pytest.mark.parametrize(
    ("n", "group", "head_size", "dtype", "similar"),
    [
        (2, 1, 64, torch.float32, 1.2),
        (7, 3, 32, torch.bfloat16, 1.2),
        (63, 4, 80, torch.float16, 1.2),
        (64, 8, 64, torch.bfloat16, 5.0),
        (65, 3, 128, torch.float32, 0.0),
        (100, 1, 96, torch.bfloat16, 1.2),
        (129, 8, 128, torch.float16, 0.0),
        (200, 4, 64, torch.float32, 5.0),
        (385, 3, 64, torch.bfloat16, 1.2),
    ],
)
def test_scores_equal_the_reference_on_odd_sizes(n, group, head_size, dtype, similar):
    window = min(8, n - 1)
    case = new_case(
        [(n, n, window + 1)],
        head_size=head_size,
        dtype=dtype,
        group=group,
        window=window,
        similar=similar,
        seed=n,
        **SMALL,
    )
    expected = rkv_scores(case, NAIVE)
    got = rkv_scores(case, TRITON)
    assert_same_scores(got, expected, case.batch)
    select_triton(got, case.batch)
    assert case.batch.non_finite.tolist() == [ALL_FINITE]


@pytest.mark.parametrize(
    ("n", "group", "head_size", "dtype", "method"),
    [
        (2, 1, 64, torch.float32, {"center": True, "defensive": True}),
        (63, 8, 80, torch.bfloat16, {"center": True}),
        (65, 3, 128, torch.float16, {"defensive": True, "lam": 1.0}),
        (129, 1, 64, torch.bfloat16, {"center": True, "threshold": 0.1}),
        (200, 3, 32, torch.float32, {"center": True, "threshold": -0.1}),
        (300, 8, 64, torch.bfloat16, {"center": True, "defensive": True, "lam": 0.5}),
    ],
)
def test_centred_and_defensive_scores_equal_the_reference(n, group, head_size, dtype, method):
    window = min(8, n - 1)
    case = new_case(
        [(n, n, window + 1)],
        head_size=head_size,
        dtype=dtype,
        group=group,
        window=window,
        similar=3.0,
        seed=n,
        **SMALL,
    )
    expected = rkv_scores(case, NAIVE, **method)
    got = rkv_scores(case, TRITON, **method)
    assert_same_scores(got, expected, case.batch)


@pytest.mark.parametrize("changed", [False, True], ids=["plain", "centred, defensive"])
def test_sums_over_more_tokens_than_one_pass_takes_equal_the_reference(changed):
    method = {"center": changed, "defensive": changed}
    # 1024 tokens are one pass; the largest logits and column sums come in the second one.
    case = new_case([(1100, 1100, 300)], num_layers=1, num_heads=1)
    keys = case.dense[0]
    common = keys.mean(dim=2, keepdim=True)
    keys[:, :, 1040:1090] = 3.0 * common
    case.queries += 0.5 * common
    case.states.write(case.batch.old_block_table[0], keys)
    expected = rkv_scores(case, NAIVE, **method)
    got = rkv_scores(case, TRITON, **method)
    assert_same_scores(got, expected, case.batch)


@pytest.mark.parametrize("layout", [*PLAIN, "vec keys"])
def test_ragged_batches_are_chosen_as_by_the_reference(layout):
    lengths = [(70, 73, 30), (33, 33, 9), (66, 67, 66)]
    case = new_case(
        lengths, layout=layout, dtype=torch.bfloat16, group=3, num_layers=2, num_heads=2
    )
    reference = rkv_scores(case, NAIVE)
    scores = rkv_scores(case, TRITON)
    assert_same_scores(scores, reference, case.batch)
    assert_equivalent_choice(select_triton(scores, case.batch), reference, case.batch)


@pytest.mark.parametrize(
    ("window", "lam", "pool", "threshold"), [(1, 0.0, 1, 0.9), (17, 1.0, 9, -0.2), (8, 0.5, 3, 0.5)]
)
def test_the_parameters_reach_the_kernel(window, lam, pool, threshold):
    method = {"lam": lam, "pool": pool, "threshold": threshold}
    case = new_case([(90, 90, 40)], group=3, window=window, **SMALL)
    expected = rkv_scores(case, NAIVE, **method)
    got = rkv_scores(case, TRITON, **method)
    assert_same_scores(got, expected, case.batch)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_adversarial_keys_of_the_backward_search(kind, center):
    case = new_case([(96, 96, 30)], head_size=128, **SMALL)
    # Not exact in binary: the mean of equal keys may not be their number.
    keys = 0.7 * adversarial_keys(kind, 96, 128)
    case.states.write(case.batch.old_block_table[0], keys.expand(1, 2, -1, -1))
    expected = rkv_scores(case, NAIVE, center=center)
    got = rkv_scores(case, TRITON, center=center)
    # The halves of a score may cancel.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=5e-8)


# 2048 scores stay in registers.
@pytest.mark.parametrize("m", [1, 7, 63, 2048, 2049, 4099])
def test_select_is_exact_with_ties_to_the_lower_index(m):
    generator = torch.Generator().manual_seed(m)
    counts = [1, (m + 1) // 2, m]
    evictions = [Eviction([], [], m + 2, m + 2, count + 2) for count in counts]
    batch = EvictionBatch.of(evictions, 2, "cpu")
    few = torch.randint(-1, 2, (3, 1, m), generator=generator) * 0.5
    # Both zeros are equal.
    few[..., ::2] *= -1.0
    many = torch.randn((3, 1, m), generator=generator) * 1e-3
    for scores in (few, many):
        assert torch.equal(select_triton(scores, batch), select_naive(scores, batch))


@pytest.mark.parametrize("where", [0, 4500])
def test_select_notes_a_bad_score_in_a_row_that_does_not_fit_into_registers(where):
    batch = EvictionBatch.of([Eviction([], [], 4602, 4602, 12)], 2, "cpu")
    scores = torch.randn(1, 2, 4600)
    scores[0, 1, where] = float("nan")
    keep = select_triton(scores, batch)
    assert batch.non_finite.tolist() == [1]
    assert keep[0, 1].tolist() == [*range(4590, 4602)]


def test_select_leaves_minus_one_behind_a_smaller_budget():
    case = new_case([(100, 100, 30), (50, 50, 9)])
    scores = rkv_scores(case, NAIVE)
    keep = select_triton(scores, case.batch)
    assert torch.equal(keep, select_naive(scores, case.batch))
    assert keep[1, :, 9:].eq(-1).all()


@pytest.mark.parametrize("layout", PLAIN)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fresh", ["in place", "all fresh", "first fresh"])
def test_compaction_leaves_survivors_and_tail_and_touches_nothing_else(layout, dtype, fresh):
    lengths = [(150, 153, 70), (70, 70, 70), (40, 45, 9)]
    case = new_case(lengths, layout=layout, dtype=dtype, fresh=fresh, head_size=80, **SMALL)
    keep = random_keep(case.batch, 2)
    new = {i for eviction in case.batch.evictions for i in eviction.new_block_ids}
    others = [i for i in range(case.states.num_blocks) if i not in new]
    before = case.states.cells[:, others].clone()
    compact_triton(case.states, case.batch, keep)
    for i, eviction in enumerate(case.batch.evictions):
        after = case.states.read(case.batch.new_block_table[i], eviction.new_len)
        assert torch.equal(after, case.kept_and_tail(keep, i))
    assert torch.equal(case.states.cells[:, others].nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.parametrize("layout", PLAIN)
@pytest.mark.parametrize("values_alike", [True, False])
def test_keys_and_values_of_one_cache_are_compacted_together(layout, values_alike, monkeypatch):
    # Both halves of one cache, or values of another size in one of their own.
    case = new_case([(150, 153, 70), (40, 45, 9)], layout=layout, dtype=torch.bfloat16, **SMALL)
    keys, other = case.states, new_case([(150, 153, 70), (40, 45, 9)], head_size=32, **SMALL)
    if values_alike:
        cache = keys.blocks.new_empty(0).set_(keys.blocks.untyped_storage())
        half = cache.as_strided(keys.blocks.shape, keys.blocks.stride(), 0)
        values = PagedStates(half, None, keys.block_size)
        for eviction, dense in zip(case.batch.evictions, case.dense, strict=True):
            values.write(torch.tensor(eviction.old_block_ids), -dense)
        other = replace(case, states=values, dense=[-dense for dense in case.dense])
    launches = []
    launch = compact_kernel.run
    monkeypatch.setattr(
        compact_kernel, "run", lambda *a, **k: (launches.append(k), launch(*a, **k))
    )
    keep = random_keep(case.batch, 2)
    compact_both_triton(keys, other.states, case.batch, keep)
    for each in (case, other):
        for i, eviction in enumerate(case.batch.evictions):
            after = each.states.read(case.batch.new_block_table[i], eviction.new_len)
            assert torch.equal(after, each.kept_and_tail(keep, i))
    assert len(launches) == (1 if values_alike else 2)


def test_what_follows_the_last_token_in_its_block_becomes_zero():
    """A fresh block of a hybrid model may hold a state, which is often NaN when read as numbers."""
    case = new_case([(150, 153, 70), (40, 45, 9)], fresh="all fresh", **SMALL)
    compact_triton(case.states, case.batch, random_keep(case.batch, 2))
    for i, eviction in enumerate(case.batch.evictions):
        end = -(-eviction.new_len // case.states.block_size) * case.states.block_size
        behind = case.states.read(case.batch.new_block_table[i], end, eviction.new_len)
        assert not behind.count_nonzero()


@pytest.mark.parametrize("evicted", [0, 1, 63, 64, 65])
def test_moves_that_overlap_by_any_distance_are_safe(evicted):
    case = new_case([(200, 201, 200 - evicted)], **SMALL)
    keep = torch.arange(evicted, 200, dtype=torch.int32).repeat(1, 2, 1)
    compact_triton(case.states, case.batch, keep)
    after = case.states.read(case.batch.new_block_table[0], 201 - evicted)
    assert torch.equal(after, case.dense[0][:, :, evicted:])


def test_an_empty_batch_is_no_work():
    case = new_case([])
    scores = rkv_scores(case, TRITON)
    keep = select_triton(scores, case.batch)
    compact_triton(case.states, case.batch, keep)
    assert keep.shape == (0, 6, 0)


@pytest.mark.parametrize(
    ("window", "head_size", "changed"), [(8, 64, False), (8, 128, True), (40, 64, False)]
)
def test_memory_grows_with_the_tokens_as_told_and_torch_waits_for_nothing(
    window, head_size, changed
):
    n = 600
    case = new_case(
        [(n, n, 100)],
        dtype=torch.bfloat16,
        similar=5.0,
        num_layers=1,
        num_heads=1,
        window=window,
        head_size=head_size,
    )
    ops = triton_ops(case.states, window)
    with TorchCalls() as calls:
        scores = rkv_scores(case, ops, center=changed, defensive=changed)
        keep = select_triton(scores, case.batch)
        compact_triton(case.states, case.batch, keep)
    # And 1 KiB per head; all pairs would be 2400 bytes per token.
    assert calls.peak < ops.scratch_bytes_per_token * n + 1024
    assert calls.peak > 0.9 * ops.scratch_bytes_per_token * n - 4 * n
    # Whatever reads a tensor on the host, or has a size that only the device knows, would wait.
    waiting = {"_local_scalar_dense", "nonzero", "index", "masked_select", "equal", "_to_copy"}
    assert not calls.names & waiting


def test_launchers_say_what_they_expected_and_got():
    case = new_case([(100, 100, 20)], **SMALL)
    states, batch, queries = case.states, case.batch, case.queries
    short = EvictionBatch.of([batch.evictions[0]._replace(old_block_ids=[0] * 3)], 8, "cpu")
    keep = random_keep(batch, 2)
    layers = (case.scale, case.no_cap)
    with pytest.raises(ValueError, match=r"old_block_ids of request 0: .* 100 tokens, got 3"):
        redundancy_triton(states, short, threshold=0.5)
    with pytest.raises(ValueError, match=r"queries: expected .* 64\] on cpu"):
        importance_triton(states, batch, queries[..., :63], *layers, pool=7)
    turned = queries.transpose(2, 4).contiguous().transpose(2, 4)
    with pytest.raises(ValueError, match="queries: expected a contiguous last"):
        importance_triton(states, batch, turned, *layers, pool=7)
    with pytest.raises(ValueError, match=r"scale: expected contiguous float32 \[1\]"):
        importance_triton(states, batch, queries, torch.ones(2), case.no_cap, pool=7)
    with pytest.raises(ValueError, match=r"scores: expected float32 \[1, heads, 92\]"):
        select_triton(torch.zeros(1, 2, 93), batch)
    with pytest.raises(ValueError, match=r"keep: expected int32 \[1, 2, 20\]"):
        compact_triton(states, batch, keep.long())
    packed = new_case([(100, 100, 20)], layout="amx keys", **SMALL)
    with pytest.raises(ValueError, match="at most two dimensions of tokens"):
        importance_triton(packed.states, packed.batch, packed.queries, *layers, pool=7)
    with pytest.raises(ValueError, match="at most two dimensions of tokens"):
        redundancy_triton(packed.states, packed.batch, threshold=0.5)
    with pytest.raises(ValueError, match="at most two dimensions of tokens"):
        compact_triton(packed.states, packed.batch, keep)
