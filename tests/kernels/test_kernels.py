"""The C++ kernels against their torch references, on every packing that a backend uses."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rkv_vllm.kernels import native
from rkv_vllm.kernels.compact import compact
from rkv_vllm.kernels.compact.cpu import compact_cpu
from rkv_vllm.kernels.compact.naive import compact_naive
from rkv_vllm.kernels.observe import observe
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.kernels.score import score
from rkv_vllm.kernels.score.cpu import score_cpu
from rkv_vllm.kernels.score.naive import score_naive
from rkv_vllm.kernels.select.cpu import select_cpu
from rkv_vllm.kernels.select.naive import select_naive
from rkv_vllm.methods.rkv import RKV, NonFiniteScoreError
from rkv_vllm.worker.cache_views import known_packings

BLOCK_SIZE = 32
LAYERS, HEADS = 2, 3
PACKINGS = ["vec keys", "vec values", "amx keys", "amx values"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def packing_of(name: str, head_size: int):
    isa, half = name.split()
    return known_packings(BLOCK_SIZE, head_size)[isa][half == "values"]


def paged_keys(n, head_size, dtype, name="vec keys", similar=1.2, seed=0):
    """A cache of shuffled blocks around n random keys; returns (view, row, dense keys)."""
    generator = torch.Generator().manual_seed(seed)
    num_row = math.ceil(n / BLOCK_SIZE)
    shape = (LAYERS, HEADS, n, head_size)
    common = torch.randn((LAYERS, HEADS, 1, head_size), generator=generator)
    dense = (torch.randn(shape, generator=generator) + similar * common).to(dtype)
    # Both halves of a block lie side by side, as in vLLM: the view is not contiguous.
    cache = torch.full((LAYERS, num_row + 5, HEADS, 2, BLOCK_SIZE * head_size), math.nan).to(dtype)
    states = PagedStates(cache[:, :, :, 1], packing_of(name, head_size), BLOCK_SIZE)
    row = torch.randperm(num_row + 5, generator=generator)[:num_row]
    states.write(row, dense)
    return states, row, dense


def queries_of(group, head_size, dtype, window=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (LAYERS * HEADS * group, window, head_size)
    return torch.randn(shape, generator=generator).to(dtype)


def test_the_kernels_are_built():
    # The project's own set-up has a compiler; without this the tests below would prove nothing.
    assert native.library() is not None


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 128])
def test_a_paged_view_reads_what_it_wrote_and_touches_nothing_else(name, head_size):
    states, row, dense = paged_keys(77, head_size, torch.float32, name)
    assert torch.equal(states.read(row, 77), dense)
    others = [i for i in range(states.blocks.shape[1]) if i not in row.tolist()]
    assert states.blocks[:, others].isnan().all()


@pytest.mark.parametrize("n", [9, 63, 100, 385, 1152, 4097])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_equal_the_reference_on_odd_sizes(n, dtype):
    for similar in (0.0, 1.2, 5.0):
        states, row, _ = paged_keys(n, 64, dtype, similar=similar, seed=n)
        queries = queries_of(3, 64, dtype)
        expected = score_naive(states, row, n, queries)
        got = score_cpu(states, row, n, queries)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("head_size", [32, 80, 128])
def test_kept_tokens_equal_the_reference_for_every_layout(name, group, head_size):
    n, budget = 200, 101
    states, row, dense = paged_keys(n, head_size, torch.bfloat16, name)
    queries = queries_of(group, head_size, torch.bfloat16)
    method = RKV()
    kept = method.keep_paged(states, states, row, n, queries, budget)
    expected = method.keep_indices(dense.flatten(0, 1), None, queries, budget)
    # Rounding may exchange tokens at the cut (docs/method.md); none happens with this seed.
    assert torch.equal(kept, expected)


@pytest.mark.parametrize(
    ("window", "lam", "pool", "threshold"), [(1, 0.0, 1, 0.9), (13, 1.0, 9, -0.2), (8, 0.5, 3, 0.5)]
)
def test_the_parameters_reach_the_kernel(window, lam, pool, threshold):
    method = {"window": window, "lam": lam, "pool": pool, "threshold": threshold}
    states, row, _ = paged_keys(150, 64, torch.float32)
    queries = queries_of(3, 64, torch.float32, window=window)
    expected = score_naive(states, row, 150, queries, **method)
    got = score_cpu(states, row, 150, queries, **method)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["identical", "zero", "orthogonal", "one far"])
def test_adversarial_keys_of_the_backward_search(kind):
    n, head_size = 96, 128
    keys = {
        "identical": torch.ones(n, head_size),
        "zero": torch.zeros(n, head_size),
        "orthogonal": torch.eye(head_size)[:n],
        "one far": torch.eye(head_size)[:n].index_fill(0, torch.tensor([n - 1]), 0),
    }[kind]
    if kind == "one far":
        keys[n - 1, 0] = 2.0
    states, row, _ = paged_keys(n, head_size, torch.float32)
    states.write(row, keys.expand(LAYERS, HEADS, n, head_size))
    queries = queries_of(1, head_size, torch.float32)
    expected = score_naive(states, row, n, queries)
    torch.testing.assert_close(score_cpu(states, row, n, queries), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("m", [1, 7, 63, 1152])
def test_select_is_exact_with_ties_to_the_lower_index(m):
    generator = torch.Generator().manual_seed(m)
    for values in (3, 10**6):
        scores = torch.randint(values, (5, m), generator=generator).float()
        for count in {0, 1, m // 2, m}:
            kept = select_cpu(scores, count)
            order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
            assert torch.equal(kept, order.sort(dim=1).values)
            assert count == 0 or torch.equal(kept, select_naive(scores, count))


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("private", ["in place", "all fresh", "first fresh"])
def test_compaction_moves_the_same_cells_as_the_reference(name, dtype, private):
    settled, total, budget = 150, 153, 70
    states, row, dense = paged_keys(total, 64, dtype, name)
    num_new = math.ceil((budget + total - settled) / BLOCK_SIZE)
    spare = torch.tensor([i for i in range(states.blocks.shape[1]) if i not in row.tolist()])
    new = row[:num_new].clone()
    if private == "all fresh":
        new[:] = spare[:num_new]
    elif private == "first fresh":
        new[0] = spare[0]
    generator = torch.Generator().manual_seed(2)
    keep = torch.stack(
        [torch.randperm(settled, generator=generator)[:budget] for _ in range(LAYERS * HEADS)]
    )
    keep = keep.sort(dim=1).values
    untouched = [i for i in row.tolist() if i not in new.tolist()]
    before = states.blocks[:, untouched].clone()
    copy = PagedStates(states.blocks.clone(), states.packing, BLOCK_SIZE)
    compact_cpu(states, row, new, keep, settled, total)
    compact_naive(copy, row, new, keep, settled, total)
    new_len = budget + total - settled
    assert torch.equal(states.read(new, new_len), copy.read(new, new_len))
    for layer in range(LAYERS):
        for head in range(HEADS):
            kept = dense[layer, head, keep[layer * HEADS + head]]
            survivors = torch.cat([kept, dense[layer, head, settled:]])
            assert torch.equal(states.read(new, new_len)[layer, head], survivors)
    assert torch.equal(states.blocks[:, untouched], before)


def test_a_non_finite_score_names_its_head():
    for value in (math.nan, math.inf):
        states, row, dense = paged_keys(100, 64, torch.float32)
        dense[1, 2, 40, 3] = value
        states.write(row, dense)
        with pytest.raises(NonFiniteScoreError) as caught:
            score_cpu(states, row, 100, queries_of(3, 64, torch.float32))
        assert caught.value.head == 1 * HEADS + 2


def test_what_does_not_fit_is_refused_before_anything_runs():
    states, row, _ = paged_keys(100, 64, torch.float32)
    queries = queries_of(3, 64, torch.float32)
    keep = torch.zeros(LAYERS * HEADS, 10, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected at least 4 blocks"):
        score_cpu(states, row[:3].contiguous(), 100, queries)
    with pytest.raises(ValueError, match=r"expected ids in \[0, 9\)"):
        score_cpu(states, row + 9, 100, queries)
    with pytest.raises(ValueError, match="queries: expected"):
        score_cpu(states, row, 100, queries[:, :7])
    with pytest.raises(ValueError, match="block_ids: expected contiguous int64"):
        score_cpu(states, row.int(), 100, queries)
    with pytest.raises(ValueError, match="keep: expected int64"):
        compact_cpu(states, row, row, keep.int(), 99, 100)
    with pytest.raises(ValueError, match="scores: expected float32"):
        select_cpu(torch.zeros(3, 4), 5)
    with pytest.raises(ValueError, match="contiguous last dimension"):
        PagedStates(states.blocks[..., ::2], states.packing, BLOCK_SIZE)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any torch operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_a_compaction_in_cpp_makes_no_dense_copy_and_no_square_buffer():
    n, budget = 2000, 1000
    states, row, _ = paged_keys(n, 64, torch.bfloat16)
    queries = queries_of(3, 64, torch.bfloat16)
    with LargestTensor() as largest:
        kept = RKV().keep_paged(states, states, row, n, queries, budget)
        compact(states, row, row[: math.ceil(budget / BLOCK_SIZE)], kept, n, n)
    assert largest.numel < 2 * LAYERS * HEADS * n < n * n


def test_without_the_library_torch_serves(monkeypatch):
    states, row, _ = paged_keys(100, 64, torch.float32)
    queries = queries_of(3, 64, torch.float32)
    expected = score(states, row, 100, queries)
    monkeypatch.setattr(native, "library", lambda: None)
    assert not native.is_available(states)
    got = score(states, row, 100, queries)
    assert torch.equal(got, score_naive(states, row, 100, queries))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


def test_observe_writes_watched_tokens_only():
    pool = torch.full((3, 2, 5, 4, 8), math.nan)
    query = torch.randn(6, 4, 8)
    index = [torch.tensor(x) for x in ([1, 4], [0, 2], [3, 0])]
    observe(pool, 1, query, *index)
    assert torch.equal(pool[0, 1, 3], query[1])
    assert torch.equal(pool[2, 1, 0], query[4])
    assert pool.isnan().sum() == pool.numel() - 2 * 4 * 8


def test_a_transposed_choice_is_compacted_like_its_copy():
    states, row, dense = paged_keys(100, 64, torch.float32)
    keep = torch.arange(40).expand(LAYERS * HEADS, 40).mul(2)
    compact_cpu(states, row, row[:2].clone(), keep.t().contiguous().t(), 100, 100)
    assert torch.equal(states.read(row[:2], 40), dense[:, :, :80:2])


def test_a_choice_beyond_the_settled_tokens_is_refused():
    states, row, _ = paged_keys(100, 64, torch.float32)
    keep = torch.arange(60, 100).repeat(LAYERS * HEADS, 1)
    with pytest.raises(ValueError, match=r"positions in \[0, 99\)"):
        compact_cpu(states, row, row, keep, 99, 100)
