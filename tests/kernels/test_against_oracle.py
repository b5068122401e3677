"""Every back end against the float64 oracle: protected prefixes, and each layer's scale and cap."""

from dataclasses import replace

import pytest
import torch

from rkv_vllm.kernels.ops import triton_ops
from tests.kernels.cases import (
    BLOCK_SIZE,
    CPU,
    NAIVE,
    SCORE_TOLERANCE,
    SMALL_STATES,
    Case,
    new_case,
    random_keep,
    rkv_scores,
)
from tests.methods.oracle import assert_same_kept, expected_scores

ALL = [NAIVE, CPU, triton_ops(SMALL_STATES)]
# Nearest cosine to the threshold: below this float32 may see its other side.
MIN_GAP = 1e-6

# (settled_len, total_len, budget, prefix_len): in one block or several, ending inside a block, at
# its end, one behind it; one request without.
PREFIXES = [0, 1, 15, 16, 17, 31, 32, 33, 100]
RAGGED = [(47 + prefix, 49 + prefix, 20 + prefix % 5, prefix) for prefix in PREFIXES]
# What the interpreter can do in the time.
FEW = [RAGGED[i] for i in (0, 2, 6, 7, 8)]


@pytest.fixture(params=ALL, ids=[ops.name for ops in ALL])
def ops(request):
    return request.param


def lengths_for(ops) -> list[tuple[int, int, int, int]]:
    return FEW if ops.name == "triton" else RAGGED


def poisoned(case: Case) -> Case:
    """Its tables name a block of NaN for each block full of prefix; so do the real ones hold."""
    poison = case.spare[0]
    tables = {name: getattr(case.batch, name).clone() for name in TABLES}
    for i, eviction in enumerate(case.batch.evictions):
        full = eviction.prefix_len // BLOCK_SIZE
        case.states.cells[:, list(eviction.old_block_ids[:full])] = torch.nan
        for table in tables.values():
            table[i, :full] = poison
    assert case.states.cells[:, poison].isnan().all()
    return replace(case, batch=replace(case.batch, **tables))


TABLES = ("old_block_table", "new_block_table")


def assert_oracle_agrees(case: Case, ops, scores, *, layer: int, **parameters) -> None:
    """Scores and choice of one layer of every request."""
    keep = ops.select(scores, case.batch)
    num_heads, group = case.states.num_heads, case.queries.shape[3] // case.states.num_heads
    heads = slice(layer * num_heads, (layer + 1) * num_heads)
    for i, eviction in enumerate(case.batch.evictions):
        m, prefix_len = case.batch.num_candidates(i), eviction.prefix_len
        recorded = case.batch.window_queries(i, case.queries)
        queries = recorded.view(-1, num_heads * group, *recorded.shape[1:])[layer]
        keys = case.dense[i][layer, :, : eviction.settled_len]
        want = expected_scores(keys, queries, prefix_len=prefix_len, **parameters)
        assert want.gap > MIN_GAP, "choose another seed: a cosine sits on the threshold"
        got = scores[i, heads, :m].double()
        torch.testing.assert_close(got, torch.from_numpy(want.scores), **SCORE_TOLERANCE)
        kept = keep[i, heads, : eviction.budget].long() - prefix_len
        assert_same_kept(kept, want.scores, eviction.budget, case.batch.window)


@pytest.mark.parametrize(
    ("layout", "group", "method"),
    [
        ("heads first", 2, {}),
        ("small blocks", 2, {}),
        ("heads first", 1, {"center": True}),
        ("tokens first", 3, {"defensive": True, "lam": 1.0}),
        ("small blocks", 8, {"center": True, "defensive": True}),
    ],
)
def test_what_is_behind_a_prefix_is_scored_and_chosen_as_if_it_were_alone(
    ops, layout, group, method
):
    case = new_case(lengths_for(ops), layout=layout, group=group, num_layers=1, num_heads=2, seed=3)
    # Not even the part of the prefix that shares a block with candidates may be looked at.
    for i, eviction in enumerate(case.batch.evictions):
        keys = case.dense[i].clone()
        keys[:, :, : eviction.prefix_len] = torch.nan
        case.states.write(case.batch.old_block_table[i, : len(eviction.old_block_ids)], keys)
    case = poisoned(case)
    assert_oracle_agrees(case, ops, rkv_scores(case, ops, **method), layer=0, **method)


