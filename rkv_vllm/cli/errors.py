"""How a command ends when it cannot do what was asked: one line on stderr and an exit code."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import typer

REFUSED = 1
USAGE = 2
INTERRUPTED = 130


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
    target = path if path.exists() else path.parent
    is_png = path.suffix.lower() == ".png" and not path.is_dir()
    if not is_png or not path.parent.is_dir() or not os.access(target, os.W_OK):
        raise CommandError(
            f"--plot: got {str(path)!r}, wanted a file that ends in .png and can be written, in a "
            "folder that exists; change the path"
        )
    require_package("matplotlib", "--plot")
