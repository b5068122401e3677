"""The `rkv-vllm` command: what stands beside `vllm serve`, one file per subcommand to come.

Importing this module imports neither torch nor vLLM, so that `--help` answers at once.
"""

from importlib.metadata import PackageNotFoundError, version

import typer
from rich.console import Console
from rich.table import Table

VERSIONED_DISTRIBUTIONS = ("rkv-vllm", "vllm", "torch")

app = typer.Typer(
    name="rkv-vllm",
    help="R-KV cache eviction for vLLM. To serve: vllm serve MODEL --kv-compression rkv",
    no_args_is_help=True,
    add_completion=False,
)


@app.callback()
def group() -> None:
    """Keep `version` a subcommand: a typer app with a single command would swallow its name."""


@app.command("version")
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


def main() -> None:
    """Run the command line; the console script `rkv-vllm` starts here."""
    app()
