"""Prints an evaluation's document: card, checks that failed, and three tables for each set.

Next: plot.py, which draws it.
"""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rkv_vllm.bench.report import card_grid, report_console
from rkv_vllm.bench.sides import STOCK

# Room for the widest table: names of sides hold their options.
_WIDTH = 300
_Interval = dict[str, float | None] | None
_ACCURACY = ("problems", "accuracy, %\n[95 %]", "minus stock\n[95 %]", "over stock\n[95 %]")
_ACCURACY += ("un-\ngraded",)
_OUTPUTS = ("tokens,\nmean", "over stock\n[95 %]", "cut off", "looping", "compactions\n(requests)")
_OUTPUTS += ("evicted\ntokens", "tokens/s", "over\nstock")
_FORCED = ("tokens", "agreement, %\n[95 %]", "KL, nats/token\n[95 %]", "nll minus stock's\n[95 %]")
_FORCED += ("compac-\ntions", "evicted\ntokens")


def print_report(document: dict[str, Any]) -> None:
    """Print card, checks and tables; a side that failed its check has no numbers."""
    # Its lines are filled up to the longest, so that a wide one would break all of them.
    report_console().print(card_grid(document["card"]))
    console = report_console(_WIDTH)
    if document["failure"]:
        console.print(f"\nNot all runs finished: {document['failure']}", style="bold red")
    for result in document["results"]:
        console.print(f"\n{in_words(result)}", style="bold", markup=False)
        _print_problems(console, result)
        _print_protected(console, result)
        if result["sides"]:
            console.print(_accuracy_table(result))
            console.print(_outputs_table(result))
            console.print(
                "Compactions and evicted tokens: per request (each head evicts as many); in "
                "brackets the share of requests with any.",
                soft_wrap=True,
            )
        if result["forced"]:
            console.print(_forced_table(result))
            _print_noise(console, result)


def in_words(result: dict[str, Any]) -> str:
    """What a set was asked for, in one line."""
    samples = result["num_samples"]
    text = f"{result['set']}: {result['num_problems']:,} problems"
    return text if samples == 1 else f"{text} x {samples} samples"


def _print_problems(console: Console, result: dict[str, Any]) -> None:
    if result["failed_checks"]:
        console.print("Failed checks:", style="bold red")
    for problem in result["failed_checks"]:
        console.print(f"- {problem}", soft_wrap=True, markup=False)
    if result["unfinished"]:
        console.print(
            "Unfinished; a side is compared with stock over the problems that both finished:",
            style="bold red",
            soft_wrap=True,
        )
    for problem in result["unfinished"]:
        console.print(f"- {problem}", soft_wrap=True, markup=False)


def _print_protected(console: Console, result: dict[str, Any]) -> None:
    """A side may protect the beginning of its prompts only."""
    for budget, found in result["protected"].items():
        console.print(
            f"{budget} +prompt: of a prompt the first {found['most_tokens']} tokens at most, "
            f"{found['tokens']:,.0f} on average; the whole of it in "
            f"{100 * found['whole']:.0f} % of the requests",
            soft_wrap=True,
        )


def _table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("side", no_wrap=True)
    for heading in headings:
        table.add_column(escape(heading), justify="right", no_wrap=True)
    return table


def _accuracy_table(result: dict[str, Any]) -> Table:
    table = _table("accuracy: mean over problems of pass@1", _ACCURACY)
    for side in result["sides"]:
        against = side.get("against_stock", {})
        table.add_row(
            escape(side["side"]),
            f"{side['num_problems']:,}",
            _shown(side["accuracy"], ".1f", 100),
            _shown(against.get("difference"), "+.1f", 100),
            _shown(against.get("ratio"), ".2f"),
            f"{100 * side['ungraded']:.0f} %",
        )
    return table


def _outputs_table(result: dict[str, Any]) -> Table:
    table = _table("outputs", _OUTPUTS)
    for side in result["sides"]:
        speed = result["speeds"].get(side["side"], {})
        is_stock = side["side"] == STOCK
        table.add_row(
            escape(side["side"]),
            f"{side['output_len']:,.0f}",
            _shown(side.get("against_stock", {}).get("output_len_ratio"), ".2f"),
            f"{100 * side['cut_off']:.0f} %",
            "-" if side["looping"] is None else f"{100 * side['looping']:.0f} %",
            f"{side['compactions']:.1f} ({100 * side['compacted']:.0f} %)",
            f"{side['evicted']:,.0f}",
            f"{speed['tokens_per_s']:,.1f}" if speed else "-",
            f"{speed['ratio']:.2f} x" if speed.get("ratio") and not is_stock else "-",
        )
    return table


def _forced_table(result: dict[str, Any]) -> Table:
    title = "stock's own text forced through each side: tokens after its first compaction"
    table = _table(title, _FORCED)
    for side in result["forced"]:
        if side["side"] != STOCK:
            table.add_row(
                escape(side["side"]),
                f"{side['num_tokens']:,}",
                _shown(side["agreement"], ".1f", 100),
                _shown(side["kl"], ".3f"),
                _shown(side["nll_difference"], "+.3f"),
                f"{side['compactions']:.1f}",
                f"{side['evicted']:,.0f}",
            )
    return table


def _print_noise(console: Console, result: dict[str, Any]) -> None:
    """What forcing alone changes, without any compression."""
    for side in result["forced"]:
        if side["side"] == STOCK and side["all_agreement"]:
            console.print(
                f"{STOCK}, its own text forced through it, agrees in "
                f"{100 * side['all_agreement']['mean']:.2f} % of {side['all_num_tokens']:,} tokens",
                soft_wrap=True,
            )


def _shown(interval: _Interval, form: str, factor: float = 1) -> str:
    """An estimate with its interval; an end that is not known, or infinite, is a question mark."""
    if interval is None:
        return "-"
    mean, low, high = (
        "?" if value is None else format(factor * value, form)
        for value in (interval["mean"], interval["low"], interval["high"])
    )
    return f"{mean} [{low}, {high}]"
