"""What an evaluation says: comparisons over shared problems, refusals, tables."""

import json
import re
from dataclasses import replace

import pytest

from rkv_vllm.eval.report import has_failed, make_document
from rkv_vllm.eval.tables import print_report
from tests.eval.results import (
    OLDEST,
    RKV,
    STOCK,
    forced_line,
    lines_of,
    new_plan,
    new_side,
    run_line,
    speed_line,
)

CARD = {
    "command": "rkv-vllm eval " + "--flag " * 40,
    "model": "folder/of/model",
    "options": {"methods": "rkv[a=1]"},
}
CHANCES = {STOCK: 0.8, RKV: 0.8, OLDEST: 0.2}


def result_of(plan, lines, failure=None):
    document = make_document(CARD, plan, lines, failure)
    # What is printed as JSON must come back as it is.
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    (result,) = document["results"]
    return result


def by_name(sides):
    return {side["side"]: side for side in sides}


def printed(plan, lines, capsys, failure=None):
    print_report(make_document(CARD, plan, lines, failure))
    return capsys.readouterr().out


def test_a_method_that_keeps_the_oldest_is_found_worse_and_an_equal_one_is_not():
    plan = new_plan()
    result = result_of(plan, lines_of(plan, CHANCES))
    assert (result["failed_checks"], result["unfinished"]) == ([], [])
    sides = by_name(result["sides"])
    assert sides["oldest 128"]["against_stock"]["difference"]["high"] < -0.3
    assert sides["oldest 128"]["against_stock"]["ratio"]["high"] < 0.7
    assert sides[RKV.name]["against_stock"] == {
        "num_problems": 40,
        "difference": {"mean": 0, "low": 0, "high": 0},
        "ratio": {"mean": 1, "low": 1, "high": 1},
        "output_len_ratio": {"mean": 1, "low": 1, "high": 1},
    }
    assert "against_stock" not in sides["stock"]
    accuracy = sides["oldest 128"]["accuracy"]
    assert 0 < accuracy["low"] < accuracy["mean"] < accuracy["high"] < 0.5
    assert not has_failed({"results": [result]})


def test_the_document_names_what_a_plot_sorts_by():
    sides = by_name(result_of(new_plan(), lines_of(new_plan(), CHANCES))["sides"])
    named = {key: sides[RKV.name][key] for key in ("side", "method", "budget", "protect")}
    assert named == {
        "side": "rkv[center=true] 128 +prompt",
        "method": "rkv[center=true]",
        "budget": 128,
        "protect": "prompt",
    }


def test_what_happened_to_the_requests_is_counted():
    plan = new_plan((STOCK, RKV), num_problems=4)
    lines = [run_line(STOCK, f"p{i}") for i in range(4)] + [
        run_line(RKV, "p0", is_correct=None, finish="length", is_looping=True, output_len=1000),
        run_line(RKV, "p1", is_correct=False, compactions=0, evicted=0),
        run_line(RKV, "p2", compactions=5, evicted=500),
        run_line(RKV, "p3"),
    ]
    side = by_name(result_of(plan, lines)["sides"])[RKV.name]
    assert side["accuracy"]["mean"] == 0.5
    assert side["against_stock"]["ratio"]["mean"] == 0.5
    assert side["output_len"] == (1000 + 3 * 400) / 4
    assert side["against_stock"]["output_len_ratio"]["mean"] == 2200 / 1600
    shares = {name: side[name] for name in ("cut_off", "looping", "ungraded", "compacted")}
    assert shares == {"cut_off": 0.25, "looping": 0.25, "ungraded": 0.25, "compacted": 0.75}
    assert (side["compactions"], side["evicted"]) == (11 / 4, 1100 / 4)


def test_a_side_without_compactions_is_refused_and_has_no_numbers(capsys):
    plan = new_plan()
    lines = lines_of(plan, CHANCES) + [speed_line(side, 10.0) for side in plan.sides]
    for line in lines:
        if line["side"] == "oldest 128":
            line.update(compactions=0, evicted=0)
    result = result_of(plan, lines)
    assert has_failed({"results": [result]})
    assert [side["side"] for side in result["sides"]] == ["stock", RKV.name]
    assert result["speeds"].keys() == {"stock", RKV.name}
    (problem,) = result["failed_checks"]
    assert problem.startswith("oldest 128: 0 compactions in 40 requests, ")
    shown = printed(plan, lines, capsys)
    assert problem in shown
    assert len(re.findall("oldest 128", shown)) == 1


