"""What a flush and the recording of queries cost the host, for the layers of an 8B.

Thread CPU time, so that a busy machine changes little; the device is not waited for. Runs on any
device that torch calls "cuda". Prints one line per number and, last, one JSON document.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

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
FLUSHES, ROUNDS = (1, 8, 28), 30
# Aims of a flush of so many requests, and of recording in one layer, in microseconds.
AIMS = {1: 250, 28: 700, "observe": 5}


def main() -> None:
    """Time flushes of several sizes and one layer's recording."""
    device = torch.device("cuda")
    compactor, layer_set, directives = make_compactor(max(FLUSHES), device)
    compactor.warm_up()
    found: dict[str, float] = {}
    for number in FLUSHES:
        found[f"flush of {number}"] = cpu_microseconds(
            lambda number=number: _flush(compactor, directives[:number])
        )
    query = torch.zeros(256, 32, 128, dtype=torch.bfloat16, device=device)
    found["observe"] = cpu_microseconds(lambda: layer_set.ring.record(3, query), rounds=300)
    for name, microseconds in found.items():
        print(f"{name:12} {microseconds:8.1f} us of the host")
    print(json.dumps({"device": torch.cuda.get_device_name(), "microseconds": found}))


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
    """Least CPU time of this thread, which other work disturbs least; the queue to the device is drained in between."""
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
