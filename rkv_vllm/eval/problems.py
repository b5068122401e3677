"""The problems of an evaluation: shipped, generated, or from a file of JSON lines.

Knows no model and no grading. Next: question.py, what a problem is; grade.py.
"""

import json
import re
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rkv_vllm.eval.programs import make_programs
from rkv_vllm.eval.question import Problem

_DATA = Path(__file__).resolve().parent / "data"
_SHIPPED = ("math500", "aime24")
_GENERATED = "trace"
# Lines that a generated program executes and how many programs there are, where nothing is said.
_TRACE_LINES = 20
_TRACE_COUNT = 100
_WANTED = (
    "math500, math500:1-3 (levels), aime24, trace, trace:40 (lines), or a file of JSON lines that "
    "ends in .jsonl"
)
_EXAMPLE = '{"question": "What is 2 + 3?", "answer": "5"}'


def load_problems(name_or_path: str, *, limit: int | None = None, seed: int = 0) -> list[Problem]:
    """Returns the problems of a set in an order that spreads difficulties.

    The first n of them are a sample: the seed and the ids decide it, whatever the order of the
    file, every level has its share of it, and a smaller sample is part of a larger one.

    Args:
        name_or_path: "math500", "math500:1-3" (levels), "aime24", "trace", "trace:40" (lines that
            each program executes), or a file of JSON lines with `question` and `answer`.
        limit: problems wanted at most; None for all.
        seed: of the sample, and of the generated programs.

    Raises:
        ValueError: an unknown set or filter, or a file that cannot be used, with the line.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit: got {limit}, wanted 1 or more; raise it or leave it out")
    name, _, choice = name_or_path.partition(":")
    if name == _GENERATED:
        return _generated(name_or_path, choice, limit, seed)
    if name in _SHIPPED:
        rows = list(_read(_DATA / f"{name}.jsonl"))
        rows = _of_levels(rows, name_or_path, choice)
        of_set, ids = name_or_path, [row["id"] for row in rows]
    elif name_or_path.endswith(".jsonl"):
        rows = list(_read(Path(name_or_path)))
        of_set, ids = Path(name_or_path).name, [_id_by_content(row) for row in rows]
    else:
        raise ValueError(f"--problems: got {name_or_path!r}, wanted {_WANTED}; correct it")
    problems = [
        Problem(of_set, identity, row["question"], row["answer"], "math")
        for identity, row in zip(ids, rows, strict=True)
    ]
    order = _spread([(row["id"], row.get("level")) for row in rows], seed)
    return [problems[i] for i in order[:limit]]


def _spread(ids_levels: Sequence[tuple[str, Any]], seed: int) -> list[int]:
    """Indices so ordered that every beginning has each level in proportion, drawn by the seed."""

    def draw(identity: str) -> str:
        return _digest(f"{seed}:{identity}")

    by_level: dict[Any, list[int]] = {}
    for i, (_, level) in enumerate(ids_levels):
        by_level.setdefault(level if isinstance(level, int) else None, []).append(i)
    ranked = []
    for members in by_level.values():
        members.sort(key=lambda i: draw(ids_levels[i][0]))
        # Where in its level a problem stands, 0 to 1: levels of any size interleave evenly.
        ranked += [((rank + 0.5) / len(members), i) for rank, i in enumerate(members)]
    return [i for _, i in sorted(ranked, key=lambda r: (r[0], draw(ids_levels[r[1]][0])))]


def _id_by_content(row: dict[str, Any]) -> str:
    """An id that a problem loses when it is edited: results of the old one are not its own."""
    return f"{row['id']}-{_digest(repr((row['question'], row['answer'])))}"


def _digest(text: str) -> str:
    # JSON can hold halves of surrogate pairs, which UTF-8 cannot.
    return blake2b(text.encode(errors="surrogatepass"), digest_size=6).hexdigest()


def _of_levels(rows: list[dict[str, Any]], asked: str, choice: str) -> list[dict[str, Any]]:
    if not choice and ":" not in asked:
        return rows
    match = re.fullmatch(r"(\d)(?:-(\d))?", choice)
    levels = {row.get("level") for row in rows} - {None}
    if not levels:
        raise ValueError(
            f"--problems: got {asked!r}, wanted {asked.partition(':')[0]} alone, whose problems "
            "have no levels; remove what follows the colon"
        )
    if match:
        first, last = int(match[1]), int(match[2] or match[1])
        kept = [row for row in rows if first <= row["level"] <= last]
        if {first, last} <= levels and kept:
            return kept
    raise ValueError(
        f"--problems: got {asked!r}, wanted levels from {min(levels)} to {max(levels)}, such as "
        "math500:3 or math500:1-3; correct them"
    )


def _generated(asked: str, choice: str, limit: int | None, seed: int) -> list[Problem]:
    if ":" in asked and not (choice.isascii() and choice.isdigit() and int(choice) > 0):
        raise ValueError(
            f"--problems: got {asked!r}, wanted how many lines each program executes, such as "
            "trace:40; correct it"
        )
    programs = make_programs(limit or _TRACE_COUNT, int(choice or _TRACE_LINES), seed)
    return [program._replace(set=asked) for program in programs]


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, each with `id`, `question` and `answer` as text."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--problems: got {error}, wanted a file of UTF-8 text; correct the path"
        ) from error
    line_of_id: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _checked(line, f"--problems: {path}, line {number}")
        first = line_of_id.setdefault(row["id"], number)
        if first != number:
            raise ValueError(
                f"--problems: {path}, line {number}: got the id (or, without ids, the question) "
                f"of line {first} again, wanted each once; remove it or give another id"
            )
        yield row
    if not line_of_id:
        raise ValueError(
            f"--problems: got {path}, which is empty, wanted a line for each problem, such as "
            f"{_EXAMPLE}; fill the file or name another"
        )


def _checked(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(
            f"{where}: got {line[:60]!r}, which is no JSON ({error}), wanted an object such as "
            f"{_EXAMPLE}; correct the line"
        ) from error
    if not isinstance(row, dict):
        raise ValueError(
            f"{where}: got {line[:60]!r}, wanted a JSON object such as {_EXAMPLE}; correct the line"
        )
    for column, kinds, wanted in (
        ("question", (str,), "text"),
        ("answer", (str, int, float), "text or a number"),
    ):
        if column not in row:
            raise ValueError(
                f"{where}: got the columns {', '.join(row) or '(none)'}, wanted {column!r} among "
                f"them, as in {_EXAMPLE}; add it or rename yours"
            )
        value = row[column]
        if isinstance(value, bool) or not isinstance(value, kinds) or not str(value).strip():
            raise ValueError(
                f"{where}: got {str(value)[:60]!r} ({type(value).__name__}) as {column!r}, wanted "
                f"{wanted}; correct the line"
            )
    identity = row.get("id")
    if identity is None:
        identity = _digest(row["question"])
    elif isinstance(identity, bool) or not isinstance(identity, str | int):
        raise ValueError(
            f"{where}: got {str(identity)[:60]!r} as 'id', wanted text or a whole number; correct "
            "the line"
        )
    return {**row, "id": str(identity), "answer": str(row["answer"])}