def test_loops_that_nobody_could_look_for_are_not_said_to_be_none(capsys):
    plan = new_plan((STOCK, RKV), num_problems=4)
    lines = lines_of(plan, CHANCES)
    for line in lines:
        if line["side"] == STOCK.name:
            line["is_looping"] = None
        elif line["problem"] != "p0":
            line["is_looping"] = line["problem"] == "p1"
        else:
            line["is_looping"] = None
    sides = by_name(result_of(plan, lines)["sides"])
    assert sides[STOCK.name]["looping"] is None
    assert sides[RKV.name]["looping"] == 1 / 3
    shown = printed(plan, lines, capsys)
    row = [line for line in shown.splitlines() if line.startswith("│ stock ")][1]
    assert [cell.strip() for cell in row.split("│")][5] == "-"


def test_how_much_of_the_prompts_is_protected_is_said(capsys):
    sides = (STOCK, RKV, new_side("snapkv", 128, "prompt"), new_side("rkv", 40, "prompt"), OLDEST)
    plan = new_plan(sides, num_problems=4)
    lines = lines_of(plan, dict.fromkeys(sides, 0.5))
    of_stock = [line for line in lines if line["side"] == "stock"]
    for line, length in zip(of_stock, (20, 96, 97, 300), strict=True):
        line["prompt_len"] = length
    assert result_of(plan, lines)["protected"] == {
        "40": {"most_tokens": 30, "tokens": (20 + 3 * 30) / 4, "whole": 0.25},
        "128": {"most_tokens": 96, "tokens": (20 + 3 * 96) / 4, "whole": 0.5},
    }
    shown = printed(plan, lines, capsys)
    assert "128 +prompt: of a prompt the first 96 tokens at most, 77 on average; the whole" in shown
    assert "in 50 % of the requests" in shown
    assert result_of(new_plan((STOCK, OLDEST)), lines)["protected"] == {}
    assert result_of(plan, [])["protected"] == {}


def test_one_compaction_is_enough_for_a_side():
    plan = new_plan((STOCK, RKV), num_problems=5)
    lines = lines_of(plan, CHANCES)
    for line in lines:
        line["compactions"] = int(line["side"] == RKV.name and line["problem"] == "p3")
    result = result_of(plan, lines)
    assert result["failed_checks"] == []
    assert by_name(result["sides"])[RKV.name]["compacted"] == 0.2


def test_a_stock_that_was_compacted_leaves_nothing_to_compare_with():
    plan = new_plan()
    lines = lines_of(plan, CHANCES)
    lines[0].update(compactions=2)
    result = result_of(plan, lines)
    assert result["failed_checks"] == ["stock: 2 compactions, wanted none"]
    assert (result["sides"], result["speeds"]) == ([], {})


def test_only_what_both_sides_finished_is_compared(capsys):
    plan = new_plan((STOCK, RKV), num_problems=4, samples=2)
    # The side is right where stock never came; stock is right where the side never came.
    lines = [
        *(run_line(STOCK, problem, 0) for problem in ("p0", "p1", "p2")),
        run_line(STOCK, "p0", 1, is_correct=False),
        run_line(RKV, "p0", 0, is_correct=False),
        run_line(RKV, "p1", 0),
        *(run_line(RKV, "p3", sample) for sample in (0, 1)),
    ]
    result = result_of(plan, lines, "interrupted")
    stock, side = result["sides"]
    assert (stock["num_problems"], stock["accuracy"]["mean"]) == (3, (0.5 + 1 + 1) / 3)
    assert (side["num_problems"], side["num_requests"], side["accuracy"]["mean"]) == (2, 2, 0.5)
    assert side["against_stock"]["difference"]["mean"] == -0.5
    assert result["unfinished"] == [
        "stock: 4 of 8 requests finished",
        f"{RKV.name}: 4 of 8 requests finished",
    ]
    shown = printed(plan, lines, capsys, "interrupted")
    assert "Not all runs finished: interrupted" in shown
    assert "stock: 4 of 8 requests finished" in shown
    assert "made-up: 4 problems x 2 samples" in shown


