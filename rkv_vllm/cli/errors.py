"""How a command ends when it cannot do what was asked: one line on stderr and an exit code."""

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import typer

from rkv_vllm.whole_file import what_is_missing

REFUSED = 1
USAGE = 2
INTERRUPTED = 130

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CommandError(Exception):
    """Ends a command with one line: name, got, wanted, cure.

    Attributes:
        exit_code: `REFUSED` where the input makes sense but cannot be had, `USAGE` where it is to
            be written otherwise.
    """

    def __init__(self, message: str, exit_code: int = USAGE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a CommandError into its line and its exit code."""
    try:
        yield
    except CommandError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


@contextmanager
def full_disk_errors() -> Iterator[None]:
    """End the process with one line where there is no room for what a command prints or keeps."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        where = "" if error.filename is None else f" in {error.filename}"
        typer.echo(
            f"Error: got {error.strerror}{where}, wanted room for the output and for temporary "
            "files; make some, or set TMPDIR to a folder on another disk",
            err=True,
        )
        # What is left in the buffer would fail once more at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(REFUSED)


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends the command with one line, also in a background job, where shells ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise CommandError("interrupted; nothing was written", INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGINT, before)


def require_package(package: str, option: str) -> None:
    """Raise CommandError where an option's package cannot be imported."""
    try:
        import_module(package)
    except ImportError as error:
        raise CommandError(
            f"{option}: got an installation in which {package} cannot be imported ({error}), "
            f"wanted one that has it; run: pip install {package}",
            REFUSED,
        ) from error


@contextmanager
def plot_errors() -> Iterator[None]:
    """Turn what stops a plot from being written into a CommandError."""
    try:
        yield
    except OSError as error:
        raise CommandError(
            f"--plot: got {error}, wanted a file that can be written; change the path", REFUSED
        ) from error


def check_plot(path: Path | None) -> None:
    """Raise CommandError unless the plot, if one is wanted, can be drawn and written."""
    if path is None:
        return
    is_png = path.suffix.lower() == ".png"
    wanted = what_is_missing(path) if is_png else "a file that ends in .png"
    if wanted is not None:
        raise CommandError(f"--plot: got {str(path)!r}, wanted {wanted}; change the path")
    require_package("matplotlib", "--plot")
