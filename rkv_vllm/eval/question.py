"""One problem, and the prompt that puts it to a model.

Next: problems.py, where problems come from; grade.py, which judges replies.
"""

from typing import NamedTuple


class Problem(NamedTuple):
    r"""One question with its reference answer.

    Attributes:
        set: the problem set as it was asked for, such as "math500:1-3".
        id: unique within the set, the same in every run; of a file, another after an edit.
        question: what is asked, without how to answer.
        answer: the reference; for "math" in LaTeX, without `\boxed`.
        grader: "math" (compared as mathematics) or "integer" (the last "Answer: N").
    """

    set: str
    id: str
    question: str
    answer: str
    grader: str


def prompt_of(problem: Problem) -> str:
    """Returns the user's message: the question, and the form of answer that its grader reads."""
    if problem.grader == "integer":
        how = "End your reply with a line that says `Answer:` and the number."
    else:
        how = "Please reason step by step, and put your final answer within \\boxed{}."
    return f"{problem.question}\n\n{how}"