@pytest.mark.parametrize("fresh", ["in place", "first fresh", "all fresh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_full_of_prefix_are_neither_read_nor_written(ops, fresh, dtype):
    lengths = lengths_for(ops)
    case = new_case(lengths, fresh=fresh, dtype=dtype, num_layers=1, num_heads=2, seed=5)
    case = poisoned(case)
    keep = random_keep(case.batch, 2)
    written = {
        block
        for e in case.batch.evictions
        for block in e.new_block_ids[e.prefix_len // BLOCK_SIZE :]
    }
    others = [i for i in range(case.states.num_blocks) if i not in written]
    before = case.states.cells[:, others].clone()
    ops.compact(case.states, case.batch, keep)
    for i, eviction in enumerate(case.batch.evictions):
        start = eviction.prefix_len // BLOCK_SIZE * BLOCK_SIZE
        after = case.states.read(case.batch.new_block_table[i], eviction.new_len, start)
        # The part of the prefix that is no full block goes along, whole and in its place.
        assert torch.equal(after, case.kept_and_tail(keep, i)[:, :, start:])
    torch.testing.assert_close(case.states.cells[:, others], before, rtol=0, atol=0, equal_nan=True)


def test_a_prefix_with_nothing_to_evict_behind_it_stays_whole(ops):
    case = new_case([(60, 61, 20, 40), (40, 40, 8, 32)], num_layers=1, num_heads=2)
    scores = rkv_scores(case, ops)
    keep = ops.select(scores, case.batch)
    assert scores.shape == (2, 2, 12)
    assert keep[:, :, :8][1].tolist() == [[*range(32, 40)]] * 2
    assert keep[0].tolist() == [[*range(40, 60)]] * 2
    ops.compact(case.states, case.batch, keep)
    for i, eviction in enumerate(case.batch.evictions):
        row = case.batch.new_block_table[i]
        assert torch.equal(case.states.read(row, eviction.new_len), case.dense[i])


@pytest.mark.parametrize(
    ("scales", "caps"),
    [
        # Granite's and a sharp one; Gemma's cap and one that bends everything.
        ((1 / 128, 0.6), (0.0, 0.0)),
        ((0.5, 0.2), (50.0, 0.0)),
        ((0.7, 0.05), (1.5, 30.0)),
    ],
)
def test_each_layer_is_scored_with_its_own_scale_and_soft_cap(ops, scales, caps):
    sizes = {"group": 3, "num_heads": 1, "seed": 9}
    case = new_case([(61, 61, 30), (90, 92, 21, 33)], **sizes)
    of_layers = {"scale": torch.tensor(scales), "soft_cap": torch.tensor(caps)}
    # All of importance: the others would hide a wrong logit.
    scores = rkv_scores(case, ops, lam=1.0, **of_layers)
    for layer in range(2):
        parameters = {"scale": scales[layer], "soft_cap": caps[layer], "lam": 1.0}
        assert_oracle_agrees(case, ops, scores, layer=layer, **parameters)
    plain = rkv_scores(case, ops, lam=1.0)
    assert not torch.allclose(scores[0], plain[0], rtol=0.01)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_a_soft_cap_does_not_hide_an_infinite_logit(ops, value):
    case = new_case([(60, 60, 20)], num_heads=1, num_layers=1, dtype=torch.bfloat16)
    # Overflows in the product only: keys and queries are finite.
    case.queries[..., 3] = 3e38 if value > 0 else -3e38
    case.states.write(case.batch.old_block_table[0], 100 * case.dense[0].abs())
    ops.select(rkv_scores(case, ops, soft_cap=torch.tensor([5.0])), case.batch)
    assert case.batch.non_finite.tolist() == [0]
