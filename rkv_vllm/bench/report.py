"""From the results of runs to medians, ratios, a table, and one JSON document.

Next: plot.py, which draws the document.
"""

from collections.abc import Sequence
from dataclasses import asdict
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
_HEADINGS = ("tokens/s\n[min, max]", "running\nmean (peak)", "pre-\nempted", "peak\nblocks")
_HEADINGS += ("compac-\ntions", "de-\nferred")
_SERVED_HEADINGS = ("TTFT ms\np50 / p99", "ITL ms\np50 / p99")
# Fields of a workload that its document has by other names, or not at all.
_UNSHOWN = ("model", "prompts", "probe_lens", "bytes_per_token")


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
    shown = {name: value for name, value in asdict(workload).items() if name not in _UNSHOWN}
    # JSON knows no infinity; null: all at once.
    rate = None if workload.request_rate == float("inf") else workload.request_rate
    modes: dict[str, list[Result]] = {}
    for result in results:
        modes.setdefault(result["mode"], []).append(result)
    documents = []
    for mode, runs in modes.items():
        problems = failed_checks(workload, runs)
        if failure is not None and len(runs) < repeats * len(sides):
            problems.append(failure)
        by_side = {side: [r for r in runs if r["side"] == side.name] for side in sides}
        documents.append(
            {
                "mode": mode,
                "sides": [_summary(side, own) for side, own in by_side.items() if own],
                "failed_checks": problems,
                "ratios": None if problems else _ratios(by_side),
                "runs": runs,
            }
        )
    return {
        "card": card,
        "workload": {
            "num_prompts": len(workload.prompts),
            **shown,
            "prompt_lens": list(workload.prompt_lens),
            "budgets": [side.budget for side in sides if side.budget is not None],
            "repeats": repeats,
            "request_rate": rate,
            "max_model_len": workload.max_model_len,
        },
        "failure": failure,
        "results": documents,
    }


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


def _ratios(by_side: dict[Side, list[Result]]) -> dict[str, Any]:
    """Tokens per second over stock's, each run against the stock run of the same repeat."""
    speeds = {
        side.name: [r["tokens_per_s"] for r in sorted(runs, key=lambda r: r["repeat"])]
        for side, runs in by_side.items()
    }
    stock = speeds.pop(STOCK)
    pairs = {
        side: [ours / theirs for ours, theirs in zip(own, stock, strict=True)]
        for side, own in speeds.items()
    }
    return {side: {"pairs": own, "median": median(own)} for side, own in pairs.items()}


def print_report(document: dict[str, Any]) -> None:
    """Print card, tables and ratios, or why there are none."""
    console = report_console()
    console.print(card_grid(document["card"]))
    for result in document["results"]:
        console.print()
        console.print(_table(result, document["workload"]))
        if result["mode"] == "served":
            console.print("Running requests and peak blocks: of samples taken every second.")
        if result["ratios"] is None:
            console.print("No ratio is given, because:", style="bold red")
        for problem in result["failed_checks"]:
            console.print(f"- {problem}", soft_wrap=True, markup=False)
        for side, ratio in (result["ratios"] or {}).items():
            pairs = ", ".join(f"{pair:.2f}" for pair in ratio["pairs"])
            shown = f"[bold]{ratio['median']:.2f} x[/bold] (each pair: {pairs})"
            console.print(f"{side} / stock, tokens/s: {shown}", soft_wrap=True)


def report_console(width: int = _WIDTH) -> Console:
    """A console at least so wide: a narrower one would cut a table's numbers off."""
    console = Console(highlight=False)
    console.width = max(console.width, width)
    return console


def card_grid(card: dict[str, Any]) -> Table:
    """A card as two columns."""
    grid = Table.grid(padding=(0, 2))
    for key, value in card.items():
        if isinstance(value, dict):
            value = " ".join(f"{name}={each}" for name, each in value.items()) or "-"
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        # Brackets are text here: `rkv[center=true]`.
        grid.add_row(key, escape(text))
    return grid


def in_words(workload: dict[str, Any]) -> str:
    """What was asked, in one line."""
    pool = f"{workload['pool_tokens']:,} tokens" if workload["pool_tokens"] else "vLLM's own size"
    return (
        f"{workload['num_prompts']} requests x {workload['output_len']:,} output tokens, "
        f"pool {pool}, buffer {workload['buffer']}, {workload['dtype']}"
    )


def _table(result: dict[str, Any], workload: dict[str, Any]) -> Table:
    table = Table(title=f"{result['mode']}: {in_words(workload)}", title_justify="left")
    table.add_column("side", no_wrap=True)
    served = any("ttft_ms" in side for side in result["sides"])
    for heading in _HEADINGS + (_SERVED_HEADINGS if served else ()):
        table.add_column(escape(heading), justify="right", no_wrap=True)
    for side in result["sides"]:
        speed = side["tokens_per_s"]
        table.add_row(
            side["side"],
            f"{speed['median']:,.1f} [{speed['min']:,.1f}, {speed['max']:,.1f}]",
            f"{side['running_mean']:.1f} ({grouped(side['running_peak'])})",
            grouped(side["preemptions"]),
            f"{grouped(side['peak_blocks'])} of {side['pool_blocks']:,}",
            grouped(side["compactions"]),
            grouped(side["deferred"]),
            *(f"{side[n]['p50']:,.0f} / {side[n]['p99']:,.0f}" for n in _LATENCIES if n in side),
        )
    return table


def grouped(count: float) -> str:
    """A count in full; the median of an even number of runs may be half of one."""
    return f"{count:,.0f}" if count == int(count) else f"{count:,.1f}"
