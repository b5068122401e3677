"""One option as a dataclass field; its metadata is all that flags, JSON and help are made from.

A method declares its options as a frozen dataclass whose fields are made by `option`. Knows
neither vLLM nor torch nor argparse. Next: methods/rkv.py for an example.
"""

from collections.abc import Callable
from dataclasses import field
from typing import Any


def option(
    default: Any,
    meaning: str,
    *,
    flag: str | None = None,
    metavar: str | None = None,
    wanted: str | None = None,
    accepts: Callable[[Any], bool] | None = None,
    per_request: bool = False,
) -> Any:
    """Declare an option: a dataclass field with a default and what users are told of it.

    Args:
        default: value when the option is left out; its type is the option's.
        meaning: one sentence for `--help`, with the unit.
        flag: spelling on the command line, None for an option without a flag of its own.
        metavar: placeholder of the value in `--help`.
        wanted: the values that are accepted, in words, with the unit.
        accepts: tells an accepted value from another one of the right type; False for NaN. None
            accepts all.
        per_request: whether a request may bring a value of its own.

    Returns:
        The field.
    """
    metadata = {
        "meaning": meaning,
        "flag": flag,
        "metavar": metavar,
        "wanted": wanted,
        "accepts": accepts,
        "per_request": per_request,
    }
    return field(default=default, metadata=metadata)
