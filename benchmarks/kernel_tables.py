"""What the kernel benchmark prints for people; the JSON document holds the same numbers.

Plain print: machines with a GPU that bring vLLM need not have rich.
"""

from collections.abc import Sequence
from typing import Any

from measure import Quantiles


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell; the first one is flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        print("   ".join([first.ljust(widths[0]), *cells]))


def print_card(card: dict[str, Any]) -> None:
    """Machine and versions."""
    for name, value in card.items():
        print(f"{name:14} {value}")


def print_case(case: dict[str, Any]) -> None:
    """Milliseconds, memory and speed-up of one compaction."""
    print(
        f"\nn {case['num_tokens']}, budget {case['budget']}, d {case['head_size']}: "
        f"{case['num_requests']} request(s) x {case['num_layers']} layers x {case['num_heads']} "
        f"KV heads; kernels: {case['kernels']}, {case['keys']} keys"
    )
    versions = list(case["milliseconds"]["whole"])
    rows = [["ms p50 [p20, p80]", *versions]]
    for operation, times in case["milliseconds"].items():
        rows.append([operation, *(str(Quantiles(**times[version])) for version in versions)])
    memory = case["peak_extra_bytes"]
    rows.append(["peak extra memory", *(_mebibytes(memory[version]) for version in versions)])
    print_table(rows)
    if kernels := case["kernel_microseconds"]:
        by_time = sorted(kernels.items(), key=lambda item: -item[1])
        print("us in kernels: " + ", ".join(f"{name[:40]} {us:.1f}" for name, us in by_time))
    if not case["released_heads_at_once"]:
        print(
            f"n x n version: does not fit; one head alone needs "
            f"{case['released_bytes_per_head'] / 2**30:.1f} GiB, the limit is "
            f"{case['memory_limit'] / 2**30:.1f} GiB"
        )
    for name, verdict in case["checks"].items():
        if verdict != "ok":
            print(f"check of {name}: {verdict}")
    if case["failed_checks"]:
        print("no speed-up: " + ", ".join(case["failed_checks"]))
        return
    print(
        f"bytes {case['bytes_moved'] / 1e6:.1f} MB take {case['copy_floor_ms']:.3g} ms at copy "
        f"bandwidth; the whole compaction takes {case['times_copy_floor']:.1f} times that"
    )
    for name, speedup in case["speedup"].items():
        share = case["memory_share"].get(name)
        memory_text = f", with {share:.1%} of its memory" if share is not None else ""
        print(f"{speedup:.1f} x faster than {name}{memory_text}")


def print_observe(cases: list[dict[str, Any]]) -> None:
    """Milliseconds of recording the queries of one layer."""
    print("\nobserve, one layer of one step")
    for case in cases:
        times = ", ".join(f"{n} {Quantiles(**q)}" for n, q in case["milliseconds"].items())
        failed = "  FAILED" if case["failed_checks"] else ""
        print(
            f"d {case['head_size']}: {case['tokens']} tokens, {case['watched']} watched: "
            f"{times} ms{failed}"
        )


def print_pairs(pairs: list[dict[str, Any]]) -> None:
    """Shares of pairs that are similar and that the search visits."""
    if not pairs:
        return
    print("\npairs of keys, mean over heads")
    tiles = list(pairs[0]["visited"])
    rows = [["keys", "n", "d", "heads", "similar", *(f"visited, {tile} tiles" for tile in tiles)]]
    for row in pairs:
        counts = [str(row[name]) for name in ("num_tokens", "head_size", "heads")]
        shares = [row["similar"], *(row["visited"][tile] for tile in tiles)]
        rows.append([row["keys"], *counts, *(f"{share:.1%}" for share in shares)])
    print_table(rows)


def _mebibytes(num_bytes: int | None) -> str:
    return "not measured" if num_bytes is None else f"{num_bytes / 2**20:.1f} MiB"
