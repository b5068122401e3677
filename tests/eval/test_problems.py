"""Problem sets: what ships, samples that stay the same, files that cannot be used."""

import io
import json
import random
import re
from collections import Counter
from contextlib import redirect_stdout

import pytest

from rkv_vllm.eval.problems import load_problems
from rkv_vllm.eval.programs import make_programs
from rkv_vllm.eval.question import Problem, prompt_of

ROW = {"question": "What is 2 + 3?", "answer": "5"}


def written(tmp_path, *rows):
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize(
    ("name", "count"), [("math500", 500), ("math500:1-3", 238), ("math500:5", 134), ("aime24", 30)]
)
def test_sets_that_ship_are_whole(name, count):
    problems = load_problems(name)
    assert len({problem.id for problem in problems}) == len(problems) == count
    assert {(problem.set, problem.grader) for problem in problems} == {(name, "math")}
    assert all(problem.question and problem.answer for problem in problems)


def test_levels_are_those_asked_for():
    easy, rest = load_problems("math500:1-3"), load_problems("math500:4-5")
    every = {problem.id for problem in load_problems("math500")}
    assert {p.id for p in easy} | {p.id for p in rest} == every
    assert len(easy) + len(rest) == len(every)


def test_a_sample_has_every_level_in_proportion():
    level_of = {p.id: level for level in range(1, 6) for p in load_problems(f"math500:{level}")}
    sample = load_problems("math500", limit=50, seed=7)
    assert Counter(level_of[p.id] for p in sample) == {1: 4, 2: 9, 3: 11, 4: 13, 5: 13}


def test_a_sample_depends_on_the_seed_and_not_on_the_order_of_the_file(tmp_path):
    rows = [{**ROW, "id": i, "level": i % 3} for i in range(40)]
    path = written(tmp_path, *rows)
    sample = load_problems(str(path), limit=10, seed=1)
    assert load_problems(str(path), limit=20, seed=1)[:10] == sample
    assert load_problems(str(path), limit=10, seed=2) != sample
    random.Random(0).shuffle(rows)
    assert load_problems(str(written(tmp_path, *rows)), limit=10, seed=1) == sample


@pytest.mark.parametrize("edited", [{"answer": "6"}, {"question": "What is 2 + 4?"}])
def test_a_problem_that_was_edited_is_another_one_in_the_same_place(tmp_path, edited):
    rows = [{**ROW, "id": i} for i in range(9)]
    before = load_problems(str(written(tmp_path, *rows)))
    assert load_problems(str(written(tmp_path, *rows))) == before
    rows[4].update(edited)
    after = load_problems(str(written(tmp_path, *rows)))
    changed = [i for i in range(9) if before[i] != after[i]]
    assert [before[i].id != after[i].id for i in changed] == [True]
    assert before[changed[0]].id.startswith("4-")


def test_a_file_needs_only_question_and_answer(tmp_path):
    path = written(tmp_path, {**ROW, "source": None}, "", {"question": "1 + 1?", "answer": 2})
    by_answer = {problem.answer: problem for problem in load_problems(str(path))}
    assert by_answer["5"]._replace(id="") == Problem("own.jsonl", "", ROW["question"], "5", "math")
    assert by_answer["2"].question == "1 + 1?"
    assert by_answer["2"].id != by_answer["5"].id


@pytest.mark.parametrize(
    ("rows", "line", "got"),
    [
        ((ROW, "{'question': 1}"), 2, "no JSON"),
        ((ROW, "[1]"), 2, "'[1]'"),
        ((ROW, "", {"problem": "?", "answer": "1"}), 3, "the columns problem, answer"),
        (({"question": "?"},), 1, "wanted 'answer' among them"),
        (({"question": 5, "answer": "1"},), 1, "'5' (int) as 'question'"),
        (({"question": "?", "answer": None},), 1, "'None' (NoneType) as 'answer'"),
        (({"question": "?", "answer": True},), 1, "'True' (bool) as 'answer'"),
        (({"question": " ", "answer": "1"},), 1, "as 'question'"),
        (({**ROW, "id": [1]},), 1, "'[1]' as 'id'"),
        (({**ROW, "id": 1}, {**ROW, "id": "1"}), 2, "of line 1 again"),
        ((ROW, ROW), 2, "of line 1 again"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, rows, line, got):
    path = written(tmp_path, *rows)
    with pytest.raises(ValueError, match="wanted") as caught:
        load_problems(str(path))
    message = str(caught.value)
    assert message.startswith(f"--problems: {path}, line {line}: got ")
    assert got in message


def test_a_file_that_is_missing_empty_or_no_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"No such file.*correct the path"):
        load_problems(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="which is empty"):
        load_problems(str(written(tmp_path, "", " ")))
    (tmp_path / "own.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"wanted a file of UTF-8 text"):
        load_problems(str(tmp_path / "own.jsonl"))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("math5000", "wanted math500, math500:1-3 .levels., aime24"),
        ("math500:0", "wanted levels from 1 to 5"),
        ("math500:0-3", "wanted levels"),
        ("math500:4-7", "wanted levels"),
        ("math500:3-1", "wanted levels"),
        ("math500:", "wanted levels"),
        ("math500:hard", "wanted levels"),
        ("aime24:1", "wanted aime24 alone"),
        ("trace:x", "wanted how many lines"),
        ("trace:0", "wanted how many lines"),
    ],
)
def test_an_unknown_set_is_refused_with_what_exists(name, wanted):
    with pytest.raises(ValueError, match=wanted):
        load_problems(name)


def test_a_limit_below_one_is_refused():
    with pytest.raises(ValueError, match="--limit: got 0"):
        load_problems("aime24", limit=0)


def test_generated_programs_have_a_length_and_a_number():
    problems = load_problems("trace:12", limit=3, seed=5)
    assert problems == [p._replace(set="trace:12") for p in make_programs(3, 12, 5)]
    assert load_problems("trace:12", limit=5, seed=5)[:3] == problems
    assert not {p.question for p in problems} & {p.question for p in make_programs(3, 12, 6)}
    assert {problem.grader for problem in problems} == {"integer"}
    assert len(load_problems("trace")) >= 50


@pytest.mark.parametrize("num_steps", [1, 2, 40])
def test_a_generated_program_prints_its_answer_and_begins_as_its_prompt_says(num_steps):
    for problem in make_programs(20, num_steps, 5):
        program = problem.question.partition("```python\n")[2].partition("```")[0]
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(program, found := {})
        assert printed.getvalue() == f"{problem.answer}\n"
        assert len(found["x"]) == num_steps
        total = int(re.search("total = ([0-9]+)", program)[1])
        for i, x in list(found["x"].items())[:2]:
            total += x
            assert f"\ni={i}: x[i]={x}, total={total}\n" in problem.question


def test_prompts_ask_for_what_the_grader_reads():
    problem = Problem("s", "1", "How many?", "5", "math")
    assert prompt_of(problem).startswith("How many?\n")
    assert "\\boxed{}" in prompt_of(problem)
    assert "`Answer:`" in prompt_of(problem._replace(grader="integer"))
