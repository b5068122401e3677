"""The file of results: JSON lines, a card first, one more line whenever a request has ended.

An evaluation that is started again with the same file goes on where it stopped. Knows the keys that
tell one result from another, nothing else of what a line says. Next: report.py.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

CARD, RUN, FORCED, SPEED = "card", "run", "forced", "speed"
# Compactions of a side of a server, which has them in sums only.
COUNTS = "counts"
Line = dict[str, Any]
# What a result is the answer to.
_KEY = ("kind", "side", "set", "problem", "sample")


def key_of(line: Line) -> tuple[Any, ...]:
    """What tells a result from all others of a file."""
    return tuple(line[name] for name in _KEY)


class StoreError(Exception):
    """A result cannot be kept."""


class ResultStore:
    """Results in memory and in a file, appended and flushed one by one.

    Attributes:
        path: of the file.
        folder: beside it, for stock's forced passes; who writes them makes it.
        cards: of all starts, the oldest is the first line.
        lines: all others, in their order.
    """

    def __init__(self, path: Path, card: Line) -> None:
        """Opens the file, or makes it.

        Args:
            path: of the file.
            card: what the results depend on; those under "options" must be the file's.

        Raises:
            ValueError: a file of another kind, or results of other options.
            OSError: it cannot be read or written.
        """
        self.path = path
        self.folder = path.with_suffix(".forced")
        found = _read(path)
        if found:
            _check_same(path, found[0]["options"], card["options"])
        self.cards = [line for line in found if line["kind"] == CARD] + [{"kind": CARD, **card}]
        self.lines = [line for line in found[1:] if line["kind"] != CARD]
        self._done = {key_of(line): line for line in self.lines if line["kind"] in (RUN, FORCED)}
        self._file = path.open("ab", buffering=0)
        # When and with what it went on is part of the results.
        self._write(self.cards[-1])

    def append(self, line: Line) -> None:
        """Keep a line, in the file at once.

        Raises:
            StoreError: it cannot be written; the file ends with the line before.
        """
        try:
            self._write(line)
        except OSError as error:
            raise StoreError(
                f"--out: got {error.strerror} while writing {self.path}, wanted room for further "
                "results; make some and repeat the command, which goes on from there"
            ) from error
        self.lines.append(line)
        if line["kind"] in (RUN, FORCED):
            self._done[key_of(line)] = line

    def get(self, *key: Any) -> Line | None:
        """The result of that kind, side, set, problem and sample, if there is one."""
        return self._done.get(key)

    def _write(self, line: Line) -> None:
        left = (json.dumps(line, allow_nan=False) + "\n").encode()
        end = os.fstat(self._file.fileno()).st_size
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            # Of a line that does not fit nothing stays: another one may follow.
            with suppress(OSError):
                self._file.truncate(end)
            raise


def _read(path: Path) -> list[Line]:
    """The lines of a file; one that was cut short at its end is removed from it."""
    if not path.exists() or path.stat().st_size == 0:
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        os.truncate(path, len(whole))
    lines = []
    for number, line in enumerate(whole.decode("utf-8", errors="replace").splitlines(), start=1):
        try:
            lines.append(json.loads(line))
            lines[-1]["kind"]
        except (ValueError, KeyError, TypeError) as error:
            raise _not_ours(path, f"line {number}: {error}") from error
    if lines and (lines[0]["kind"] != CARD or "options" not in lines[0]):
        raise _not_ours(path, "no card in its first line")
    return lines


def _not_ours(path: Path, problem: str) -> ValueError:
    return ValueError(
        f"--out: got {path}, which is no file of results ({problem}), wanted one that rkv-vllm "
        "eval has written, or none yet; change the path"
    )


def _check_same(path: Path, there: Line, here: Line) -> None:
    for name in sorted({*there, *here}):
        if there.get(name) != here.get(name):
            raise ValueError(
                f"--out: got {path}, whose results have {name} = {there.get(name)!r}, wanted the "
                f"{here.get(name)!r} of this command; name another file, or repeat the options "
                "of that one"
            )
