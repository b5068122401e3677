"""A workload and results of runs as the checks and the report get them."""

from typing import Any

from rkv_vllm.bench.sides import Side
from rkv_vllm.bench.workload import Workload

SIDES = (Side(None, ()), Side(64, ("--kv-budget=64",), when="always"))
PROBE = [[11, 12], [13, 14], [15, 16]]


def new_workload(**changes: Any) -> Workload:
    """Two requests, each compacted 3 times with a budget of 64: due at 96, 128 and 160 tokens."""
    fields = {
        "model": "folder/of/model",
        "prompts": ("one", "two"),
        "prompt_lens": (20, 30),
        "probe_lens": (5, 6, 7),
        "output_lens": (150, 150),
        "buffer": 32,
        "pool_tokens": 512,
        "block_size": 32,
        "bytes_per_token": 1024,
        "element_bytes": 4,
        "dtype": "float32",
        "seed": 0,
        "request_rate": float("inf"),
        "max_concurrency": None,
    }
    return Workload(**{**fields, **changes})


def new_result(side: Side, repeat: int = 1, **changes: Any) -> dict[str, Any]:
    """What a run of `new_workload()` gives when all is well."""
    compressed = side.budget is not None
    fields = {
        "mode": "offline",
        "side": side.name,
        "budget": side.budget,
        "when": side.when,
        "pool_tokens": side.pool_tokens,
        "is_exact": side.is_exact,
        "repeat": repeat,
        "start_seconds": 9.0,
        "seconds": 3.0,
        "tokens_per_s": 150.0 if compressed else 100.0,
        "prompt_lens": [20, 30],
        "output_lens": [150, 150],
        "running_mean": 1.9 if compressed else 1.2,
        "running_peak": 2,
        "preemptions": 0 if compressed else 1,
        "peak_blocks": 8 if compressed else 16,
        "engines": 1,
        "pool_blocks": 16,
        "compactions": 6 if compressed else 0,
        "deferred": 0,
        "ttft_ms": {"p50": 41.0, "p99": 997.0},
        "itl_ms": {"p50": 13.0, "p99": 57.0},
        "probe": PROBE,
    }
    return {**fields, **changes}


def new_results(repeats: int = 1, **changes_of_compressed: Any) -> list[dict[str, Any]]:
    """Both sides, the compressed one with changes."""
    stock, compressed = SIDES
    results = []
    for repeat in range(1, repeats + 1):
        results.append(new_result(compressed, repeat, **changes_of_compressed))
        results.append(new_result(stock, repeat))
    return results
