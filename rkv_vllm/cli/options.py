"""Options as the commands declare them, and the arguments that several commands share."""

from typing import Annotated, Any

import typer

RKV = "R-KV (as for vllm serve)"
MODEL_HELP = "Folder with config.json, or a hub id in the local cache."
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DTYPES = ("auto", *DTYPE_BYTES)


def option(panel: str, metavar: str, meaning: str, *flags: str, **settings: Any) -> Any:
    """An option under a heading of `--help`."""
    return typer.Option(*flags, rich_help_panel=panel, metavar=metavar, help=meaning, **settings)


def tokens(panel: str, meaning: str, *flags: str) -> Any:
    """An option that is a length, at least 1 token."""
    return option(panel, "TOKENS", meaning, *flags, min=1)
