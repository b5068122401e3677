"""The plot of `rkv-vllm plan`: requests at once against output length, as a PNG."""

from pathlib import Path

from rkv_vllm.cli.capacity import Capacity
from rkv_vllm.cli.errors import REFUSED, CommandError
from rkv_vllm.cli.footprint import stock_life
from rkv_vllm.whole_file import whole_file

# Distinguishable without colour vision, on paper, and by their dashes.
_COLOURS = {"stock": "#d55e00", "stock_fp8": "#0072b2", "rkv": "#009e73", "rkv_fp8": "#cc79a7"}
_NUM_POINTS = 150


def draw(
    path: Path, title: str, capacity: Capacity, prompt_len: int, output_len: int, longest: int
) -> None:
    """Draw the pools up to the output length `longest`; `output_len` is marked.

    Raises:
        CommandError: the file cannot be written.
    """
    import numpy as np
    from matplotlib.figure import Figure

    spread = np.geomspace(min(64, longest), longest, _NUM_POINTS).round().astype(int)
    lengths = sorted({*spread.tolist(), output_len})
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", title=title)
    for pool in capacity.pools:
        colour = _COLOURS[pool.name]
        peak = [pool.at_once_by_peak(prompt_len, length) for length in lengths]
        axes.plot(lengths, peak, color=colour, lw=2, label=f"{pool.label}, peak")
        if pool.life is stock_life:
            mean = [pool.at_once_by_mean(prompt_len, length) for length in lengths]
            axes.plot(lengths, mean, color=colour, lw=1, ls="--", label=f"{pool.label}, mean")
    axes.axvline(output_len, color="grey", lw=1, ls=":", label="--output-len")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(bottom=0.8)
    axes.set_xlabel("output length (tokens)")
    axes.set_ylabel("requests at once on one GPU")
    axes.grid(which="major", alpha=0.3)
    axes.legend()
    try:
        with whole_file(path) as half:
            figure.savefig(half, dpi=150)
    except OSError as error:
        raise CommandError(
            f"--plot: got {error}, wanted a file that can be written; change the path", REFUSED
        ) from error
