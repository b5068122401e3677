"""The file of results: what was written is there again, and nothing else is added to it."""

import json

import pytest

from rkv_vllm.eval.store import ResultStore

CARD = {"kind": "card", "date": "today", "options": {"model": "m", "seed": 0}}


def line(problem="p", side="stock", **more):
    names = {"kind": "run", "side": side, "set": "s", "problem": problem, "sample": 0}
    return {**names, "text": "é\n\u2028", **more}


def opened(path, **options):
    return ResultStore(path, {**CARD, "options": {**CARD["options"], **options}})


def lines_in(path):
    return [json.loads(text) for text in path.read_bytes().splitlines()]


def test_what_was_written_is_there_again(tmp_path):
    path = tmp_path / "out.jsonl"
    store = opened(path)
    store.append(line())
    # No close: each line is in the file at once.
    again = opened(path)
    assert again.get("run", "stock", "s", "p", 0) == line()
    assert again.get("forced", "stock", "s", "p", 0) is None
    assert again.get("run", "rkv 64", "s", "p", 0) is None
    assert again.lines == [line()]
    again.append(line("q"))
    kinds = [each["kind"] for each in lines_in(path)]
    assert kinds == ["card", "run", "card", "run"]
    assert [each["problem"] for each in opened(path).lines] == ["p", "q"]


def test_a_line_that_was_cut_short_is_dropped(tmp_path):
    path = tmp_path / "out.jsonl"
    store = opened(path)
    store.append(line())
    store.append(line("q"))
    path.write_bytes(path.read_bytes()[:-7])
    again = opened(path)
    assert [each["problem"] for each in again.lines] == ["p"]
    again.append(line("r"))
    assert [each["problem"] for each in opened(path).lines] == ["p", "r"]


def test_a_file_with_nothing_but_half_a_card_begins_anew(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text('{"kind": "card", "opt')
    store = opened(path)
    store.append(line())
    assert [each["kind"] for each in lines_in(path)] == ["card", "run"]


def test_results_of_other_options_are_refused_and_the_difference_is_named(tmp_path):
    path = tmp_path / "out.jsonl"
    opened(path).append(line())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="whose results have seed = 0, wanted the 3"):
        opened(path, seed=3)
    with pytest.raises(ValueError, match=r"whose results have top_p = None, wanted the 0\.9"):
        opened(path, top_p=0.9)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "text", ['{"question": "x"}\n', "[1]\n", "no JSON\n", '{"kind": "run"}\n', '"text"\n']
)
def test_a_file_of_another_kind_is_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "out.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="which is no file of results"):
        opened(path)
    assert path.read_text() == text
