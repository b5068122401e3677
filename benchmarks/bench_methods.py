"""Times how long each method takes to score a flush, beside R-KV with the kernels of this device.

A method that has kernels is checked against the same method on the naive ones first; where that
fails its times are left out and the exit code is 1. Also counts torch's operations of one scoring:
on a GPU each is a launch at least, whatever its size. Prints a card, a table per compaction, and on
the last line one JSON document. The inputs are in kernel_cases.py.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, NamedTuple

import measure
import torch
from kernel_cases import Shape, Workload, new_workload
from kernel_tables import print_card, print_table

# The tests hold the only definition of "equal".
sys.path.append(str(Path(__file__).resolve().parent.parent))

from rkv_vllm.kernels.ops import Ops, naive_ops, ops_for
from rkv_vllm.methods import Method, get_method
from rkv_vllm.methods.query_statistics import QueryStatistics
from tests.kernels.cases import TorchCalls, assert_same_scores


class Entry(NamedTuple):
    """What is timed.

    Attributes:
        name: how the table calls it.
        method: registered name.
        options: other than the defaults.
    """

    name: str
    method: str
    options: Mapping[str, Any] = MappingProxyType({})


BASE = Entry("rkv", "rkv")
ENTRIES = (
    BASE,
    Entry("rkv, center", "rkv", {"center": True}),
    Entry("rkv, defensive", "rkv", {"defensive": True}),
    Entry("snapkv", "snapkv"),
    Entry("keydiff", "keydiff"),
    Entry("knorm", "knorm"),
    Entry("random", "random"),
    Entry("vase", "vase"),
)
SHAPES = {
    "tiny": Shape(96, 64, 64, num_layers=1, num_heads=2),
    "long": Shape(1152, 1024, 128, num_layers=4),
    # Qwen2.5-1.5B.
    "qwen": Shape(256, 160, 128, num_layers=28, num_requests=32, num_heads=2, group=6),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for; the exit code is 1 when a check fails."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: .venv/bin/python benchmarks/bench_methods.py --shapes qwen --windows 8 64",
    )
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--shapes", nargs="+", default=["long", "qwen"], choices=list(SHAPES))
    add("--windows", type=int, nargs="+", default=[8, 64], help="tokens (default: 8 64)")
    add("--requests", type=int, help="compacted at once (default: 1 long, 32 of qwen)")
    add("--seconds", type=float, default=10.0, help="of timing per table (default: 10)")
    add("--smoke", action="store_true", help="one tiny compaction; the times mean nothing")
    args = parser.parse_args(argv)
    if args.smoke:
        args.shapes, args.windows, args.seconds = ["tiny"], [8], 0.1
    device = torch.device(args.device)
    card = measure.card(device)
    print_card(card)
    tables = []
    for name in args.shapes:
        for window in args.windows:
            shape = replace(SHAPES[name], window=window)
            if args.requests:
                shape = replace(shape, num_requests=args.requests)
            print(f"{name}, window {window} ...", file=sys.stderr, flush=True)
            with TemporaryDirectory() as folder:
                entries = [*ENTRIES, triattention(shape, Path(folder))]
                tables.append(run_shape(shape, entries, device, args.seconds))
            print_shape(tables[-1])
    failed = sorted({name for table in tables for name in table["failed_checks"]})
    if failed:
        print("FAILED: " + "; ".join(failed))
    print(json.dumps({"card": card, "tables": tables, "failed_checks": failed}))
    sys.exit(bool(failed))


def triattention(shape: Shape, folder: Path) -> Entry:
    """With statistics of these layers; what they say costs no time."""
    query_heads = shape.num_heads * shape.group
    statistics = QueryStatistics(
        model="random",
        num_kv_heads=shape.num_heads,
        num_tokens=1,
        inv_freq=torch.rand(shape.head_size // 2),
        mean_query=torch.randn(shape.num_layers, query_heads, shape.head_size),
        mean_magnitude=2 + torch.rand(shape.num_layers, query_heads, shape.head_size // 2),
    )
    statistics.save(folder / "random.safetensors")
    options = {"statistics": str(folder / "random.safetensors")}
    return Entry("triattention", "triattention", options)


def run_shape(
    shape: Shape, entries: Sequence[Entry], device: torch.device, seconds: float
) -> dict[str, Any]:
    """Check and time all methods on one compaction."""
    work = new_workload(shape, "clustered", torch.bfloat16, device)
    ops = ops_for(work.keys, shape.window)
    methods = {entry.name: new_method(entry, work, ops) for entry in entries}
    checks = {entry.name: check(entry, methods[entry.name], work) for entry in entries}
    runs = {
        name: lambda method=method: method.score(work.heads, work.batch)
        for name, method in methods.items()
        if checks[name]
    }
    calls = {}
    for name, run in runs.items():
        with CountedCalls() as counted:
            run()
        calls[name] = counted.count
    times = measure.interleaved(runs, device, seconds)
    return {
        **asdict(shape),
        "kernels": ops.name,
        "failed_checks": [name for name, is_right in checks.items() if not is_right],
        "torch_calls": calls,
        "milliseconds": {name: q._asdict() for name, q in times.items()},
        "times_rkv": {name: q.p50 / times[BASE.name].p50 for name, q in times.items()}
        if BASE.name in times
        else {},
    }


class CountedCalls(TorchCalls):
    """How many operations of torch run that touch memory."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return super().__torch_dispatch__(func, types, args, kwargs)


def new_method(entry: Entry, work: Workload, ops: Ops) -> Method:
    """The method on these kernels."""
    cls = get_method(entry.method)
    return cls(cls.Options(**entry.options), work.model, ops)


def check(entry: Entry, method: Method, work: Workload) -> bool:
    """Whether its scores are those of the naive kernels, on the first request."""
    batch = work.batch.part(slice(0, 1))
    naive = new_method(entry, work, naive_ops(work.keys))
    try:
        assert_same_scores(
            method.score(work.heads, batch).cpu(), naive.score(work.heads, batch).cpu(), batch
        )
    except AssertionError:
        return False
    return True


def print_shape(table: dict[str, Any]) -> None:
    """Milliseconds, beside R-KV's, and calls of torch of one scoring."""
    print(
        f"\nn {table['num_tokens']}, d {table['head_size']}, window {table['window']}: "
        f"{table['num_requests']} request(s) x {table['num_layers']} layers x "
        f"{table['num_heads']} KV heads, group {table['group']}; kernels: {table['kernels']}"
    )
    rows = [["method", "ms p50 [p20, p80]", "x rkv", "calls"]]
    for name, quantiles in table["milliseconds"].items():
        ratio = table["times_rkv"].get(name)
        rows.append(
            [
                name,
                str(measure.Quantiles(**quantiles)),
                "-" if ratio is None else f"{ratio:.2f}",
                str(table["torch_calls"][name]),
            ]
        )
    print_table(rows)


if __name__ == "__main__":
    main()
