"""From the results of runs to medians, ratios, a table, and one JSON document.

Next: plot.py, which draws the document.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rkv_vllm.bench.checks import Measured, Result, failed_checks
from rkv_vllm.bench.sides import STOCK, Side
from rkv_vllm.bench.workload import Workload

_WIDTH = 140
# Shown as medians over the runs of a side.
_COUNTS = ("running_mean", "running_peak", "preemptions", "peak_blocks", "compactions", "deferred")
_LATENCIES = ("ttft_ms", "itl_ms")
_HEADINGS = ("tokens/s\n[min, max]", "running\nmean (peak)", "pre-\nempted", "peak\nblocks")
_HEADINGS += ("compac-\ntions", "de-\nferred", "TTFT ms\np50 / p99", "ITL ms\np50 / p99")
_CLASS_HEADINGS = ("priority", "requests", "TTFT s\np50 / p99", "to the end, s\np50 / p99")
# Fields of a workload that its document has by other names, or not at all.
_UNSHOWN = ("model", "prompts", "probe_lens", "bytes_per_token", "element_bytes")


def make_document(
    card: dict[str, Any],
    workload: Workload,
    sides: Sequence[Side],
    repeats: int,
    measured: Measured,
    failure: str | None,
) -> dict[str, Any]:
    """Returns the whole answer as plain JSON.

    Args:
        card: what the numbers depend on.
        workload: what was asked.
        sides: in the order of the tables.
        repeats: runs of every side that were asked for.
        measured: what the runs gave.
        failure: why not all runs finished, None when they did.
    """
    shown = {name: value for name, value in _plain(workload).items() if name not in _UNSHOWN}
    # JSON knows no infinity; null: all at once.
    rate = None if workload.request_rate == float("inf") else workload.request_rate
    modes: dict[str, list[Result]] = {}
    for result in measured.results:
        modes.setdefault(result["mode"], []).append(result)
    documents = []
    for mode, runs in modes.items():
        problems = failed_checks(workload, runs)
        refusals = {side: why for (where, side), why in measured.refusals.items() if where == mode}
        if failure is not None and len(runs) < repeats * (len(sides) - len(refusals)):
            problems.append(failure)
        by_side = {side: [r for r in runs if r["side"] == side.name] for side in sides}
        documents.append(
            {
                "mode": mode,
                "sides": [_summary(side, own) for side, own in by_side.items() if own],
                "not_available": refusals,
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
            "sides": [{"side": side.name, **_plain(side)} for side in sides],
            "budgets": [*dict.fromkeys(side.budget for side in sides if side.budget is not None)],
            "repeats": repeats,
            "request_rate": rate,
            "max_model_len": workload.max_model_len,
        },
        "failure": failure,
        "results": documents,
    }


def _plain(fields: Workload | Side) -> dict[str, Any]:
    """A dataclass as JSON gives it back."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(fields).items()
    }


def _summary(side: Side, runs: list[Result]) -> dict[str, Any]:
    speeds = [run["tokens_per_s"] for run in runs]
    summary = {
        "side": side.name,
        "budget": side.budget,
        "when": side.when,
        "tokens_per_s": {"median": median(speeds), "min": min(speeds), "max": max(speeds)},
        "pool_blocks": runs[0]["pool_blocks"],
        **{name: median(run[name] for run in runs) for name in _COUNTS},
    }
    if "drafts" in runs[0]:
        summary["drafts"] = runs[0]["drafts"]
        summary["acceptance_length"] = median(run["acceptance_length"] for run in runs)
    for name in _LATENCIES:
        summary[name] = _median_of(run[name] for run in runs)
    if "classes" in runs[0]:
        summary["classes"] = [
            {
                name: _median_of(each[name] for each in of_runs) if name.endswith("_ms") else value
                for name, value in of_runs[0].items()
            }
            for of_runs in zip(*(run["classes"] for run in runs), strict=True)
        ]
    return summary


def _median_of(percentiles: Iterable[dict[str, float]]) -> dict[str, float]:
    """Of each percentile, over runs."""
    of_runs = list(percentiles)
    return {p: median(each[p] for each in of_runs) for p in of_runs[0]}


def _ratios(by_side: dict[Side, list[Result]]) -> dict[str, Any]:
    """Tokens per second over stock's, each run against the stock run of the same repeat."""
    speeds = {
        side.name: [r["tokens_per_s"] for r in sorted(runs, key=lambda r: r["repeat"])]
        for side, runs in by_side.items()
        if runs
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
        if any("classes" in side for side in result["sides"]):
            console.print(_class_table(result))
        for line in notes(result, document["workload"]):
            console.print(line, soft_wrap=True, markup=False)
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
        f"{workload['num_prompts']} requests x {_span(workload['output_lens'])} output tokens, "
        f"prompts of {_span(workload['prompt_lens'])}, pool {pool}, buffer {workload['buffer']}, "
        f"{workload['dtype']}"
    )


def _span(lengths: Sequence[int]) -> str:
    low, high = min(lengths), max(lengths)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def notes(result: dict[str, Any], workload: dict[str, Any]) -> Iterator[str]:
    """What the numbers of a mode do not say: who did not start, who has another pool."""
    for side, why in result["not_available"].items():
        yield f"{side}: not available here, vLLM says: {why}"
    for side in result["sides"]:
        if "drafts" in side:
            yield (
                f"{side['side']}: acceptance length {side['acceptance_length']:.2f} with "
                f"{side['drafts']} drafts per step"
            )
    for side in workload["sides"]:
        if side["pool_tokens"] is not None and side["side"] not in result["not_available"]:
            ratio = side["pool_tokens"] / workload["pool_tokens"]
            why = "the smallest that it starts in" if side["is_exact"] else "in the same bytes"
            yield f"{side['side']}: a pool of {side['pool_tokens']:,} tokens ({ratio:.2f} x), {why}"


def _table(result: dict[str, Any], workload: dict[str, Any]) -> Table:
    table = Table(title=f"{result['mode']}: {in_words(workload)}", title_justify="left")
    table.add_column("side", overflow="fold")
    for heading in _HEADINGS:
        table.add_column(escape(heading), justify="right", no_wrap=True)
    for side in result["sides"]:
        speed = side["tokens_per_s"]
        table.add_row(
            escape(side["side"]),
            f"{speed['median']:,.1f} [{speed['min']:,.1f}, {speed['max']:,.1f}]",
            f"{side['running_mean']:.1f} ({grouped(side['running_peak'])})",
            grouped(side["preemptions"]),
            f"{grouped(side['peak_blocks'])} of {side['pool_blocks']:,}",
            grouped(side["compactions"]),
            grouped(side["deferred"]),
            *(f"{side[name]['p50']:,.0f} / {side[name]['p99']:,.0f}" for name in _LATENCIES),
        )
    return table


def _class_table(result: dict[str, Any]) -> Table:
    """Latencies by priority, the most urgent first."""
    table = Table(title=f"{result['mode']}: latency by priority", title_justify="left")
    table.add_column("side", overflow="fold")
    for heading in _CLASS_HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for side in result["sides"]:
        for each in side["classes"]:
            seconds = (
                " / ".join(f"{each[name][p] / 1000:,.1f}" for p in ("p50", "p99"))
                for name in ("ttft_ms", "e2el_ms")
            )
            row = escape(side["side"]), str(each["priority"]), str(each["num_requests"])
            table.add_row(*row, *seconds)
    return table


def grouped(count: float) -> str:
    """A count in full; the median of an even number of runs may be half of one."""
    return f"{count:,.0f}" if count == int(count) else f"{count:,.1f}"
