"""How a command ends when it cannot do what was asked: one line on stderr and an exit code."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

REFUSED = 1
USAGE = 2


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
