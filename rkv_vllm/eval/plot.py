"""The plot of `rkv-vllm eval`, drawn from its JSON document: accuracy and odds over the budget.

A row for each problem set. Colour and marker tell the method, the line's style tells what is
protected; stock is a band.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rkv_vllm.bench.sides import STOCK
from rkv_vllm.eval.tables import in_words
from rkv_vllm.whole_file import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# As in the plot of `bench`. The methods' are distinguishable by their markers, too.
_STOCK = "#d55e00"
_METHODS = (
    ("#009e73", "o"), ("#0072b2", "s"), ("#cc79a7", "^"), ("#e69f00", "D"), ("#56b4e9", "v"),
    ("#222222", "P"), ("#8c564b", "X"), ("#7b3fbf", "<"), ("#8a8a00", ">"), ("#888888", "*"),
)  # fmt: skip
_LINES = {"prompt": "-", "none": "--"}
# Of a budget: the step from curve to curve, so that intervals do not cover each other, and at most
# from the first to the last.
_STEP, _SPREAD = 0.015, 0.16
_TITLE_WIDTH = 60
_PANEL_WIDTH, _PANEL_HEIGHT = 6.2, 5.4
_LEGEND_WIDTH = 2.6

_Side = dict[str, Any]


class _Panel(NamedTuple):
    """One measure over the budget.

    Attributes:
        where: the list of sides in a document.
        name: of the interval in it.
        label: of the axis.
        factor: from the document's unit to the axis's.
    """

    where: str
    name: str
    label: str
    factor: float


_ACCURACY = _Panel("sides", "accuracy", "accuracy, % (bars: 95 % intervals)", 100)
_KL = _Panel("forced", "kl", "KL from stock, nats per token (lower is better)", 1)
_AGREEMENT = _Panel("forced", "agreement", "tokens whose likeliest one is stock's, %", 100)


def draw(path: Path, document: dict[str, Any]) -> None:
    """Write the plot of a document.

    Raises:
        OSError: the file cannot be written.
    """
    figure = make_figure(document)
    with whole_file(path) as half:
        figure.savefig(half, dpi=150)


def make_figure(document: dict[str, Any]) -> "Figure":
    """Returns a row for each set; what a document has no numbers for has no panel."""
    from matplotlib.figure import Figure

    results = document["results"]
    panels = [
        panel
        for panel in (_ACCURACY, _KL, _AGREEMENT)
        if any(_drawn(result, panel) for result in results)
    ] or [_ACCURACY]
    size = (len(panels) * _PANEL_WIDTH + _LEGEND_WIDTH, len(results) * _PANEL_HEIGHT + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(results), len(panels), squeeze=False)
    methods = _methods(results)
    for row, result in zip(axes, results, strict=True):
        for each, panel in zip(row, panels, strict=True):
            _draw_panel(each, result, panel, methods)
        title = in_words(result) + _reservations(result)
        row[0].set_title(title, loc="left", fontweight="bold", fontsize=10, parse_math=False)
    _add_legend(figure, results, methods, _ACCURACY in panels)
    figure.suptitle(Path(document["card"]["model"]).name, fontsize=11)
    return figure


def _methods(results: Sequence[dict[str, Any]]) -> list[str]:
    sides = [side for result in results for side in (*result["sides"], *result["forced"])]
    return list(dict.fromkeys(side["method"] for side in sides if side["side"] != STOCK))


def _drawn(result: dict[str, Any], panel: _Panel) -> list[_Side]:
    """The compressed sides that a panel shows."""
    return [side for side in result[panel.where] if side["side"] != STOCK and side[panel.name]]


def _reservations(result: dict[str, Any]) -> str:
    """What the numbers must not be seen without."""
    problems = [*result["failed_checks"], *result["unfinished"]]
    if not problems:
        return ""
    text = problems[0] + (f", and {len(problems) - 1} more" if len(problems) > 1 else "")
    text = textwrap.shorten(text, 3 * _TITLE_WIDTH, placeholder=" ...")
    return f"\n{textwrap.fill(text, _TITLE_WIDTH)}"


def _draw_panel(
    axes: "Axes", result: dict[str, Any], panel: _Panel, methods: Sequence[str]
) -> None:
    sides = _drawn(result, panel)
    axes.set_xscale("log")
    if panel is _KL:
        axes.set_yscale("log", nonpositive="clip")
        axes.yaxis.set_major_formatter("{x:g}")
        # 0.2 and 0.5 beside 0.1 and 1: room for two more in each decade.
        axes.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:.0e}"[0] in "25" else "")
    _draw_curves(axes, sides, panel, methods)
    stock = next((side for side in result["sides"] if side["side"] == STOCK), None)
    if panel is _ACCURACY and stock:
        _draw_stock(axes, stock["accuracy"])
    budgets = sorted({side["budget"] for side in sides})
    axes.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
    axes.set_xticks([], minor=True)
    if budgets:
        axes.set_xlim(budgets[0] / (1 + _SPREAD), budgets[-1] * (1 + _SPREAD))
    else:
        axes.text(0.5, 0.5, "no compressed side has numbers", transform=axes.transAxes, ha="center")
    if panel is _ACCURACY:
        axes.set_ylim(0, 101)
    axes.set_xlabel("budget (tokens kept per request, a protected prompt counted in)")
    axes.set_ylabel(panel.label)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_curves(
    axes: "Axes", sides: Sequence[_Side], panel: _Panel, methods: Sequence[str]
) -> None:
    """A curve for each method and protection, side by side."""
    curves: dict[tuple[str, str], list[_Side]] = {}
    for side in sides:
        curves.setdefault((side["method"], side["protect"]), []).append(side)
    step = min(_STEP, _SPREAD / max(len(curves), 1))
    for number, ((method, protect), own) in enumerate(curves.items()):
        own.sort(key=lambda side: side["budget"])
        colour, marker = _METHODS[methods.index(method) % len(_METHODS)]
        shift = 1 + step * (number - (len(curves) - 1) / 2)
        intervals = [side[panel.name] for side in own]
        axes.errorbar(
            [side["budget"] * shift for side in own],
            [panel.factor * interval["mean"] for interval in intervals],
            yerr=list(zip(*(_bars(each, panel.factor) for each in intervals), strict=True)),
            color=colour,
            ecolor=(colour, 0.35),
            elinewidth=1,
            marker=marker,
            ms=5,
            mfc=colour if protect == "prompt" else "white",
            lw=1.5,
            ls=_LINES.get(protect, ":"),
            zorder=3,
        )


def _bars(interval: dict[str, float | None], factor: float) -> tuple[float, float]:
    """How far the interval reaches down and up; nothing where an end is not known."""
    mean = interval["mean"]
    low, high = (mean if interval[end] is None else interval[end] for end in ("low", "high"))
    return factor * (mean - low), factor * (high - mean)


def _draw_stock(axes: "Axes", accuracy: dict[str, float]) -> None:
    low, mean, high = (100 * accuracy[name] for name in ("low", "mean", "high"))
    axes.axhspan(low, high, color=_STOCK, alpha=0.12, lw=0)
    axes.axhline(mean, color=_STOCK, lw=1.5)


def _add_legend(
    figure: "Figure", results: Sequence[dict[str, Any]], methods: Sequence[str], has_stock: bool
) -> None:
    from matplotlib.lines import Line2D

    sides = [side for result in results for side in (*result["sides"], *result["forced"])]
    entries = []
    if has_stock:
        entries.append(Line2D([], [], color=_STOCK, lw=1.5, label="stock vLLM (band: 95 %)"))
    for number, method in enumerate(methods):
        colour, marker = _METHODS[number % len(_METHODS)]
        entries.append(Line2D([], [], color=colour, marker=marker, lw=1.5, label=method))
    protections = dict.fromkeys(side["protect"] for side in sides if side["side"] != STOCK)
    for protect in protections:
        face = "black" if protect == "prompt" else "white"
        entries.append(
            Line2D(
                [], [], color="black", marker="o", mfc=face, ls=_LINES.get(protect, ":"), lw=1.5,
                label=f"protected: {protect}",
            )
        )  # fmt: skip
    figure.legend(handles=entries, loc="outside right upper", fontsize=9, handlelength=3)
