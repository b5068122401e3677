"""Child of verify.py: every Triton kernel against its naive version, on the device.

On a CPU, with TRITON_INTERPRET=1, it runs a few small cases instead. One case that fails does not
end the others. The inputs and the meaning of "equal" are those of tests/kernels/cases.py.
"""

import argparse
import itertools
import json
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import rkv_vllm
from rkv_vllm.kernels.batch import Eviction, EvictionBatch
from rkv_vllm.kernels.compact.triton import compact_triton
from rkv_vllm.kernels.observe.naive import observe_naive
from rkv_vllm.kernels.observe.triton import observe_triton
from rkv_vllm.kernels.ops import triton_ops
from rkv_vllm.kernels.paged import FLOATS_OF_A_BYTE, PagedStates
from rkv_vllm.kernels.select.naive import select_naive
from rkv_vllm.kernels.select.triton import select_triton
from rkv_vllm.kernels.slots import StepRows, StepSlots
from rkv_vllm.kernels.slots.naive import slots_naive
from rkv_vllm.kernels.slots.triton import slots_triton
from tests.kernels.cases import (
    ADVERSARIAL,
    DTYPES,
    NAIVE,
    PLAIN,
    SCORE_TOLERANCE,
    Case,
    adversarial_keys,
    assert_equivalent_choice,
    assert_same_scores,
    new_case,
    random_keep,
    rkv_scores,
)

Run = tuple[str, Callable[[], None]]
CACHE_DTYPES = (*DTYPES, *FLOATS_OF_A_BYTE)


