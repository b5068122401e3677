"""The plot of `rkv-vllm bench`, drawn from its JSON document: speed, and what fits at once."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rkv_vllm.bench.report import grouped, in_words
from rkv_vllm.whole_file import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Distinguishable without colour vision and on paper; as in the plot of `plan`.
_STOCK, _COMPRESSED, _MARK = "#d55e00", "#009e73", "#222222"
# Characters of a title that fit above one of two plots.
_TITLE_WIDTH = 56


def draw(path: Path, document: dict[str, Any]) -> None:
    """Write the plot of a document that has at least one result.

    Raises:
        OSError: the file cannot be written.
    """
    figure = make_figure(document)
    with whole_file(path) as half:
        figure.savefig(half, dpi=150)


def make_figure(document: dict[str, Any]) -> "Figure":
    """Returns one row per mode: tokens per second, and requests running at once."""
    from matplotlib.figure import Figure

    results = document["results"]
    rows = max(len(result["sides"]) for result in results)
    height = 1.6 + len(results) * (1.2 + 0.5 * rows)
    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.subplots(len(results), 2, squeeze=False)
    for (left, right), result in zip(axes, results, strict=True):
        _draw_speed(left, result)
        _draw_running(right, result)
    model = Path(document["card"]["model"]).name
    figure.suptitle(f"{model}: {in_words(document['workload'])}", fontsize=11)
    return figure


def _draw_speed(axes: "Axes", result: dict[str, Any]) -> None:
    """Bars of medians, a dot for each run, the ratio in words."""
    _bars(axes, result, [side["tokens_per_s"]["median"] for side in result["sides"]])
    ratios = result["ratios"] or {}
    for row, side in enumerate(result["sides"]):
        speeds = [run["tokens_per_s"] for run in result["runs"] if run["side"] == side["side"]]
        axes.plot(speeds, [row] * len(speeds), "o", color=_MARK, ms=4, alpha=0.7, zorder=3)
        ratio = ratios.get(side["side"])
        text = f"{side['tokens_per_s']['median']:,.1f}"
        _label(axes, max(speeds), row, text + (f"  ({ratio['median']:.2f} x)" if ratio else ""))
    axes.set_xlabel("output tokens per second (median; dots: single runs)")
    title = result["mode"]
    if result["ratios"] is None:
        why = textwrap.shorten(result["failed_checks"][0], 3 * _TITLE_WIDTH, placeholder=" ...")
        title += f": no ratio\n{textwrap.fill(why, _TITLE_WIDTH)}"
    axes.set_title(title, loc="left", fontweight="bold", fontsize=10, parse_math=False)


def _draw_running(axes: "Axes", result: dict[str, Any]) -> None:
    """Bars of means, a mark for the peak; peak blocks and preemptions in words."""
    _bars(axes, result, [side["running_mean"] for side in result["sides"]])
    for row, side in enumerate(result["sides"]):
        axes.plot([side["running_peak"]], [row], "|", color=_MARK, ms=16, mew=2, zorder=3)
        text = f"{side['running_mean']:.1f}, peak {grouped(side['running_peak'])}"
        _label(axes, max(side["running_peak"], side["running_mean"]), row, text)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("requests running at once (mean; line: peak)")
    axes.set_yticklabels(
        f"preemptions: {grouped(side['preemptions'])}\n"
        f"blocks, peak: {grouped(side['peak_blocks'])} of {side['pool_blocks']:,}"
        for side in result["sides"]
    )


def _bars(axes: "Axes", result: dict[str, Any], values: list[float]) -> None:
    names = [side["side"] for side in result["sides"]]
    colours = [_STOCK if side["budget"] is None else _COMPRESSED for side in result["sides"]]
    axes.barh(range(len(names)), values, color=colours, height=0.6)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _label(axes: "Axes", right_of: float, row: int, text: str) -> None:
    """Text right of a bar, with room for it on the axis."""
    at = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
    axes.annotate(text, (right_of, row), **at)
    axes.set_xlim(right=max(axes.get_xlim()[1], right_of * 1.45))
