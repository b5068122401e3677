"""The kernels for CPUs against their torch references, at full size, on every layout of a cache."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from rkv_vllm.kernels import native, ops
from rkv_vllm.kernels.batch import Eviction, EvictionBatch
from rkv_vllm.kernels.compact.cpu import compact_cpu
from rkv_vllm.kernels.compact.naive import compact_naive
from rkv_vllm.kernels.ops import ops_for
from rkv_vllm.kernels.paged import Packing, PagedStates
from rkv_vllm.kernels.rkv.cpu import importance_cpu, redundancy_cpu
from rkv_vllm.kernels.rkv.naive import importance_naive, redundancy_naive
from rkv_vllm.kernels.select.cpu import select_cpu
from rkv_vllm.kernels.select.naive import select_naive
from tests.kernels.cases import (
    ADVERSARIAL,
    BLOCK_SIZE,
    CPU,
    DTYPES,
    HEADS,
    LAYERS,
    NAIVE,
    PACKED,
    PLAIN,
    adversarial_keys,
    assert_equivalent_choice,
    assert_same_scores,
    new_case,
    new_states,
    random_keep,
    rkv_scores,
)

LAYOUTS = PACKED + PLAIN


def test_the_kernels_are_built():
    # The project's own set-up has a compiler; without this the tests below would prove nothing.
    assert native.library() is not None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 128])
def test_a_paged_view_reads_what_it_wrote_and_touches_nothing_else(layout, head_size):
    case = new_case([(77, 77, 20)], layout=layout, head_size=head_size)
    row = case.batch.old_block_table[0]
    assert torch.equal(case.states.read(row, 77), case.dense[0])
    others = [i for i in range(case.states.num_blocks) if i not in row.tolist()]
    assert case.states.cells[:, others].isnan().all()
    one_layer = case.states.layers(slice(1, 2))
    assert torch.equal(one_layer.read(row, 77), case.dense[0][1:])


def test_a_block_of_the_table_is_several_neighbouring_kernel_blocks():
    cells = torch.arange(6 * 4).view(1, 6, 1, 4, 1).float()
    states = PagedStates(cells, None, 12)
    assert states.num_blocks == 2
    assert torch.equal(states.read(torch.tensor([1]), 12).flatten(), torch.arange(12.0, 24.0))


@pytest.mark.parametrize("n", [2, 7, 63, 100, 385, 1152, 2000, 4097])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_equal_the_reference_on_odd_sizes(n, dtype):
    window = min(8, n - 1)
    options = {"dtype": dtype, "group": 3, "window": window, "num_layers": 1, "seed": n}
    for similar in (0.0, 1.2, 5.0):
        case = new_case([(n, n, window + 1)], similar=similar, **options)
        expected = rkv_scores(case, NAIVE)
        got = rkv_scores(case, CPU)
        assert_same_scores(got, expected, case.batch)


@pytest.mark.parametrize("n", [2, 7, 63, 100, 1152, 2000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["vec keys", "tokens first"])
def test_centred_and_defensive_scores_equal_the_reference_on_odd_sizes(n, dtype, layout):
    window = min(8, n - 1)
    options = {"dtype": dtype, "group": 3, "window": window, "num_layers": 1, "seed": n}
    for method in ({"center": True}, {"defensive": True, "lam": 1.0}):
        case = new_case([(n, n, window + 1)], layout=layout, similar=2.0, **options)
        expected = rkv_scores(case, NAIVE, **method)
        got = rkv_scores(case, CPU, **method)
        assert_same_scores(got, expected, case.batch)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("head_size", [32, 80, 128])
def test_ragged_batches_are_chosen_as_by_the_reference(layout, group, head_size):
    case = new_case(
        [(200, 203, 101), (63, 63, 9), (130, 131, 130)],
        layout=layout,
        head_size=head_size,
        dtype=torch.bfloat16,
        group=group,
    )
    reference = rkv_scores(case, NAIVE)
    scores = rkv_scores(case, CPU)
    assert_same_scores(scores, reference, case.batch)
    assert_equivalent_choice(select_naive(reference, case.batch), reference, case.batch)
    assert_equivalent_choice(select_cpu(scores, case.batch), reference, case.batch)


@pytest.mark.parametrize(
    ("window", "lam", "pool", "threshold"), [(1, 0.0, 1, 0.9), (13, 1.0, 9, -0.2), (8, 0.5, 3, 0.5)]
)
def test_the_parameters_reach_the_kernel(window, lam, pool, threshold):
    method = {"lam": lam, "pool": pool, "threshold": threshold}
    case = new_case([(150, 150, 40)], group=3, window=window)
    expected = rkv_scores(case, NAIVE, **method)
    got = rkv_scores(case, CPU, **method)
    assert_same_scores(got, expected, case.batch)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_adversarial_keys_of_the_backward_search(kind, center):
    case = new_case([(96, 96, 30)], head_size=128)
    # Not exact in binary: the mean of equal keys may not be their number.
    keys = 0.7 * adversarial_keys(kind, 96, 128)
    case.states.write(case.batch.old_block_table[0], keys.expand(LAYERS, HEADS, -1, -1))
    expected = rkv_scores(case, NAIVE, center=center)
    got = rkv_scores(case, CPU, center=center)
    # The halves of a score may cancel.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=5e-8)


def test_the_window_is_found_where_the_ring_wraps():
    case = new_case([(50, 50, 20)], window=4)
    ring_len = case.queries.shape[2]
    for end in range(50, 50 + ring_len):
        eviction = case.batch.evictions[0]._replace(window_end=end)
        batch = EvictionBatch.of([eviction], 4, "cpu")
        queries = batch.window_queries(0, case.queries).view(LAYERS, HEADS, 4, -1)
        for i in range(4):
            recorded = case.queries[0, :, (end - 4 + i) % ring_len]
            assert torch.equal(queries[:, :, i], recorded)


@pytest.mark.parametrize("m", [1, 7, 63, 1152])
def test_select_is_exact_with_ties_to_the_lower_index(m):
    generator = torch.Generator().manual_seed(m)
    for values in (3, 10**6):
        for count in {1, (m + 1) // 2, m}:
            eviction = Eviction([], [], m + 2, m + 2, count + 2)
            batch = EvictionBatch.of([eviction], 2, "cpu")
            scores = torch.randint(values, (1, 5, m), generator=generator).float()
            keep = select_cpu(scores, batch)
            order = scores.argsort(dim=2, descending=True, stable=True)[..., :count]
            assert torch.equal(keep[..., :count].long(), order.sort(dim=2).values)
            assert torch.equal(keep, select_naive(scores, batch))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fresh", ["in place", "all fresh", "first fresh"])
def test_compaction_moves_the_same_cells_as_the_reference(layout, dtype, fresh):
    # The first one ends where a block does; behind the others' ends blocks hold NaN.
    lengths = [(150, 153, 61), (70, 70, 70), (40, 45, 9)]
    case = new_case(lengths, layout=layout, dtype=dtype, fresh=fresh)
    copy = new_case(lengths, layout=layout, dtype=dtype, fresh=fresh)
    keep = random_keep(case.batch, LAYERS * HEADS)
    new = {i for eviction in case.batch.evictions for i in eviction.new_block_ids}
    others = [i for i in range(case.states.num_blocks) if i not in new]
    before = case.states.cells[:, others].clone()
    compact_cpu(case.states, case.batch, keep)
    compact_naive(copy.states, case.batch, keep)
    for i, eviction in enumerate(case.batch.evictions):
        row = case.batch.new_block_table[i]
        survivors = case.kept_and_tail(keep, i)
        assert torch.equal(case.states.read(row, eviction.new_len), survivors)
        assert torch.equal(copy.states.read(row, eviction.new_len), survivors)
        end = -(-eviction.new_len // BLOCK_SIZE) * BLOCK_SIZE
        for states in (case.states, copy.states):
            assert not states.read(row, end, eviction.new_len).count_nonzero()
    assert torch.equal(case.states.cells[:, others].nan_to_num(7.0), before.nan_to_num(7.0))


def test_an_empty_batch_is_no_work():
    case = new_case([])
    for version in (NAIVE, CPU):
        keep = version.select(rkv_scores(case, version), case.batch)
        version.compact(case.states, case.batch, keep)
        assert keep.shape == (0, LAYERS * HEADS, 0)


def test_launchers_say_what_they_expected_and_got():
    case = new_case([(100, 100, 20)])
    states, batch, queries = case.states, case.batch, case.queries
    far = EvictionBatch.of([batch.evictions[0]._replace(old_block_ids=[999] * 4)], 8, "cpu")
    short = EvictionBatch.of([batch.evictions[0]._replace(old_block_ids=[0] * 3)], 8, "cpu")
    seat = EvictionBatch.of([batch.evictions[0]._replace(seat=2)], 8, "cpu")
    moved = EvictionBatch.of(
        [batch.evictions[0]._replace(prefix_len=40, new_block_ids=[0, 1, 2, 3])], 8, "cpu"
    )
    layers = (case.scale, case.no_cap)
    keep = random_keep(batch, LAYERS * HEADS)
    for version in (importance_cpu, importance_naive):
        with pytest.raises(ValueError, match=r"ids in \[0, 11\), got 999"):
            version(states, far, queries, *layers, pool=7)
        with pytest.raises(ValueError, match=r"seats: expected ids in \[0, 2\), got \[2\]"):
            version(states, seat, queries, *layers, pool=7)
        with pytest.raises(ValueError, match=r"queries: expected .* 64\] on cpu"):
            version(states, batch, queries[..., :63], *layers, pool=7)
        with pytest.raises(ValueError, match=r"queries: expected .* got torch.int8"):
            version(states, batch, queries.to(torch.int8), *layers, pool=7)
        with pytest.raises(ValueError, match=r"soft_cap: .* float32 \[2\] .* \[1\] on cpu"):
            version(states, batch, queries, case.scale, torch.zeros(1), pool=7)
        with pytest.raises(ValueError, match=r"scale: .* float32 \[2\] .* got torch.float64"):
            version(states, batch, queries, case.scale.double(), case.no_cap, pool=7)
    for version in (redundancy_cpu, redundancy_naive):
        with pytest.raises(ValueError, match=r"old_block_ids of request 0: .* 100 tokens, got 3"):
            version(states, short, threshold=0.5)
        with pytest.raises(ValueError, match=r"its 1 blocks full of prefix to stay \[\d+\], got"):
            version(states, moved, threshold=0.5)
    for version in (select_cpu, select_naive):
        with pytest.raises(ValueError, match=r"scores: expected float32 \[1, heads, 92\]"):
            version(torch.zeros(1, 6, 93), batch)
    for version in (compact_cpu, compact_naive):
        with pytest.raises(ValueError, match=r"keep: expected int32 \[1, 6, 20\]"):
            version(states, batch, keep.long())
    with pytest.raises(ValueError, match=r"positions in \[0, 100\)"):
        compact_cpu(states, batch, keep + 90)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 7}, "window 8, budget 7"),
        ({"prefix_len": 81}, "budget 20, settled_len 100, total_len 100, prefix_len 81"),
        ({"prefix_len": -1}, "prefix_len -1"),
        ({"seat": 0, "window_end": 7}, "seat 0, window_end 7"),
        ({"settled_len": 19}, "budget 20, settled_len 19"),
        ({"total_len": 99}, "settled_len 100, total_len 99"),
        ({"new_block_ids": [-1]}, "no negative ids"),
    ],
)
def test_lengths_that_contradict_each_other_are_refused(changes, message):
    eviction = Eviction([1, 2, 3, 4], [1], 100, 100, 20)._replace(**changes)
    with pytest.raises(ValueError, match=message):
        EvictionBatch.of([eviction], 8, "cpu")


def test_views_that_are_no_cache_are_refused():
    packed = torch.zeros(2, 4, 3, 32 * 64)
    packing = Packing((32, 64), (0, 1))
    with pytest.raises(ValueError, match="contiguous last dimension"):
        PagedStates(packed[..., ::2], packing, 32)
    with pytest.raises(ValueError, match="mixes tokens and dimensions"):
        PagedStates(packed, Packing((2048,), (0,)), 32)
    with pytest.raises(ValueError, match="whole blocks of 48 tokens"):
        PagedStates(torch.zeros(2, 4, 3, 32, 64), None, 48)
    with pytest.raises(ValueError, match="whole blocks of 96 tokens"):
        PagedStates(torch.zeros(2, 4, 3, 32, 64), None, 96)


COMPACTION_OF_A_LONG_PROMPT = """
import resource, torch
from rkv_vllm.kernels.compact.cpu import compact_cpu
from rkv_vllm.kernels.batch import Eviction, EvictionBatch
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.kernels.rkv.cpu import importance_cpu, redundancy_cpu
from rkv_vllm.kernels.select.cpu import select_cpu

