"""Times a compaction and its operations: ours, the naive version, and the released formulation.

Checks every version first, then times them in turns; where a check fails no speed-up is printed and
the exit code is 1. Also counts memory beyond the inputs, the pairs of keys that the search for
similar keys visits, and the bytes moved against the machine's copy bandwidth. Runs on the GPU when
there is one, else on the CPU. Prints a card, tables, and on the last line one JSON document. The
versions are in kernel_versions.py, the inputs in kernel_cases.py.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measure
import torch
from kernel_cases import KINDS, WINDOW, Shape, Workload, new_keys, new_workload, real_keys
from kernel_tables import print_card, print_case, print_observe, print_pairs
from kernel_versions import (
    OBSERVED_TOKENS,
    OBSERVED_WATCHED,
    check,
    naive,
    observe_versions,
    ours,
    released,
    released_dtype,
)
from pairs_visited import TILES, share_visited, similar_and_newest
from released_formulation import bytes_per_head
from torch import Tensor

from rkv_vllm.kernels.ops import ops_for

MODEL = measure.ROOT / ".models" / "SmolLM2-135M-Instruct"
# Length -> tokens kept. The last is a long prompt's first compaction.
BUDGETS = {384: 256, 1152: 1024, 4224: 4096, 32768: 1024}
# Layers that keep the default run on two cores below four minutes; a GPU takes all 32.
CPU_LAYERS = {384: 8, 1152: 4, 4224: 1, 32768: 1}
GPU_LAYERS = 32
# Operation -> share of a case's time; ratios are made of the last.
SHARES_OF_TIME = {"score": 0.3, "select": 0.1, "compact": 0.1, "whole": 0.5}
# Counting pairs looks at all of them.
LONGEST_COUNTED = 4224
REAL_TOKENS = 640
QUERY_HEADS_PER_KV_HEAD = 4
# Beyond every processor's cache.
COPIED_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}


@dataclass(frozen=True)
class Settings:
    """What one run does.

    Attributes:
        device: where.
        dtype: of the caches.
        shapes: the compactions.
        seconds: for the rounds of timing of each compaction.
        memory_limit: bytes that the n x n version may take.
        longest_naive: tokens beyond which the naive version is left out.
        model: checkpoint for real keys, None = none.
    """

    device: torch.device
    dtype: torch.dtype
    shapes: list[Shape]
    seconds: float
    memory_limit: int
    longest_naive: int
    model: Path | None


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for; the exit code is 1 when a check fails."""
    settings = parse(argv)
    card = measure.card(settings.device)
    bandwidth = measure.copy_bandwidth(settings.device, COPIED_BYTES[settings.device.type])
    card["copy_gb_per_s"] = round(bandwidth / 1e9, 1)
    print_card(card)
    cases = []
    for number, shape in enumerate(settings.shapes, 1):
        tell(f"{number}/{len(settings.shapes)}: {shape.num_tokens} tokens, d {shape.head_size}")
        cases.append(run_case(shape, settings, bandwidth))
        print_case(cases[-1])
    observed = [run_observe(*key, settings) for key in sorted(_observed_shapes(settings))]
    print_observe(observed)
    pairs = count_pairs(settings)
    print_pairs(pairs)
    failed = sorted({name for case in [*cases, *observed] for name in case["failed_checks"]})
    if failed:
        print("FAILED: " + "; ".join(failed))
    document = {
        "card": card,
        "cases": cases,
        "observe": observed,
        "pairs_visited": pairs,
        "failed_checks": failed,
    }
    print(json.dumps(document))
    sys.exit(bool(failed))


