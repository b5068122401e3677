"""The plot of `rkv-vllm plan`: requests at once against output length, as a PNG."""

from pathlib import Path

from rkv_vllm.cli.capacity import Capacity, Workload
from rkv_vllm.cli.errors import REFUSED, CommandError

# Distinguishable without colour vision, on paper, and by their dashes.
_COLOURS = {"stock": "#d55e00", "stock_fp8": "#0072b2", "rkv": "#009e73"}
_NUM_POINTS = 300


def draw(
    path: Path, capacity: Capacity, workload: Workload, model: str, max_positions: int | None
) -> None:
    """Draw the three sides up to the output length that the pool, or the model, allows.

    Args:
        path: the PNG to write.
        capacity: what `plan` computed.
        workload: its requests; the output length is marked.
        model: for the title.
        max_positions: tokens of context that the model was made for, None if not known.

    Raises:
        CommandError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    longest = capacity.longest_output(workload.prompt_len)
    if max_positions is not None:
        longest = min(longest, max(max_positions - workload.prompt_len, workload.output_len))
    lengths = _output_lens(longest, workload.output_len)
    for side in capacity.sides:
        points = [Workload(workload.prompt_len, output_len) for output_len in lengths]
        colour = _COLOURS[side.name]
        peak = [side.at_once_by_peak(point) for point in points]
        axes.plot(lengths, peak, color=colour, lw=2, label=f"{side.label}, peak")
        if side is not capacity.rkv:
            mean = [side.at_once_by_mean(point) for point in points]
            axes.plot(lengths, mean, color=colour, lw=1, ls="--", label=f"{side.label}, mean")
    axes.axvline(workload.output_len, color="grey", lw=1, ls=":", label="--output-len")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(bottom=0.8)
    axes.set_xlabel("output length (tokens)")
    axes.set_ylabel("requests at once on one GPU")
    config = capacity.config
    axes.set_title(
        f"{model}: prompt {workload.prompt_len:,}, "
        f"budget {config.budget:,}, buffer {config.buffer:,}"
    )
    axes.grid(which="major", alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise CommandError(
            f"--plot: got {error}, wanted a file that can be written; change the path", REFUSED
        ) from error


def _output_lens(longest: int, marked: int) -> list[int]:
    """Output lengths evenly spread on a logarithmic axis, the marked one among them."""
    shortest = min(64, longest)
    ratio = longest / shortest
    spread = {round(shortest * ratio ** (i / _NUM_POINTS)) for i in range(_NUM_POINTS + 1)}
    return sorted({*spread, marked})