n = 32768
torch.manual_seed(0)
cells = torch.randn(1, n // 16, 1, 16, 64).add_(torch.randn(64)).bfloat16()
states = PagedStates(cells, None, 16)
row = list(range(n // 16))
batch = EvictionBatch.of([Eviction(row, row[:64], n, n, 1024, seat=0, window_end=n)], 8, "cpu")
queries = torch.randn(1, 1, 9, 2, 64).bfloat16()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
layers = (torch.tensor([0.125]), torch.zeros(1))
scores = importance_cpu(states, batch, queries, *layers, pool=7)
scores.mul_(0.1).sub_(redundancy_cpu(states, batch, threshold=0.5), alpha=0.9)
keep = select_cpu(scores, batch)
compact_cpu(states, batch, keep)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_compaction_in_cpp_needs_memory_for_the_tokens_and_not_for_their_pairs():
    # In a process of its own, because the peak of this one may be high already.
    output = subprocess.run(
        [sys.executable, "-c", COMPACTION_OF_A_LONG_PROMPT],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    n, head_size = 32768, 64
    # The keys once in float32 plus a few numbers per token; all pairs would be 4 GiB.
    assert int(output) * 1024 < 1.5 * n * (head_size + 8) * 4


NO_MEMORY = """
import resource, torch
from rkv_vllm.kernels.batch import Eviction, EvictionBatch
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.kernels.rkv.cpu import importance_cpu, redundancy_cpu

n = 1 << 20
states = PagedStates(torch.zeros(1, 1, 1, 16, 64).expand(1, n // 16, 1, 16, 64), None, 16)
row = list(range(n // 16))
batch = EvictionBatch.of([Eviction(row, row[:64], n, n, 1024, seat=0, window_end=n)], 8, "cpu")
queries = torch.zeros(1, 1, 9, 2, 64)
layers = (torch.ones(1), torch.zeros(1))
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (12 << 20),) * 2)
for run in (
    lambda: importance_cpu(states, batch, queries, *layers, pool=7),
    lambda: redundancy_cpu(states, batch, threshold=0.5),
):
    try:
        run()
    except MemoryError as error:
        print(error)
"""


def test_too_little_memory_is_an_error_and_not_the_end_of_the_process():
    done = subprocess.run([sys.executable, "-c", NO_MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "no memory to score 1048576 tokens\n" * 2


def test_a_library_built_from_other_sources_is_refused(monkeypatch):
    monkeypatch.setattr(native, "_INTERFACE", 10**6)
    with pytest.raises(RuntimeError, match=r"interface \d+, wanted 1000000.* install the project"):
        native.library.__wrapped__()


def test_without_the_library_torch_serves_and_says_so_once(monkeypatch):
    case = new_case([(100, 100, 30)], group=3)
    expected = rkv_scores(case, ops_for(case.states))
    assert ops_for(case.states) == CPU
    monkeypatch.setattr(native, "library", lambda: None)
    warnings = []
    monkeypatch.setattr(ops.logger, "warning", lambda *args: warnings.append(args))
    ops._log_fallback.cache_clear()
    chosen = ops_for(case.states)
    assert chosen == ops_for(case.states) == NAIVE
    got = rkv_scores(case, chosen)
    assert_same_scores(got, expected, case.batch)
    keep = chosen.select(got, case.batch)
    chosen.compact(case.states, case.batch, keep)
    after = case.states.read(case.batch.new_block_table[0], 30)
    assert torch.equal(after, case.kept_and_tail(keep, 0))
    assert [args[1:] for args in warnings] == [("torch.float32", "cpu")]


def test_a_transposed_choice_is_compacted_like_its_copy():
    case = new_case([(100, 100, 40)])
    keep = torch.arange(0, 80, 2, dtype=torch.int32).repeat(1, LAYERS * HEADS, 1)
    transposed = keep.transpose(1, 2).contiguous().transpose(1, 2)
    compact_cpu(case.states, case.batch, transposed)
    after = case.states.read(case.batch.new_block_table[0], 40)
    assert torch.equal(after, case.dense[0][:, :, :80:2])


def test_a_part_of_a_batch_is_those_requests():
    case = new_case([(60, 60, 20), (100, 101, 30), (80, 80, 20)])
    expected = rkv_scores(case, CPU)
    flags = torch.zeros(2, dtype=torch.int32)
    part = case.batch.part(slice(1, 3), flags)
    assert part.non_finite is flags
    assert torch.equal(rkv_scores(replace(case, batch=part), CPU), expected[1:])


def test_every_layout_addresses_the_cells_of_the_view():
    for layout in LAYOUTS:
        states = new_states(layout, 3, 64, torch.float32)
        tokens, dims = states.offsets
        states.cells[1, 2, 1] = torch.arange(BLOCK_SIZE * 64.0).view(states.cells.shape[3:])
        first = states.cells[1, 2, 1].storage_offset()
        flat = states.cells.new_empty(0).set_(states.cells.untyped_storage())
        addressed = flat[first + tokens.unsqueeze(1) + dims]
        assert torch.equal(addressed, torch.arange(BLOCK_SIZE * 64.0).view(BLOCK_SIZE, 64))
