"""From the results of runs to medians, ratios, a table, and one JSON document.

Next: plot.py, which draws the document.
"""

from collections.abc import Sequence
from statistics import median
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rkv_vllm.bench.checks import Result, failed_checks
from rkv_vllm.bench.sides import STOCK, Side
from rkv_vllm.bench.workload import Workload

_WIDTH = 120
# Shown as medians over the runs of a side.
_COUNTS = ("running_mean", "running_peak", "preemptions", "peak_blocks", "compactions", "deferred")
_LATENCIES = ("ttft_ms", "itl_ms")


def make_document(
    card: dict[str, Any],
    workload: Workload,
    sides: Sequence[Side],
    repeats: int,
    results: Sequence[Result],
    failure: str | None,
) -> dict[str, Any]:
    """Returns the whole answer as plain JSON.

    Args:
        card: what the numbers depend on.
        workload: what was asked.
        sides: in the order of the tables.
        repeats: runs of every side that were asked for.
        results: of the runs that finished, in their order.
        failure: why not all runs finished, None when they did.
    """
    modes: dict[str, list[Result]] = {}
    for result in results:
        modes.setdefault(result["mode"], []).append(result)
    num_runs = repeats * len(sides)
    return {
        "card": card,
        "workload": {
            "num_prompts": len(workload.prompts),
            "prompt_lens": list(workload.prompt_lens),
            "output_len": workload.output_len,
            "pool_tokens": workload.pool_tokens,
            "block_size": workload.block_size,
            "max_model_len": workload.max_model_len,
            "budgets": [side.budget for side in sides if side.budget is not None],
            "buffer": workload.buffer,
            "dtype": workload.dtype,
            "seed": workload.seed,
            "repeats": repeats,
            # JSON knows no infinity; null: all at once.
            "request_rate": None
            if workload.request_rate == float("inf")
            else workload.request_rate,
            "max_concurrency": workload.max_concurrency,
        },
        "failure": failure,
        "results": [
            _mode_document(workload, sides, runs, None if len(runs) == num_runs else failure)
            for runs in modes.values()
        ],
    }


def _mode_document(
    workload: Workload,
    sides: Sequence[Side],
    runs: Sequence[Result],
    failure: str | None,
) -> dict[str, Any]:
    problems = failed_checks(workload, runs)
    if failure is not None:
        problems.append(failure)
    return {
        "mode": runs[0]["mode"],
        "sides": [_summary(side, of_side) for side in sides if (of_side := _of(side.name, runs))],
        "failed_checks": problems,
        "ratios": None if problems else _ratios(sides, runs),
        "runs": runs,
    }


def _of(side: str, runs: Sequence[Result]) -> list[Result]:
    return [run for run in runs if run["side"] == side]


def _summary(side: Side, runs: list[Result]) -> dict[str, Any]:
    speeds = [run["tokens_per_s"] for run in runs]
    summary = {
        "side": side.name,
        "budget": side.budget,
        "tokens_per_s": {"median": median(speeds), "min": min(speeds), "max": max(speeds)},
        "pool_blocks": runs[0]["pool_blocks"],
        **{name: median(run[name] for run in runs) for name in _COUNTS},
    }
    for name in _LATENCIES:
        if name in runs[0]:
            summary[name] = {p: median(run[name][p] for run in runs) for p in ("p50", "p99")}
    return summary


def _ratios(sides: Sequence[Side], runs: Sequence[Result]) -> dict[str, Any]:
    """Tokens per second over stock's, each run against the stock run of the same repeat."""
    stock = {run["repeat"]: run["tokens_per_s"] for run in _of(STOCK, runs)}
    ratios = {}
    for side in sides:
        if side.budget is not None:
            of_side = sorted(_of(side.name, runs), key=lambda run: run["repeat"])
            pairs = [run["tokens_per_s"] / stock[run["repeat"]] for run in of_side]
            ratios[side.name] = {"pairs": pairs, "median": median(pairs)}
    return ratios


def print_report(document: dict[str, Any]) -> None:
    """Print card, tables and ratios, or why there are none."""
    # A narrower one would cut the table's numbers off.
    console = Console(highlight=False)
    console.width = max(console.width, _WIDTH)
    grid = Table.grid(padding=(0, 2))
    for key, value in document["card"].items():
        grid.add_row(key, _in_words(value))
    console.print(grid)
    for result in document["results"]:
        console.print()
        console.print(_table(result, document["workload"]))
        if result["mode"] == "served":
            console.print("Running requests and peak blocks: of samples taken every second.")
        _print_ratios(console, result)


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={each}" for key, each in value.items()) or "-"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(result: dict[str, Any], workload: dict[str, Any]) -> Table:
    pool = f"{workload['pool_tokens']:,} tokens" if workload["pool_tokens"] else "vLLM's own size"
    table = Table(
        title=f"{result['mode']}: {workload['num_prompts']} requests x {workload['output_len']:,} "
        f"output tokens, pool {pool}, buffer {workload['buffer']}, {workload['dtype']}",
        title_justify="left",
    )
    table.add_column("side", no_wrap=True)
    headings = ["tokens/s\n[min, max]", "running\nmean (peak)", "pre-\nempted", "peak\nblocks"]
    headings += ["compac-\ntions", "de-\nferred"]
    served = any("ttft_ms" in side for side in result["sides"])
    if served:
        headings += ["TTFT ms\np50 / p99", "ITL ms\np50 / p99"]
    for heading in headings:
        table.add_column(escape(heading), justify="right", no_wrap=True)
    for side in result["sides"]:
        table.add_row(side["side"], *_cells(side))
    return table


def grouped(count: float) -> str:
    """A count in full; the median of an even number of runs may be half of one."""
    return f"{count:,.0f}" if count == int(count) else f"{count:,.1f}"


def _cells(side: dict[str, Any]) -> list[str]:
    speed = side["tokens_per_s"]
    cells = [
        f"{speed['median']:,.1f} [{speed['min']:,.1f}, {speed['max']:,.1f}]",
        f"{side['running_mean']:.1f} ({grouped(side['running_peak'])})",
        grouped(side["preemptions"]),
        f"{grouped(side['peak_blocks'])} of {side['pool_blocks']:,}",
        grouped(side["compactions"]),
        grouped(side["deferred"]),
    ]
    for name in _LATENCIES:
        if name in side:
            cells.append(f"{side[name]['p50']:,.0f} / {side[name]['p99']:,.0f}")
    return cells


def _print_ratios(console: Console, result: dict[str, Any]) -> None:
    if result["ratios"] is None:
        console.print("No ratio is given, because:", style="bold red")
        for problem in result["failed_checks"]:
            console.print(f"- {problem}", soft_wrap=True, markup=False)
        return
    for side, ratio in result["ratios"].items():
        pairs = ", ".join(f"{pair:.2f}" for pair in ratio["pairs"])
        console.print(
            f"{side} / stock, tokens/s: [bold]{ratio['median']:.2f} x[/bold] (each pair: {pairs})",
            soft_wrap=True,
        )