def main() -> None:
    """Run all cases and write what became of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--part", type=int, default=0, help="every PARTS-th case from this one")
    parser.add_argument("--parts", type=int, default=1)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    passed, failures = 0, []
    for name, run in itertools.islice(all_cases(device, args.small), args.part, None, args.parts):
        try:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            # Any error is this case's result. A broken CUDA context fails the rest too, by name.
            traceback.print_exc()
            failures.append(f"{name}: {type(error).__name__}: {str(error).strip()[:300]}")
        else:
            passed += 1
        found = {"device": str(device), "passed": passed, "failures": failures}
        args.result.write_text(json.dumps({**found, "package": rkv_vllm.__file__}))


def all_cases(device: torch.device, small: bool) -> Iterator[Run]:
    """Names and runs of all cases; small ones for an interpreter."""
    yield from _ragged(device, small)
    yield from _long(device, small)
    yield from _adversarial(device, small)
    yield from _selections(device, small)
    yield from _compactions(device, small)
    yield from _observations(device)
    yield from _steps(device)


def _ragged(device: torch.device, small: bool) -> Iterator[Run]:
    """All dtypes, groups, head sizes and layouts, in ragged batches of odd sizes."""
    lengths = [(385, 388, 256), (63, 63, 40), (1152, 1153, 1024), (300, 307, 9, 150)]
    groups, head_sizes = (1, 3, 4, 8), (32, 64, 80, 96, 128)
    if small:
        lengths, groups, head_sizes = [(70, 73, 30), (73, 73, 9, 40)], (3,), (80,)
    options = list(itertools.product(groups, head_sizes))
    for number, (dtype, layout, (group, head_size)) in enumerate(
        itertools.product(CACHE_DTYPES, PLAIN, options)
    ):
        # Every dtype with every layout, and over them the groups and head sizes in turn.
        if not small and number % 4:
            continue

        def run(dtype=dtype, layout=layout, group=group, head_size=head_size) -> None:
            case = new_case(lengths, layout=layout, head_size=head_size, dtype=dtype, group=group)
            _check_whole(case, device)

        yield f"whole {dtype} {layout} group {group} d {head_size}", run


def _long(device: torch.device, small: bool) -> Iterator[Run]:
    """Sizes around tiles, alone in their batch."""
    sizes = (10, 65, 129) if small else (10, 63, 64, 65, 100, 1023, 1025, 2000, 4097)
    for n in sizes:

        def run(n=n) -> None:
            heads = {"num_layers": 1, "num_heads": 2}
            case = new_case([(n, n + 2, 9)], dtype=torch.bfloat16, group=4, head_size=128, **heads)
            _check_whole(case, device)

        yield f"whole n {n}", run


def _adversarial(device: torch.device, small: bool) -> Iterator[Run]:
    heads = {"num_layers": 1, "num_heads": 2}
    for kind in ADVERSARIAL[:2] if small else ADVERSARIAL:

        def run(kind=kind) -> None:
            case = new_case([(96, 96, 30)], head_size=128, **heads)
            keys = adversarial_keys(kind, 96, 128).expand(1, 2, -1, -1)
            case.states.write(case.batch.old_block_table[0], keys)
            expected = rkv_scores(case, NAIVE)
            moved = _moved(case, device)
            got = rkv_scores(moved, triton_ops(moved.states)).cpu()
            torch.testing.assert_close(got, expected, **SCORE_TOLERANCE)

        yield f"score {kind} keys", run


def _selections(device: torch.device, small: bool) -> Iterator[Run]:
    for m in (7, 65) if small else (1, 7, 63, 1023, 1024, 1025, 4097):

        def run(m=m) -> None:
            counts = sorted({1, (m + 1) // 2, m})
            evictions = [Eviction([], [], m + 2, m + 2, count + 2) for count in counts]
            shape = (len(counts), 6, m)
            ties = torch.randint(-1, 2, shape) * 0.5
            for scores in (ties, torch.randn(shape) * 1e-3):
                expected = select_naive(scores, EvictionBatch.of(evictions, 2, "cpu"))
                got = select_triton(scores.to(device), EvictionBatch.of(evictions, 2, device))
                assert torch.equal(got.cpu(), expected)

        yield f"select m {m}", run


def _compactions(device: torch.device, small: bool) -> Iterator[Run]:
    lengths = [(150, 153, 70), (70, 70, 70), (90, 95, 9, 50)]
    if not small:
        lengths.append((2000, 2001, 1024))
    for layout, dtype, fresh in itertools.product(
        PLAIN, CACHE_DTYPES, ("in place", "all fresh", "first fresh")
    ):
        if small and (layout, fresh) not in ((PLAIN[0], "in place"), (PLAIN[2], "first fresh")):
            continue

        def run(layout=layout, dtype=dtype, fresh=fresh) -> None:
            case = new_case(lengths, layout=layout, dtype=dtype, fresh=fresh, head_size=80)
            keep = random_keep(case.batch, case.states.num_layers * case.states.num_heads)
            moved = _moved(case, device)
            states, batch = moved.states, moved.batch
            new = {i for eviction in batch.evictions for i in eviction.new_block_ids}
            others = [i for i in range(states.num_blocks) if i not in new]
            before = states.cells[:, others].clone()
            compact_triton(states, batch, keep.to(device))
            _assert_compacted(case, states, batch, keep)
            torch.testing.assert_close(
                states.cells[:, others], before, rtol=0, atol=0, equal_nan=True
            )

        yield f"compact {layout} {dtype} {fresh}", run


def _observations(device: torch.device) -> Iterator[Run]:
    for dtype, heads, head_size in itertools.product(CACHE_DTYPES, (3, 32), (64, 80)):

        def run(dtype=dtype, heads=heads, head_size=head_size) -> None:
            is_fp8 = dtype in FLOATS_OF_A_BYTE
            # The interpreter cuts where it should round.
            of_ring = torch.float32 if is_fp8 and device.type == "cpu" else torch.bfloat16
            shape, of_ring = (4, 3, 10, heads, head_size), of_ring if is_fp8 else dtype
            pools = [torch.full(shape, 7.0, dtype=of_ring) for _ in range(2)]
            scale = torch.tensor([0.37]) if is_fp8 else None
            # As attention gets it: a slice of the fused projection.
            query = torch.randn(20, 3, heads, head_size).to(dtype)[:, 0]
            rows = torch.full((24,), -1, dtype=torch.int32)
            rows[[1, 5, 19]] = torch.tensor([3, 17, 39], dtype=torch.int32)
            observe_naive(pools[0], 1, query, rows, scale)
            on_device = pools[1].to(device)
            wide = torch.empty(20, 3, heads, head_size, dtype=dtype, device=device)
            wide[:, 0] = query.to(device)
            moved_scale = None if scale is None else scale.to(device)
            observe_triton(on_device, 1, wide[:, 0], rows.to(device), moved_scale)
            assert torch.equal(on_device.cpu(), pools[0])

        yield f"observe {dtype} heads {heads} d {head_size}", run


def _steps(device: torch.device) -> Iterator[Run]:
    def run() -> None:
        rows = StepRows(
            state_idx=torch.tensor([2, 0, -1]),
            query_start_loc=torch.tensor([0, 1, 13, 14], dtype=torch.int32),
            num_evicted=torch.tensor([5, 0, 40], dtype=torch.int32),
            seats=torch.tensor([1, -1, 0], dtype=torch.int32),
            ring_len=10,
        )
        positions = torch.cat([torch.tensor([99]), torch.arange(30, 42), torch.tensor([0])])
        table = torch.randperm(30, dtype=torch.int32).view(3, 10)
        found = []
        for function, where in ((slots_naive, "cpu"), (slots_triton, device)):
            out = StepSlots(
                torch.full((40,), 9, device=where),
                torch.full((40,), 9, dtype=torch.int32, device=where),
                torch.full((6,), 9, dtype=torch.int32, device=where),
            )
            tensors = {n: getattr(rows, n).to(where) for n in _STEP_TENSORS}
            step = StepRows(**tensors, ring_len=rows.ring_len)
            function(step, positions.to(where), table.to(where), 16, out)
            found.append([out.slot_mapping.cpu(), out.token_rows.cpu(), out.seq_lens.cpu()])
        for got, expected in zip(*found, strict=True):
            assert torch.equal(got, expected)

    yield "slots of a padded step", run


_STEP_TENSORS = ("state_idx", "query_start_loc", "num_evicted", "seats")


def _check_whole(case: Case, device: torch.device) -> None:
    """Score, select and compact on the device, each against naive."""
    expected = rkv_scores(case, NAIVE)
    moved = _moved(case, device)
    scores = rkv_scores(moved, triton_ops(moved.states))
    assert_same_scores(scores.cpu(), expected, case.batch)
    keep = select_triton(scores, moved.batch)
    assert_equivalent_choice(keep.cpu(), expected, case.batch)
    compact_triton(moved.states, moved.batch, keep)
    _assert_compacted(case, moved.states, moved.batch, keep.cpu())


def _assert_compacted(case: Case, states: PagedStates, batch: EvictionBatch, keep: Tensor) -> None:
    for i, eviction in enumerate(batch.evictions):
        after = states.numbers(batch.new_block_table[i], eviction.new_len).cpu()
        assert torch.equal(after, case.kept_and_tail(keep, i))


def _moved(case: Case, device: torch.device) -> Case:
    """The same case on the device, its cache with the same strides."""
    blocks = case.states.blocks
    # A copy of the view alone would be contiguous.
    memory = blocks.new_empty(0).set_(blocks.untyped_storage()).clone().to(device)
    view = memory.as_strided(blocks.shape, blocks.stride(), blocks.storage_offset())
    quantisation = case.states.quantisation
    if quantisation is not None:
        quantisation = replace(quantisation, scale=quantisation.scale.to(device))
    states = PagedStates(view, case.states.packing, case.states.block_size, quantisation)
    batch = EvictionBatch.of(case.batch.evictions, case.batch.window, device)
    return replace(case, states=states, batch=batch, queries=case.queries.to(device))


if __name__ == "__main__":
    main()
