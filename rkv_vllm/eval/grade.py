"""Is a model's reply right? Finds the answer in the text and compares it with the reference.

Next: verifier.py, which compares as mathematics; statistics.py, which adds up.
"""

import atexit
import re
from functools import cache

from rkv_vllm.eval.question import Problem
from rkv_vllm.eval.verifier import Verifier

# What opens a box, escaped characters (the braces of a set are part of an answer), other braces.
_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
# Of a reply without a box: as much of its end as can hold the answer.
_TAIL_CHARACTERS = 1000
_NUMBER = r"([-+−]?)([0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+|[0-9]+)"
# "Answer: 12" up to the end of its line; stars, dollars and a box may stand around.
_INTEGER = re.compile(
    r"Answer\**:[\s*_`$]{0,9}(?:\\boxed\{)?" + _NUMBER + r"\}?[ \t*_`$.]*$", re.MULTILINE
)


def grade(problem: Problem, text: str) -> bool | None:
    """Returns whether a reply is right; None where it cannot be graded.

    It cannot where no answer is found, or where comparing it crashes or takes too long.

    Args:
        problem: its `grader` says how: "math" takes the last box, or without one the last answer
            that math-verify finds in the end of the text; "integer" the last "Answer: N".
        text: the reply, from any thread.

    Raises:
        ValueError: an unknown grader, or math-verify is not installed.
    """
    if problem.grader == "integer":
        return _is_integer(problem.answer, text)
    if problem.grader == "math":
        return _is_same_mathematics(problem.answer, text)
    raise ValueError(
        f"problem {problem.id}: got the grader {problem.grader!r}, wanted 'math' or 'integer'"
    )


def last_boxed(text: str) -> str | None:
    """Returns what stands in the last box that is closed and not empty; None without one."""
    # Where each brace that is still open began, and whether it is a box's.
    opened: list[tuple[int, bool]] = []
    found = (-1, "")
    for token in _BRACE.finditer(text):
        if token[0].endswith("{") and token[0] != r"\{":
            opened.append((token.end(), token[0] != "{"))
        elif token[0] == "}" and opened:
            start, is_box = opened.pop()
            # The last to begin: of boxes in each other the inner one.
            if is_box and start > found[0] and (content := text[start : token.start()].strip()):
                found = (start, content)
    return found[1] or None


def _is_same_mathematics(reference: str, text: str) -> bool | None:
    answer = last_boxed(text)
    if answer == reference.strip():
        return True
    if answer is not None:
        shown = f"\\boxed{{{answer}}}"
    elif not (shown := _tail(text)):
        return None
    return _verifier().compare(f"\\boxed{{{reference}}}", shown)


def _tail(text: str) -> str:
    """The last lines of a text; whole ones, lest formulas lose the sign that opens them."""
    text = text.strip()
    if len(text) <= _TAIL_CHARACTERS:
        return text
    tail = text[-_TAIL_CHARACTERS:]
    return tail.partition("\n")[2].strip() or tail


def _is_integer(reference: str, text: str) -> bool | None:
    answers = _INTEGER.findall(text)
    if not answers:
        return None
    return _canonical(*answers[-1]) == _canonical(*re.fullmatch(_NUMBER, reference).groups())


def _canonical(sign: str, digits: str) -> tuple[bool, str]:
    """Sign and digits; text, as the number that a loop writes may have thousands of them."""
    digits = re.sub(r"[,{}]", "", digits).lstrip("0")
    return sign in ("-", "−") and digits != "", digits


@cache
def _verifier() -> Verifier:
    verifier = Verifier()
    atexit.register(verifier.close)
    return verifier
