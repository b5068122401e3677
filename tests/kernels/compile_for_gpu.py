"""Compiles every Triton kernel, as its launcher launches it, for an H100; needs no GPU.

A program of its own: the tests' process interprets kernels and can compile none. Prints a line
"compiled NAME FILES" per kernel, "NAME+VARIANT" where it has variants, and "reused NAME" when
another flush of the same engine, with other lengths and other requests, needs no second
compilation.
"""

from collections.abc import Iterator
from typing import Any

import torch
from triton import compile as compile_kernel
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

from rkv_vllm.kernels import tiles
from rkv_vllm.kernels.batch import Eviction, EvictionBatch
from rkv_vllm.kernels.compact.triton import compact_both_triton, compact_triton
from rkv_vllm.kernels.observe.triton import observe_triton
from rkv_vllm.kernels.paged import FLOATS_OF_A_BYTE, PagedStates, Quantisation
from rkv_vllm.kernels.rkv.triton import importance_triton, redundancy_triton, rkv_scores_triton
from rkv_vllm.kernels.select.triton import select_triton
from rkv_vllm.kernels.slots import StepRows, StepSlots
from rkv_vllm.kernels.slots.triton import slots_triton
from rkv_vllm.kernels.vase.triton import attention_triton, channel_range_triton
from tests.kernels.cases import new_case, random_keep

# A kernel, its positional arguments and the others.
Launch = tuple[JITFunction, tuple, dict[str, Any]]

H100 = GPUTarget("cuda", 90, 32)
# Arguments that make another kernel of the same function.
VARIANTS = ("IMPORTANCE", "REDUNDANCY", "ADD", "DEFENSIVE", "CENTER", "BOTH")
# Dtypes of a cache, and whether the GPU reads fp8 by itself.
CACHES = (
    (torch.bfloat16, True),
    (torch.float8_e4m3fn, True),
    (torch.float8_e4m3fn, False),
    (torch.float8_e5m2, False),
)
BACKEND = backends["nvidia"].compiler(H100)


def main() -> None:
    done = set()
    for dtype, native in CACHES:
        tiles.has_fp8 = lambda device, native=native: native
        for first, second in zip(*launches_of_two_flushes(dtype), strict=True):
            kernel, specialization = first[0], specialize(*first)
            name = full_name(kernel, first[2])
            if name in done:
                continue
            done.add(name)
            print("compiled", name, *sorted(compile_for(kernel, specialization).asm), flush=True)
            if specialization == specialize(*second):
                print("reused", name, flush=True)


def launches_of_two_flushes(dtype: torch.dtype) -> tuple[list[Launch], list[Launch]]:
    """What a cache of this dtype launches in a flush and a step, and in others."""
    launches = recorded_launches()
    model = {"head_size": 128, "dtype": dtype, "group": 4, "num_heads": 8}
    case = new_case([(100, 103, 50)], num_layers=4, **model)
    launch_all(case.states, case.batch, case.queries)
    launch_step(case.queries, layer_idx=0, num_tokens=1, dtype=dtype)
    num_first = len(launches)
    other = new_case([(90, 90, 40), (132, 132, 96, 20), (17, 17, 16)], num_layers=4, **model)
    first_layer = slice(0, 1)
    part = other.batch.part(slice(1, 3))
    launch_all(other.states.layers(first_layer), part, other.queries[:, first_layer])
    launch_step(case.queries, layer_idx=3, num_tokens=7, dtype=dtype)
    return launches[:num_first], launches[num_first:]


