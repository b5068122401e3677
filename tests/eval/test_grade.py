"""Grades: the forms that right answers take, what is no answer, and what must not hang."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from rkv_vllm.eval import grade as grading
from rkv_vllm.eval.grade import grade, last_boxed
from rkv_vllm.eval.problems import load_problems
from rkv_vllm.eval.question import Problem

pytest.importorskip("math_verify")


def graded(answer, text, grader="math"):
    return grade(Problem("set", "1", "?", answer, grader), text)


@pytest.mark.parametrize("name", ["math500", "aime24"])
def test_every_reference_is_right_by_its_own_measure(name):
    # Not through grade(), which does not ask where the texts are equal.
    compare = grading._verifier().compare
    boxes = [f"\\boxed{{{problem.answer}}}" for problem in load_problems(name)]
    assert [box for box in boxes if compare(box, box) is not True] == []


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        (r"\frac43", r"\dfrac{4}{3}"),
        (r"\frac{1}{2}", "0.5"),
        (r"\frac 59", "5/9"),
        (r"1\frac{4}{5}", r"\frac{9}{5}"),
        (r"137 \frac{1}{2}", "137.5"),
        (r"-\frac{35}{9}", r"\frac{-35}{9}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        ("1,-2", "-2, 1"),
        (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}"),
        (r"\{1\pm\sqrt{5},-2\}", r"\{-2, 1+\sqrt{5}, 1-\sqrt{5}\}"),
        ("(3,4]", r"\left(3,4\right]"),
        (r"(0,9) \cup (9,36)", r"(9,36)\cup(0,9)"),
        (r"x \in [-2,7]", "[-2,7]"),
        ("x=5", "5"),
        ("y = 2x + 3", "2x+3"),
        (r"90^\circ", "90"),
        (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}^\circ"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"\text{(C)}", "C"),
        (r"\begin{pmatrix} -2 \\ 16 \end{pmatrix}", r"\begin{bmatrix} -2 \\ 16 \end{bmatrix}"),
        (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}",
         r"\begin{pmatrix} \frac15 \\ -\frac{18}{5} \end{pmatrix}"),
        (r"10,\!080", "10080"),
        ("58,500", "58{,}500"),
        (r"\$18.90", "18.9"),
        (r"864 \mbox{ inches}^2", r"864\text{ in}^2"),
        ("52_8", "52_{8}"),
        ("025", "25"),
        (r"\cot x", r"\frac{\cos x}{\sin x}"),
        ("(a+5)(b+2)", "(b+2)(a+5)"),
    ],
)  # fmt: skip
def test_the_same_answer_in_another_form_is_right(reference, answer):
    assert graded(reference, f"Thus $\\boxed{{{answer}}}$.") is True


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        (r"\frac{1}{3}", "0.333"),
        ("(3,4]", "(3,4)"),
        ("(-2,1)", "(1,-2)"),
        ("3, 5, 7", "3, 5"),
        (r"\text{even}", r"\text{odd}"),
        (r"\begin{pmatrix} -2 \\ 16 \end{pmatrix}", r"\begin{pmatrix} 16 \\ -2 \end{pmatrix}"),
        ("p - q", "q - p"),
        ("52_8", "42"),
        ("5", r"5 \text{ or } 6"),
        ("204", "203"),
    ],
)
def test_another_answer_is_wrong(reference, answer):
    assert graded(reference, f"Thus $\\boxed{{{answer}}}$.") is False


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (r"First \boxed{4}, no: \boxed{5}.", True),
        (r"First \boxed{5}, no: \boxed{4}.", False),
        # The last one was cut off; the reply repeats the form it was asked for.
        (r"\boxed{5} and again \boxed{", True),
        (r"I put it within \boxed{5}, as \boxed{} asks.", True),
        ("The answer is $5$.", True),
        ("The answer is **5**.", True),
        ("Since 2 + 2 = 4, the answer is\n$$\\frac{10}{2}$$", True),
        ("The answer is $4$.", False),
        ("Let me think about it.", None),
        ("", None),
    ],
)
def test_the_last_box_wins_and_without_one_the_end_counts(text, verdict):
    assert graded("5", text) is verdict


def test_a_reply_without_a_box_is_read_at_its_end_only():
    assert graded("5", "I see.\nThe answer is $5$.\n" + "and so on\n" * 200) is None
    assert graded("5", "and so on\n" * 200 + "The answer is $5$.") is True


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{7\}", None),
        ("boxed{7}", None),
    ],
)
def test_a_box_ends_where_its_brace_closes(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Answer: 1234", True),
        ("**Answer: 1234**", True),
        ("**Answer:** 1,234", True),
        ("## Answer**: `1234`.", True),
        (r"Answer: $\boxed{1{,}234}$.", True),
        ("Answer: 01234\n", True),
        ("Answer: +1234\nThat is all.", True),
        ("Answer: 4\nAnswer: 1234", True),
        ("Answer: 1234\nAnswer: 4", False),
        ("Answer: 1234\nAnswer: ", True),
        ("Answer: -1234", False),
        ("Answer: " + "1" * 6000, False),
        # Strict where a guess would have to be made.
        ("Answer: 1234.5", None),
        ("Answer: 12,34", None),
        ("Answer: 1234 or 5", None),
        ("Answer: x = 1234", None),
        ("Answer: N", None),
        ("The answer is 1234", None),
        (r"\boxed{1234}", None),
        ("", None),
    ],
)
def test_an_integer_is_the_last_answer_line(text, verdict):
    assert graded("1234", text, "integer") is verdict


def test_signs_and_zero():
    assert graded("-7", "Answer: −7", "integer") is True
    assert graded("0", "Answer: -0", "integer") is True
    assert graded("7", "Answer: -7", "integer") is False


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", [r"\boxed{" * 30_000, "{" * 100_000, "Wait, " * 30_000])
def test_a_loop_is_read_in_time(text):
    assert graded("5", text) is None
    assert graded("5", text, "integer") is None


def test_an_answer_that_hangs_is_ungraded_and_the_next_one_is_graded():
    assert graded("5", r"\boxed{9^{9^{9^{9}}}}") is None
    assert graded("5", r"\boxed{\frac{10}{2}}") is True


def test_the_child_dying_costs_one_grade():
    assert graded("5", r"\boxed{\frac{10}{2}}") is True
    child = grading._verifier()._child
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert graded("5", r"\boxed{\frac{10}{2}}") is None
    assert graded("5", r"\boxed{\frac{10}{2}}") is True


def test_any_thread_may_grade():
    def of(number):
        assert threading.current_thread() is not threading.main_thread()
        # Every other one is wrong: replies that are mixed up show.
        return graded(str(number - number % 2), rf"\boxed{{\frac{{{2 * number}}}{{2}}}}")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(of, range(200))) == [True, False] * 100


def test_an_unknown_grader_is_refused():
    with pytest.raises(ValueError, match="got the grader 'exact'"):
        graded("5", "5", "exact")


def test_grading_imports_neither_torch_nor_vllm_nor_sympy():
    code = (
        "import sys; from rkv_vllm.eval.grade import grade\n"
        "from rkv_vllm.eval.question import Problem\n"
        r"assert grade(Problem('s', '1', '?', '5', 'math'), r'\boxed{\frac{10}{2}}')" "\n"
        "print(sorted({'torch', 'vllm', 'sympy'} & set(sys.modules)))"
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