def test_results_that_nobody_asked_for_are_left_out():
    plan = new_plan((STOCK, RKV), num_problems=5)
    lines = lines_of(plan, CHANCES)
    others = [
        *(run_line(side, "p7", is_correct=False) for side in plan.sides),
        *(run_line(side, "p1", 1, is_correct=False) for side in plan.sides),
        run_line(OLDEST, "p1", is_correct=False),
        run_line(RKV, "p1", is_correct=False, set="another"),
        {"kind": "card", "options": {}},
    ]
    assert result_of(plan, others + lines) == result_of(plan, lines)


def test_the_last_result_of_a_request_counts_and_their_order_does_not():
    plan = new_plan((STOCK, OLDEST), num_problems=10)
    lines = lines_of(plan, CHANCES)
    for i, line in enumerate(lines):
        line["output_len"] = 100 + i**2
    again = [run_line(OLDEST, "p1", is_correct=not lines[3]["is_correct"]), *lines]
    assert result_of(plan, again) == result_of(plan, lines) == result_of(plan, lines[::-1])


def test_speeds_are_compared_round_by_round():
    plan = new_plan((STOCK, RKV), num_problems=5)
    lines = [
        *lines_of(plan, CHANCES),
        speed_line(STOCK, 10.0, 1), speed_line(RKV, 8.0, 1),
        speed_line(STOCK, 20.0, 2), speed_line(RKV, 10.0, 2),
        # Went on after a break: two parts on one side, one part lost on the other.
        speed_line(STOCK, 10.0, 3), speed_line(RKV, 3.0, 3, num_requests=5, output_tokens=2000),
        speed_line(RKV, 2.0, 3, num_requests=5, output_tokens=2000),
        speed_line(STOCK, 10.0, 4), speed_line(RKV, 1.0, 4, num_requests=9),
    ]  # fmt: skip
    speeds = result_of(plan, lines)["speeds"]
    assert speeds["stock"]["tokens_per_s"] == 16000 / 50
    assert speeds[RKV.name]["tokens_per_s"] == 16000 / 24
    assert speeds[RKV.name]["pairs"] == [1.25, 2.0, 2.0]
    assert speeds[RKV.name]["ratio"] == 2.0


def test_forced_text_is_judged_by_token(capsys):
    plan = new_plan((STOCK, RKV), num_problems=2, is_free=False, is_forced=True)
    lines = [
        *(run_line(STOCK, problem) for problem in ("p0", "p1")),
        *(forced_line(STOCK, problem) for problem in ("p0", "p1")),
        forced_line(RKV, "p0"),
        forced_line(RKV, "p1", num_tokens=100, num_agree=50, kl=90.0, nll=130.0, stock_nll=80.0),
    ]
    result = result_of(plan, lines)
    # No free text was asked of the side: none is missing.
    assert (result["failed_checks"], result["unfinished"]) == ([], [])
    assert [side["side"] for side in result["sides"]] == ["stock"]
    stock, side = result["forced"]
    assert side["num_tokens"] == 400
    assert side["agreement"]["mean"] == (270 + 50) / 400
    assert side["kl"]["mean"] == pytest.approx((60 + 90) / 400)
    assert side["nll_difference"]["mean"] == pytest.approx((330 - 240 + 130 - 80) / 400)
    assert side["kl"]["low"] == pytest.approx(0.2)
    assert side["kl"]["high"] == pytest.approx(0.9)
    assert (stock["kl"], stock["num_tokens"]) == (None, 0)
    assert stock["all_agreement"]["mean"] == 399 / 400
    shown = printed(plan, lines, capsys)
    assert "80.0 [50.0, 90.0]" in shown
    assert "0.375 [0.200, 0.900]" in shown
    assert "agrees in 99.75 % of 800 tokens" in shown


