"""No launch leaves its result to chance: any order of programs, races, accesses out of bounds."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from triton.runtime.errors import InterpreterError

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.compact.triton import compact_triton
from rkv_vllm.kernels.observe.triton import observe_triton
from rkv_vllm.kernels.ops import triton_ops
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.kernels.slots import StepRows, StepSlots
from rkv_vllm.kernels.slots.triton import slots_triton
from tests.kernels.any_order import any_order
from tests.kernels.cases import PLAIN, SMALL_STATES, new_case, random_keep, rkv_scores

TRITON = triton_ops(SMALL_STATES)
SMALL = {"num_layers": 1, "head_size": 32, "group": 2}
# More than one tile of 64; a prefix that ends inside a block.
LENGTHS = [(150, 153, 70), (70, 70, 40, 20), (200, 201, 130, 33)]


def with_own_cache(case):
    """The same case over a copy of its memory."""
    blocks = case.states.blocks
    memory = blocks.new_empty(0).set_(blocks.untyped_storage()).clone()
    view = memory.as_strided(blocks.shape, blocks.stride(), blocks.storage_offset())
    states = PagedStates(view, case.states.packing, case.states.block_size)
    batch = EvictionBatch.of(case.batch.evictions, case.batch.window, "cpu")
    return replace(case, states=states, batch=batch), memory


def compaction(case, keep=None, **method):
    """Everything that one compaction writes."""
    own, memory = with_own_cache(case)
    scores = rkv_scores(own, TRITON, **method)
    chosen = TRITON.select(scores, own.batch)
    compact_triton(own.states, own.batch, chosen if keep is None else keep)
    return [scores, chosen, memory, own.batch.non_finite]


def step():
    """Everything that one step writes: slots, then one layer's queries."""
    rows = StepRows(
        torch.tensor([2, 0, -1, 1]),
        torch.tensor([0, 1, 13, 14, 1500], dtype=torch.int32),
        torch.tensor([5, 0, 40], dtype=torch.int32),
        torch.tensor([1, -1, 0], dtype=torch.int32),
        10,
    )
    positions = torch.cat(
        [torch.tensor([99]), torch.arange(30, 42), torch.tensor([0]), torch.arange(0, 1486)]
    )
    table = torch.randperm(300, dtype=torch.int32).view(3, 100)
    out = StepSlots(
        torch.full((1600,), 9),
        torch.full((1600,), 9, dtype=torch.int32),
        torch.full((6,), 9, dtype=torch.int32),
    )
    slots_triton(rows, positions, table, 16, out)
    ring, query = torch.zeros(4, 2, 10, 4, 64), torch.randn(40, 3, 4, 64)[:, 0]
    token_rows = torch.full((40,), -1, dtype=torch.int32)
    token_rows[[1, 5, 30]] = torch.tensor([3, 17, 39], dtype=torch.int32)
    observe_triton(ring, 1, query, token_rows)
    return [out.slot_mapping, out.token_rows, out.seq_lens, ring]


def assert_any_order_is_the_same(run, num_seeds: int) -> set[str]:
    """Bit for bit, without a race; returns the names of the kernels that ran."""

    def seeded() -> list[bytes]:
        torch.manual_seed(1)
        return [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in run()]

    expected = seeded()
    with any_order() as order:
        assert seeded() == expected
        assert order.races == []
        for order.seed in range(num_seeds):
            for order.mode in ("shuffled", "interleaved"):
                assert seeded() == expected, (order.mode, order.seed)
    return order.launches


def test_a_compaction_is_the_same_in_any_order_and_has_no_race():
    case = new_case([(70, 72, 40), (103, 104, 30, 33)], num_heads=1, fresh="first fresh", **SMALL)
    names = ["stats", "combine", "search", "finish", "select", "compact"]
    assert assert_any_order_is_the_same(lambda: compaction(case), 1) == {
        f"{name}_kernel" for name in names
    }


def test_centred_keys_are_the_same_in_any_order_and_have_no_race():
    case = new_case([(70, 72, 40), (103, 104, 30, 33)], num_heads=1, fresh="first fresh", **SMALL)
    run = partial(compaction, case, center=True, defensive=True)
    assert "sums_kernel" in assert_any_order_is_the_same(run, 1)


def test_a_step_is_the_same_in_any_order_and_has_no_race():
    assert assert_any_order_is_the_same(step, 1) == {"slots_kernel", "observe_kernel"}


@pytest.mark.nightly
@pytest.mark.parametrize("layout", PLAIN)
@pytest.mark.parametrize("fresh", ["in place", "first fresh", "all fresh"])
@pytest.mark.parametrize("choice", ["R-KV's", "centred", "any"])
def test_every_layout_is_the_same_in_any_order_and_has_no_race(layout, fresh, choice):
    case = new_case(LENGTHS, layout=layout, fresh=fresh, num_heads=2, **SMALL)
    keep = random_keep(case.batch, 2) if choice == "any" else None
    changed = choice == "centred"
    run = partial(compaction, case, keep, center=changed, defensive=changed)
    assert_any_order_is_the_same(run, 3)


@pytest.mark.parametrize("bug", ["no barrier", "descending", "foreign block", "shared rows"])
def test_a_planted_race_is_noticed(bug):
    # Three tiles: the first two are loaded before anything is stored.
    case = new_case([(150, 153, 140), (150, 150, 140)], num_heads=1, **SMALL)
    keep = random_keep(case.batch, 1)
    states, batch = case.states, case.batch
    if bug == "descending":
        keep = keep.flip(2)
    elif bug == "foreign block":
        # Request 0 writes what request 1 reads.
        batch.new_block_table[0, 0] = batch.old_block_table[1, 1]
    elif bug == "shared rows":
        batch.new_block_table[1] = batch.new_block_table[0]
    with any_order() as order:
        order.drop_barriers = bug == "no barrier"
        compact_triton(states, batch, keep)
    where = "within a program" if bug in ("no barrier", "descending") else "between programs"
    assert len(order.races) == 1
    assert where in order.races[0]


def test_a_planted_order_shows_in_the_result():
    case = new_case([(150, 153, 70), (150, 150, 70)], num_heads=1, **SMALL)
    keep = random_keep(case.batch, 1)

    def run():
        own, memory = with_own_cache(case)
        own.batch.new_block_table[0, 0] = own.batch.old_block_table[1, 1]
        compact_triton(own.states, own.batch, keep)
        return [memory]

    with any_order() as order:
        order.mode = "shuffled"
        found = set()
        for order.seed in range(4):
            found.add(run()[0].view(torch.uint8).numpy().tobytes())
    assert len(found) > 1


def test_an_access_outside_of_the_cache_is_noticed():
    case = new_case([(150, 153, 70)], num_heads=1, **SMALL)
    case.batch.old_block_table[0, 3] = 10**6
    with any_order(), pytest.raises(InterpreterError, match="outside of every tensor"):
        TRITON.redundancy(case.states, case.batch, threshold=0.5)
