"""`rkv-vllm version`: which versions are installed."""

from importlib.metadata import PackageNotFoundError, version

import typer
from rich.console import Console
from rich.table import Table

VERSIONED_DISTRIBUTIONS = ("rkv-vllm", "vllm", "torch")


def show_version() -> None:
    """Print the versions of the plugin, of vLLM and of torch."""
    table = Table.grid(padding=(0, 2))
    missing = []
    for name in VERSIONED_DISTRIBUTIONS:
        try:
            table.add_row(name, version(name))
        except PackageNotFoundError:
            missing.append(name)
            table.add_row(name, "not installed")
    Console(highlight=False).print(table)
    if missing:
        typer.echo(f"missing: {', '.join(missing)}; run `make venv`", err=True)
        raise typer.Exit(code=1)
