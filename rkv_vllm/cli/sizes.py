"""Sizes of memory as people write them: "80GiB", "24GB", plain bytes."""

import re

from rkv_vllm.cli.errors import CommandError

UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
}
_BY_LOWER_CASE = {unit.lower(): factor for unit, factor in UNITS.items()}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(name: str, text: str, smallest: int = 1) -> int:
    """Returns a size in bytes, rounded down.

    Args:
        name: the option, for the message.
        text: a number with or without one of `UNITS`; upper or lower case.
        smallest: the least number of bytes that is accepted.

    Raises:
        CommandError: no such size.
    """
    match = _SIZE.fullmatch(text)
    factor = _BY_LOWER_CASE.get(match[2].lower()) if match else None
    if factor is None or int(float(match[1]) * factor) < smallest:
        least = "" if smallest == 1 else f", at least {smallest}"
        raise CommandError(
            f"{name}: got {text!r}, wanted a size of memory{least}; write it like 80GiB (binary), "
            "24GB (decimal) or as a number of bytes"
        )
    # Whole numbers stay exact beyond what a float holds.
    return int(match[1]) * factor if match[1].isdigit() else int(float(match[1]) * factor)


def format_size(num_bytes: float) -> str:
    """Returns a size with three digits and the binary unit that suits it."""
    unit = "B"
    for prefix in ("KiB", "MiB", "GiB", "TiB"):
        if abs(num_bytes) < 1024:
            break
        num_bytes, unit = num_bytes / 1024, prefix
    return f"{num_bytes:,.0f} {unit}" if unit == "B" else f"{num_bytes:,.2f} {unit}"
