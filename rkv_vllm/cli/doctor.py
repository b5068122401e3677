"""`rkv-vllm doctor`: would compression start here, and for this model?

Prints what `diagnosis.py` finds.
"""

import json
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rkv_vllm.cli.checkpoint import find_config, read_config
from rkv_vllm.cli.environment import quieten_vllm
from rkv_vllm.cli.errors import REFUSED, CommandError, one_line_errors

if TYPE_CHECKING:
    from rkv_vllm.cli.diagnosis import Finding

_STYLES = {"ok": "green", "note": "yellow", "refused": "bold red"}


def show_diagnosis(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="Folder with config.json, or a hub id in the local cache."
        ),
    ] = None,
    engine_flags: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- ENGINE_FLAGS",
            help="Flags of vllm serve, after `--`: checks a whole command line.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document, no table.")
    ] = False,
) -> None:
    """Print what is installed, what runs here, and what a model's start would refuse.

    With MODEL the engine config is made as by `vllm serve MODEL --kv-compression rkv`, and asked
    what that start would ask; each refusal names its cure. Needs config.json only: no weights, no
    GPU, no network. What only a start can tell (layers that share a cache, the attention backend
    that vLLM picks) is left to it. Takes about 15 seconds, nearly all of them imports.

    Examples, with the model that `make model` unpacks:

    ```
    rkv-vllm doctor
    rkv-vllm doctor .models/SmolLM2-135M-Instruct
    rkv-vllm doctor .models/SmolLM2-135M-Instruct --json -- --kv-budget 512
    ```

    Exit codes: 0 fine; 1 something is refused; 2 the command line is wrong.
    """
    with one_line_errors():
        folder = None
        if model is not None:
            path = find_config(_not_a_flag(model))
            read_config(path)
            folder = str(path.parent)
        quieten_vllm()
        with Console(stderr=True).status("Importing vLLM ..."):
            # Only now: the module imports what `--help` can do without.
            from rkv_vllm.cli.diagnosis import examine

            findings = list(examine(folder, engine_flags or ()))
    refused = any(finding.status == "refused" for finding in findings)
    if as_json:
        document = {"ok": not refused, "model": model, "findings": [f._asdict() for f in findings]}
        typer.echo(json.dumps(document))
    else:
        _print(findings, model, refused)
    raise typer.Exit(REFUSED if refused else 0)


def _not_a_flag(model: str) -> str:
    if model.startswith("-"):
        raise CommandError(
            f"MODEL: got {model!r}, wanted a model before the flags of vllm serve; write: "
            "rkv-vllm doctor MODEL -- FLAGS"
        )
    return model


def _print(findings: "list[Finding]", model: str | None, refused: bool) -> None:
    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    table.add_column(max_width=28)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for topic, group in groupby(filter(_is_told, findings), key=lambda finding: finding.topic):
        table.add_row(Text(topic, style="bold"))
        for each in group:
            status = Text(each.status, style=_STYLES[each.status])
            table.add_row(f"  {each.name}", status, Text(each.message))
    console.print(table)
    what = "compression" if model is None else f"{model} with compression"
    if refused:
        console.print(f"A start of {what} would be refused here.", style=_STYLES["refused"])
    else:
        console.print(f"Nothing here refuses a start of {what}.", style=_STYLES["ok"])


def _is_told(finding: "Finding") -> bool:
    """Everything but features that are refused and not in use; --json has them."""
    return finding.topic != "features" or finding.status != "ok"