def compiled_launches(dtype: torch.dtype, only: str = "") -> Iterator[tuple[str, Any]]:
    """Names and machine code of what a compaction of an 8B-shaped model launches.

    Args:
        dtype: of the cache.
        only: kernels whose name contains this.
    """
    launches = recorded_launches()
    tiles.has_fp8 = lambda device: True
    # What vLLM takes on a GPU: blocks of 16 tokens, all heads of a token side by side.
    is_fp8 = dtype in FLOATS_OF_A_BYTE
    stored = torch.uint8 if is_fp8 else dtype
    cells = torch.zeros(4, 40, 16, 8, 256, dtype=stored).transpose(2, 3)
    quantisation = Quantisation(dtype, torch.ones(4, 8)) if is_fp8 else None
    states = PagedStates(cells[..., :128], None, 16, quantisation)
    batch = EvictionBatch.of(
        [Eviction([*range(7)], [*range(7)], 100, 103, 50, 0, 0, 100)], 8, "cpu"
    )
    of_queries = torch.bfloat16 if is_fp8 else dtype
    launch_all(states, batch, torch.zeros(1, 4, 11, 32, 128, dtype=of_queries))
    done = set()
    for kernel, args, kwargs in launches:
        name = full_name(kernel, kwargs)
        if name not in done and only in name:
            done.add(name)
            yield name, compile_for(kernel, specialize(kernel, args, kwargs))


def recorded_launches() -> list[Launch]:
    """A list that every launch from now on is added to instead of being run."""
    launches: list[Launch] = []
    JITFunction.run = lambda kernel, *args, grid, warmup, **kwargs: launches.append(
        (kernel, args, kwargs)
    )
    return launches


def full_name(kernel: JITFunction, kwargs: dict[str, Any]) -> str:
    """Of the kernel and its variant; E4M3 and E5M2 where it reads bytes."""
    fp8 = [("E4M3", "E5M2", "NATIVE")[kwargs["FP8"] - 1]] if kwargs.get("FP8") else []
    variants = (key for key in VARIANTS if kwargs.get(key))
    return "+".join([kernel.__name__, *fp8, *variants])


def launch_all(states: PagedStates, batch: EvictionBatch, queries: torch.Tensor) -> None:
    # As slices of what all layers have: the address is a multiple of 16 only by chance.
    of_layers = [torch.ones(8)[8 - states.num_layers :] for _ in range(2)]
    for changed in (False, True):
        both = {"lam": 0.1, "threshold": 0.5, "center": changed}
        own = (states, batch, queries, *of_layers)
        scores = rkv_scores_triton(*own, pool=7, defensive=changed, **both)
        importance_triton(*own, pool=7, defensive=changed)
    redundancy_triton(states, batch, threshold=0.5)
    attention_triton(states, batch, queries, *of_layers, pool=5)
    channel_range_triton(states, batch)
    select_triton(scores, batch)
    keep = random_keep(batch, states.num_layers * states.num_heads)
    compact_triton(states, batch, keep)
    # Of a real cache these lie in the same blocks.
    compact_both_triton(states, states, batch, keep)


def launch_step(pool: torch.Tensor, layer_idx: int, num_tokens: int, dtype: torch.dtype) -> None:
    """What every step launches: slots once, observe per layer, of queries of this dtype."""
    int32 = {"dtype": torch.int32}
    table = torch.zeros(16, 8, **int32)
    rows = StepRows(
        torch.zeros(num_tokens, dtype=torch.int64),
        torch.zeros(num_tokens + 1, **int32),
        torch.zeros(16, **int32),
        torch.zeros(16, **int32),
        ring_len=pool.shape[2],
    )
    out = StepSlots(torch.zeros(64, dtype=torch.int64), torch.zeros(64, **int32), table[:, 0])
    slots_triton(rows, torch.zeros(64, dtype=torch.int64), table, 16, out)
    query = torch.zeros(num_tokens, 3, *pool.shape[3:], dtype=dtype)[:, 0]
    query_scale = torch.ones(1) if dtype in FLOATS_OF_A_BYTE else None
    observe_triton(pool, layer_idx, query, out.token_rows, query_scale)


def compile_for(kernel: JITFunction, specialization: tuple[Any, ...]) -> Any:
    """What Triton compiles for an H100 there."""
    options, *rest = specialization
    return compile_kernel(ASTSource(kernel, *rest), target=H100, options=options)


def specialize(kernel: JITFunction, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Options, types, constants and divisibilities that Triton compiles this launch for."""
    bind = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
    bound, specialization, _ = bind(*args, **kwargs)
    options, *rest = kernel._pack_args(BACKEND, kwargs, bound, specialization, kwargs)
    return options.__dict__, *rest


if __name__ == "__main__":
    main()