def parse(argv: Sequence[str] | None) -> Settings:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: .venv/bin/python benchmarks/bench_kernels.py --lengths 1152",
    )
    on_gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--device", default="cuda" if on_gpu else "cpu", choices=list(COPIED_BYTES))
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    add("--lengths", type=int, nargs="+", default=list(BUDGETS), help="tokens per request")
    add("--head-sizes", type=int, nargs="+", default=[64, 128])
    add("--layers", type=int, help="compacted at once (default: 32; on a CPU 1 to 8, by length)")
    add("--kv-heads", type=int, default=8, help="of a layer (default: 8)")
    add("--requests", type=int, nargs="+", default=[1], help="compacted at once (default: 1)")
    add("--seconds", type=float, default=6.0, help="of timing per compaction (default: 6)")
    add(
        "--memory-limit-gib",
        type=float,
        default=8.0 if on_gpu else 4.0,
        help="for the n x n version (default: 8, about what vLLM leaves free; on a CPU 4)",
    )
    add("--model", type=Path, default=MODEL, help="for real keys (default: SmolLM2)")
    add("--no-model", action="store_true", help="leave real keys out")
    add("--longest-naive", type=int, default=1 << 30, help="tokens; longer, naive is left out")
    add("--full", action="store_true", help="32 layers on a CPU too; takes an hour")
    add("--smoke", action="store_true", help="one tiny compaction; the times mean nothing")
    args = parser.parse_args(argv)
    if args.smoke:
        args.lengths, args.head_sizes, args.layers, args.kv_heads = [96], [64], 1, 2
        args.seconds, args.no_model = 0.1, True
    if not args.no_model and not args.model.is_dir():
        parser.error(f"--model {args.model} is no folder; run `make model` or pass --no-model")
    if args.device == "cuda" or args.full:
        args.layers = args.layers or GPU_LAYERS
    return Settings(
        device=torch.device(args.device),
        dtype=getattr(torch, args.dtype),
        shapes=_shapes(args),
        seconds=args.seconds,
        memory_limit=int(args.memory_limit_gib * 2**30),
        longest_naive=args.longest_naive,
        model=None if args.no_model else args.model,
    )