def test_forced_text_that_compacted_nothing_is_refused_on_its_own():
    plan = new_plan((STOCK, RKV), num_problems=1, is_forced=True)
    lines = [
        run_line(STOCK, "p0"), run_line(RKV, "p0"), forced_line(STOCK, "p0"),
        forced_line(RKV, "p0", compactions=0, evicted=0, num_tokens=0),
    ]  # fmt: skip
    result = result_of(plan, lines)
    (problem,) = result["failed_checks"]
    assert problem.startswith(f"{RKV.name}: 0 compactions in 1 requests of forced text")
    assert [side["side"] for side in result["sides"]] == ["stock", RKV.name]
    assert [side["side"] for side in result["forced"]] == ["stock"]


def test_the_tables_say_what_the_document_says(capsys):
    plan = new_plan((STOCK, RKV), num_problems=5)
    lines = lines_of(plan, {STOCK: 2.0, RKV: 2.0})
    for line in lines:
        if line["side"] == RKV.name and line["problem"] == "p0":
            line.update(is_correct=None, finish="length", is_looping=True, compactions=0)
    lines += [speed_line(STOCK, 10.0), speed_line(RKV, 8.0)]
    shown = printed(plan, lines, capsys)
    row = next(line for line in shown.splitlines() if line.startswith(f"│ {RKV.name} "))
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[1:3] == ["5", "80.0 [37.6, 96.4]"]
    assert cells[3:] == ["-20.0 [-60.0, +0.0]", "0.80 [0.40, 1.00]", "20 %"]
    row = [line for line in shown.splitlines() if line.startswith(f"│ {RKV.name} ")][1]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[1:5] == ["400", "1.00 [1.00, 1.00]", "20 %", "20 %"]
    assert cells[5:] == ["2.4 (80 %)", "300", "500.0", "1.25 x"]
    assert "methods=rkv[a=1]" in shown
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 140


def test_degenerate_runs_have_defined_answers(capsys):
    """Nothing finished; one problem; a stock that is never right."""
    assert result_of(new_plan(), [])["sides"] == []
    plan = new_plan((STOCK, OLDEST), num_problems=1)
    lines = [run_line(STOCK, "p0", is_correct=False), run_line(OLDEST, "p0", is_correct=False)]
    against = by_name(result_of(plan, lines)["sides"])["oldest 128"]["against_stock"]
    assert against["ratio"] is None
    assert against["difference"] == {"mean": 0, "low": None, "high": None}
    assert "0.0 [?, ?]" in printed(plan, lines, capsys)


def test_a_side_alone_shows_its_own_accuracy_and_no_comparison():
    plan = new_plan((STOCK, OLDEST), num_problems=2)
    result = result_of(plan, [run_line(OLDEST, "p0"), run_line(OLDEST, "p1")])
    (side,) = result["sides"]
    assert side["accuracy"]["mean"] == 1
    assert "against_stock" not in side
    assert result["unfinished"] == ["stock: 0 of 2 requests finished"]


def test_sets_have_results_of_their_own():
    plan = new_plan((STOCK, OLDEST), num_problems=2)
    other = [each._replace(problem=each.problem._replace(set="other")) for each in plan.asked]
    lines = lines_of(plan, CHANCES)
    plan = replace(plan, asked=(*plan.asked, *other))
    first, second = make_document(CARD, plan, lines, None)["results"]
    assert (first["set"], len(first["sides"]), first["unfinished"]) == ("made-up", 2, [])
    assert (second["set"], second["sides"], len(second["unfinished"])) == ("other", [], 2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"preemptions": 2}, "1 requests were preempted"),
        ({"deferred": 3}, "3 compactions of a batch had to wait"),
    ],
)
def test_a_side_that_kept_more_than_its_budget_is_named(changes, said, capsys):
    plan = new_plan((STOCK, RKV), num_problems=4)
    lines = lines_of(plan, CHANCES)
    for line in lines:
        line.update(preemptions=0, deferred=0)
    assert result_of(plan, lines)["failed_checks"] == []
    # Stock loses nothing by it.
    lines[0].update(changes)
    assert result_of(plan, lines)["failed_checks"] == []
    lines[1].update(changes)
    result = result_of(plan, lines)
    (problem,) = result["failed_checks"]
    assert problem.startswith(f"{RKV.name}: {said}")
    assert by_name(result["sides"])[RKV.name]["preemptions"] == changes.get("preemptions", 0)
    assert problem in printed(plan, lines, capsys)
