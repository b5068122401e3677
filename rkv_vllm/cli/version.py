"""`rkv-vllm version`: which versions are installed."""

import typer
from rich.console import Console
from rich.table import Table

from rkv_vllm.fit.versions import installed_version

VERSIONED_DISTRIBUTIONS = ("rkv-vllm", "vllm", "torch")


def show_version() -> None:
    """Print the versions of the plugin, of vLLM and of torch."""
    table = Table.grid(padding=(0, 2))
    missing = []
    for name in VERSIONED_DISTRIBUTIONS:
        version = installed_version(name)
        table.add_row(name, version or "not installed")
        if version is None:
            missing.append(name)
    Console(highlight=False).print(table)
    if missing:
        typer.echo(f"missing: {', '.join(missing)}; run `make venv`", err=True)
        raise typer.Exit(code=1)
