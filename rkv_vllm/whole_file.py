"""Files that are written whole or not at all, and whether they could be: found out by trying.

Knows neither options nor what the files hold; the standard library alone.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# A disk that is full takes empty files.
_TRIED_BYTES = 1 << 16


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields where to write what becomes `path` when the block ends.

    An error or an interrupt leaves an older file as it was, and no other. The name yielded ends
    like that of `path`.

    Raises:
        OSError: it cannot be written.
    """
    half = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield half
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


def what_is_missing(path: Path) -> str | None:
    """What a path lacks for a file to be written there, None if nothing; leaves no trace."""
    if path.is_dir():
        return "a file, not a folder"
    if not path.parent.is_dir():
        return "a file in a folder that exists"
    if path.exists() and not os.access(path, os.W_OK):
        return "a file that may be replaced"
    try:
        with tempfile.TemporaryFile(dir=path.parent) as tried:
            tried.write(bytes(_TRIED_BYTES))
    except OSError as error:
        return f"a folder that can be written to ({error.strerror})"
    return None