def _shapes(args: argparse.Namespace) -> list[Shape]:
    return [
        Shape(
            num_tokens=n,
            budget=BUDGETS.get(n, max(WINDOW + 1, 2 * n // 3)),
            head_size=d,
            num_layers=args.layers or CPU_LAYERS.get(n, 1),
            num_requests=requests,
            num_heads=args.kv_heads,
            group=QUERY_HEADS_PER_KV_HEAD,
        )
        for requests in args.requests
        for d in args.head_sizes
        for n in args.lengths
    ]


def tell(message: str) -> None:
    """Progress, beside the results."""
    print(message, file=sys.stderr, flush=True)


def run_case(shape: Shape, settings: Settings, bandwidth: float) -> dict[str, Any]:
    """Check, time and weigh every version of one compaction."""
    work = new_workload(shape, "clustered", settings.dtype, settings.device)
    of_one_head = bytes_per_head(shape.num_tokens, released_dtype(work))
    heads_at_once = min(settings.memory_limit // of_one_head, shape.total_heads)
    versions = {"ours": ours(work)}
    if shape.num_tokens <= settings.longest_naive:
        versions["naive"] = naive(work)
    if heads_at_once:
        versions["released"] = released(work, heads_at_once)
        # Its matrix may stay in a CPU's cache then.
        versions["released, by head"] = released(work, 1)
    checks = check(work, versions)
    times = {
        operation: measure.interleaved(
            {name: version[operation] for name, version in versions.items()},
            settings.device,
            share * settings.seconds,
        )
        for operation, share in SHARES_OF_TIME.items()
    }
    memory = {
        name: measure.peak_extra_bytes(version["whole"], settings.device)
        for name, version in versions.items()
    }
    return {
        **asdict(shape),
        "keys": "clustered",
        "kernels": ops_for(work.keys).name,
        "checks": checks,
        "failed_checks": [n for n, found in checks.items() if not found.startswith(("ok", "not"))],
        "milliseconds": {
            operation: {name: q._asdict() for name, q in by_version.items()}
            for operation, by_version in times.items()
        },
        "kernel_microseconds": measure.kernel_microseconds(
            versions["ours"]["whole"], settings.device
        ),
        "peak_extra_bytes": memory,
        "released_heads_at_once": heads_at_once,
        "released_bytes_per_head": of_one_head,
        "memory_limit": settings.memory_limit,
        **_compared(work, checks, times["whole"], memory, bandwidth),
    }


def _compared(
    work: Workload,
    checks: dict[str, str],
    times: dict[str, measure.Quantiles],
    memory: dict[str, int | None],
    bandwidth: float,
) -> dict[str, Any]:
    """Ratios to the other versions and to the machine; None where a check failed."""
    moved = work.shape.bytes_moved(work.keys.dtype)
    floor_ms = 1e3 * moved / bandwidth
    others = [name for name in times if name != "ours"]
    found: dict[str, Any] = {"bytes_moved": moved, "copy_floor_ms": floor_ms}
    if any(not verdict.startswith(("ok", "not checked")) for verdict in checks.values()):
        return {**found, "times_copy_floor": None, "speedup": None, "memory_share": None}
    return {
        **found,
        "times_copy_floor": times["ours"].p50 / floor_ms,
        "speedup": {name: times[name].p50 / times["ours"].p50 for name in others},
        "memory_share": {
            name: memory["ours"] / memory[name] for name in others if memory.get(name)
        },
    }


def _observed_shapes(settings: Settings) -> set[tuple[int, int]]:
    return {(shape.head_size, shape.num_heads * shape.group) for shape in settings.shapes}


def run_observe(head_size: int, num_heads: int, settings: Settings) -> dict[str, Any]:
    """Check and time the recording of one layer's queries in one step."""
    runs, is_right = observe_versions(head_size, num_heads, settings.dtype, settings.device)
    times = measure.interleaved(runs, settings.device, 0.2 * settings.seconds, most=1000)
    return {
        "head_size": head_size,
        "num_heads": num_heads,
        "tokens": OBSERVED_TOKENS,
        "watched": OBSERVED_WATCHED,
        "milliseconds": {name: q._asdict() for name, q in times.items()},
        "failed_checks": [] if is_right else ["observe"],
    }


def count_pairs(settings: Settings) -> list[dict[str, Any]]:
    """Share of pairs that the search visits on random, clustered and real keys, centred or not."""
    generator = torch.Generator(settings.device).manual_seed(1)
    sizes = sorted({(s.head_size, s.num_tokens) for s in settings.shapes})
    counted = [
        (kind, new_keys(kind, (1, 2, n, d), generator))
        for kind in KINDS
        for d, n in sizes
        if n <= LONGEST_COUNTED
    ]
    if settings.model is not None:
        tell(f"real keys: generating {REAL_TOKENS} tokens with {settings.model.name} ...")
        counted.append(("real", real_keys(settings.model, REAL_TOKENS)))
    # As R-KV's option `center` sees them.
    counted += [
        (f"{kind}, centred", keys - keys.mean(dim=2, keepdim=True)) for kind, keys in counted
    ]
    return [pairs_of(kind, keys) for kind, keys in counted]


def pairs_of(kind: str, keys: Tensor) -> dict[str, Any]:
    """Means over all heads of keys [layers, heads, n, head_size]."""
    counted = [similar_and_newest(head) for head in keys.flatten(0, 1)]
    similar = [share for share, _ in counted]
    return {
        "keys": kind,
        "num_tokens": keys.shape[2],
        "head_size": keys.shape[3],
        "heads": len(counted),
        "similar": statistics.mean(similar),
        "similar_range": [min(similar), max(similar)],
        "visited": {
            name: statistics.mean(share_visited(newest, tile) for _, newest in counted)
            for name, tile in TILES.items()
        },
    }


if __name__ == "__main__":
    main()
