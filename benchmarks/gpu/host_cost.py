"""What a flush and the recording of queries cost the host, for the layers of an 8B.

Thread CPU time, so that a busy machine changes little; the device is not waited for. Runs on any
device that torch calls "cuda". Also counts the launches of a flush, and the kernels that are still
compiled after warm-up. Prints one line per number and, last, one JSON document.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kernel_cases import RING_LEN, WINDOW, Shape, new_workload

from rkv_vllm.kernels.ops import ops_for
from rkv_vllm.methods.rkv import RKV
from rkv_vllm.scheduling.directive import EvictionDirective, StepPlan
from rkv_vllm.worker.flush import Compactor
from rkv_vllm.worker.group import CompressedGroup
from rkv_vllm.worker.layer_set import LayerSet
from rkv_vllm.worker.lengths import GroupRows
from rkv_vllm.worker.query_ring import QueryRing

LAYERS, NUM_TOKENS, BUDGET = 32, 1152, 1024
FLUSHES, ROUNDS, RANDOM_FLUSHES = (1, 8, 28), 30, 60
# Aims of a flush of so many requests, and of recording in one layer, in microseconds.
AIMS = {1: 250, 28: 700, "observe": 5}


def main() -> None:
    """Time flushes of several sizes and one layer's recording."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    if not torch.cuda.is_available():
        sys.exit("host_cost.py: got no device that torch calls cuda; run it on a GPU")
    device = torch.device("cuda")
    compactor, layer_set, directives = make_compactor(max(FLUSHES), device)
    launched, compiled = count_launches(), count_compilations()
    compactor.warm_up()
    query = torch.zeros(256, 32, 128, dtype=torch.bfloat16, device=device)
    # Compiled by vLLM's own warm-up, in an engine.
    layer_set.ring.record(3, query)
    num_compiled = len(compiled)
    flush_at_random(compactor, directives)
    found: dict[str, float] = {}
    launches = {}
    for number in FLUSHES:
        launched.clear()
        _flush(compactor, directives[:number])
        launches[f"flush of {number}"] = list(launched)
        found[f"flush of {number}"] = cpu_microseconds(
            lambda number=number: _flush(compactor, directives[:number])
        )
    found["observe"] = cpu_microseconds(lambda: layer_set.ring.record(3, query), rounds=300)
    for name, microseconds in found.items():
        print(
            f"{name:12} {microseconds:8.1f} us of the host, {len(launches.get(name, [1]))} launches"
        )
    document = {
        "device": torch.cuda.get_device_name(),
        "microseconds": found,
        "launches": launches,
        "compiled_after_warm_up": compiled[num_compiled:],
    }
    print(json.dumps(document))


def count_launches() -> list[str]:
    """A list to which every launch of a Triton kernel adds the kernel's name."""
    launched: list[str] = []
    triton.knobs.runtime.launch_enter_hook = lambda lazy: launched.append(lazy.get()["name"])
    return launched


def count_compilations() -> list[str]:
    """A list to which every compilation of a Triton kernel adds the kernel's name."""
    compiled: list[str] = []

    def note(*, fn: Any, **_: Any) -> None:
        compiled.append(fn.name)

    triton.knobs.runtime.jit_post_compile_hook = note
    return compiled


def flush_at_random(compactor: Compactor, directives: list[EvictionDirective]) -> None:
    """Compact any number of requests of many lengths and budgets; what comes of it is not read."""
    draw = random.Random(0)
    for _ in range(RANDOM_FLUSHES):
        chosen = []
        for directive in directives[: draw.randint(1, len(directives))]:
            settled_len, prefix_len = draw.choice([33, 48, 640, 1040, 1152]), draw.choice([0, 5])
            budget = draw.randint(WINDOW, min(settled_len - 1, BUDGET) - prefix_len)
            lengths = {
                "prefix_len": prefix_len,
                "settled_len": settled_len,
                "total_len": settled_len,
                "num_evict": settled_len - prefix_len - budget,
            }
            chosen.append(replace(directive, **lengths))
        _flush(compactor, chosen)


def make_compactor(
    num_requests: int, device: torch.device
) -> tuple[Compactor, LayerSet, list[EvictionDirective]]:
    """A compactor with one group over a filled cache, and a directive per request."""
    shape = Shape(NUM_TOKENS, BUDGET, head_size=128, num_layers=LAYERS, num_requests=num_requests)
    work = new_workload(shape, "random", torch.bfloat16, device)
    ops = ops_for(work.keys, WINDOW)
    rows = GroupRows(num_requests, 8192, RING_LEN, device)
    ring = QueryRing(work.heads.queries, rows, ops.observe)
    layer_set = LayerSet(work.model, work.keys, work.values, ops, ring)
    group = CompressedGroup(
        0,
        work.keys.block_size,
        [layer_set],
        lambda layers, options: RKV(options or RKV.Options(), layers.model, layers.ops),
    )
    directives = [
        EvictionDirective(
            req_id=f"r{i}",
            group_id=0,
            num_evicted_before=0,
            prefix_len=0,
            settled_len=eviction.settled_len,
            total_len=eviction.total_len,
            num_evict=eviction.settled_len - eviction.budget,
            seat=eviction.seat,
            prompt_len=0,
            seed=0,
            method_options=None,
            old_block_ids=list(eviction.old_block_ids),
            new_block_ids=list(eviction.new_block_ids),
        )
        for i, eviction in enumerate(work.batch.evictions)
    ]
    return Compactor({0: group}, WINDOW), layer_set, directives


def cpu_microseconds(run: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Least CPU time of this thread, which other work disturbs least; the device is idle before."""
    samples = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        started = time.thread_time()
        run()
        samples.append(1e6 * (time.thread_time() - started))
    return min(samples)


def _flush(compactor: Compactor, directives: list[EvictionDirective]) -> None:
    compactor.begin_step(StepPlan(directives=list(directives)))
    compactor.flush()


if __name__ == "__main__":
    main()
