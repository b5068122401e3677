"""Sizes of memory as people write them: "80GiB", "24GB", plain bytes."""

from rkv_vllm.cli.errors import CommandError


def parse_size(name: str, text: str, smallest: int = 1) -> int:
    """Returns a size in bytes, rounded down.

    Args:
        name: the option, for the message.
        text: a number with or without a unit, binary or decimal; upper or lower case.
        smallest: the least number of bytes that is accepted.

    Raises:
        CommandError: no such size.
    """
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        size = -1
    if size < smallest:
        raise CommandError(
            f"{name}: got {text!r}, wanted a size of memory, at least {smallest}; write it like "
            "80GiB (binary), 24GB (decimal) or as a number of bytes"
        )
    return size


def format_size(num_bytes: float) -> str:
    """Returns a size in the binary unit that suits it."""
    from pydantic import ByteSize

    return ByteSize(num_bytes).human_readable(separator=" ")
