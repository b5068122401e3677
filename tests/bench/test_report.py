"""What is shown: medians, ratios or the reasons against them, the plot."""

import json
from statistics import median

import pytest

from rkv_vllm.bench.checks import Measured
from rkv_vllm.bench.plot import draw, make_figure
from rkv_vllm.bench.report import make_document, print_report
from rkv_vllm.bench.sides import Side
from tests.bench.results import SIDES, new_result, new_results, new_workload

STOCK, COMPRESSED = SIDES
CARD = {"command": "rkv-vllm bench", "model": "folder/of/model", "load_average": [0.5, 0.4]}


def document_of(results, failure=None, sides=SIDES, workload=None, refusals=()):
    repeats = max(result["repeat"] for result in results)
    measured = Measured(results, dict(refusals))
    workload = workload or new_workload()
    document = make_document(CARD, workload, sides, repeats, measured, failure)
    # What is printed as JSON must come back as it is.
    assert json.loads(json.dumps(document)) == document
    return document


def printed(document, capsys):
    print_report(document)
    return capsys.readouterr().out


def uneven_results():
    """Three pairs whose median of ratios is not the ratio of medians."""
    results = []
    for repeat, (stock, ours) in enumerate([(100.0, 150.0), (50.0, 200.0), (120.0, 132.0)], 1):
        results.append(new_result(COMPRESSED, repeat, tokens_per_s=ours))
        results.append(new_result(STOCK, repeat, tokens_per_s=stock))
    return results


def test_ratios_are_of_pairs_of_the_same_repeat():
    (result,) = document_of(uneven_results())["results"]
    pairs = [1.5, 4.0, pytest.approx(1.1)]
    assert result["ratios"] == {"budget 64": {"pairs": pairs, "median": 1.5}}
    stock, compressed = result["sides"]
    assert stock["tokens_per_s"] == {"median": 100.0, "min": 50.0, "max": 120.0}
    assert compressed["tokens_per_s"]["median"] == median([150.0, 200.0, 132.0])
    assert (stock["side"], compressed["side"]) == ("stock", "budget 64")


def test_the_table_says_what_the_document_says(capsys):
    shown = printed(document_of(uneven_results()), capsys)
    for text in (
        "[min, max]",
        "100.0 [50.0, 120.0]",
        "150.0 [132.0, 200.0]",
        "1.9 (2)",
        "8 of 16",
        "budget 64 / stock, tokens/s: 1.50 x (each pair: 1.50, 4.00, 1.10)",
        "2 requests x 150 output tokens, prompts of 20 to 30, pool 512 tokens, buffer 32, float32",
        "41 / 997",
        "13 / 57",
    ):
        assert text in shown


FP8_SIDE = Side(None, (), "fp8", pool_tokens=1024, is_exact=False, may_refuse=True)
THREE_SIDES = (STOCK, FP8_SIDE, COMPRESSED)


def test_a_side_that_did_not_start_is_named_and_does_not_forbid_the_ratios(capsys):
    refusals = {("offline", "stock, fp8"): "ValueError: no fp8 here"}
    document = document_of(new_results(2), sides=THREE_SIDES, refusals=refusals)
    (result,) = document["results"]
    assert result["not_available"] == {"stock, fp8": "ValueError: no fp8 here"}
    assert result["ratios"].keys() == {"budget 64"}
    shown = printed(document, capsys)
    assert "stock, fp8: not available here, vLLM says: ValueError: no fp8 here" in shown
    assert "a pool of" not in shown


def test_runs_that_are_missing_forbid_the_ratios_beside_a_side_that_did_not_start():
    refusals = {("offline", "stock, fp8"): "ValueError: no fp8 here"}
    document = document_of(new_results(2)[:-1], "interrupted", THREE_SIDES, refusals=refusals)
    assert document["results"][0]["ratios"] is None


def test_another_pool_is_said_with_its_reason(capsys):
    stock = Side(None, (), pool_tokens=768)
    results = [new_result(COMPRESSED), new_result(stock, pool_blocks=24)]
    results.append(new_result(FP8_SIDE, pool_blocks=32))
    shown = printed(document_of(results, sides=(stock, FP8_SIDE, COMPRESSED)), capsys)
    assert "stock: a pool of 768 tokens (1.50 x), the smallest that it starts in" in shown
    assert "stock, fp8: a pool of 1,024 tokens (2.00 x), in the same bytes" in shown
    assert "stock, fp8 / stock, tokens/s: 1.00 x" in shown


def test_latencies_are_shown_by_priority(capsys):
    def classes(seconds):
        latency = {"p50": 1000.0 * seconds, "p99": 2000.0 * seconds}
        of_all = {"ttft_ms": latency, "itl_ms": latency, "e2el_ms": latency}
        return [
            {"priority": 0, "num_requests": 3, **of_all},
            {"priority": 7, "num_requests": 9, **of_all, "e2el_ms": {"p50": 4.4e4, "p99": 5e4}},
        ]

    results = []
    for repeat, seconds in enumerate((1, 3, 8), 1):
        results.append(new_result(COMPRESSED, repeat, classes=classes(seconds)))
        results.append(new_result(STOCK, repeat, classes=classes(10 * seconds)))
    document = document_of(results)
    stock, compressed = document["results"][0]["sides"]
    assert [each["priority"] for each in stock["classes"]] == [0, 7]
    # Medians over the runs.
    assert compressed["classes"][0]["ttft_ms"] == {"p50": 3000.0, "p99": 6000.0}
    shown = printed(document, capsys)
    assert "latency by priority" in shown
    assert "3.0 / 6.0" in shown
    assert "30.0 / 60.0" in shown
    assert "44.0 / 50.0" in shown


def texts_of(document):
    """Everything that is written in the plot."""
    pytest.importorskip("matplotlib")
    from matplotlib.text import Text

    return [text.get_text() for text in make_figure(document).findobj(Text)]


WITHOUT_RATIO = pytest.mark.parametrize(
    ("results", "failure", "problem"),
    [
        (new_results(compactions=0), None, "budget 64, run 1: 0 compactions, wanted 6"),
        (new_results(2)[:-1], "interrupted", "interrupted"),
        (new_results()[:1], "stock, offline: the process ended with exit code 1", "exit code 1"),
    ],
)


@WITHOUT_RATIO
def test_no_ratio_where_something_failed(results, failure, problem, capsys):
    document = document_of(results, failure)
    (result,) = document["results"]
    assert result["ratios"] is None
    assert problem in result["failed_checks"][0]
    shown = printed(document, capsys)
    assert problem in shown
    assert "No ratio" in shown
    assert " x (" not in shown


@WITHOUT_RATIO
def test_the_plot_gives_the_reason_instead_of_a_ratio(results, failure, problem):
    texts = texts_of(document_of(results, failure))
    assert not any(text.endswith(" x)") for text in texts)
    (title,) = (text for text in texts if text.startswith("offline"))
    assert title.startswith("offline: no ratio\n")
    assert problem in title.replace("\n", " ")


def test_a_failed_mode_leaves_the_ratio_of_the_other(capsys):
    served = [r | {"mode": "served"} for r in new_results(deferred=1, compactions=9)]
    document = document_of([*new_results(), *served])
    assert [result["ratios"] is None for result in document["results"]] == [False, True]
    assert "wanted 1 to 6" in printed(document, capsys)


def test_an_interrupted_mode_leaves_the_ratio_of_the_complete_one():
    served = [result | {"mode": "served"} for result in new_results()[:1]]
    offline, served = document_of([*new_results(), *served], "interrupted")["results"]
    assert offline["ratios"] is not None
    assert served["ratios"] is None


def test_all_at_once_is_null_in_json():
    workload = document_of(new_results())["workload"]
    assert workload["request_rate"] is None
    assert "Infinity" not in json.dumps(workload)


def test_the_plot_gives_ratios():
    texts = texts_of(document_of(uneven_results()))
    assert "150.0  (1.50 x)" in texts
    assert "offline" in texts


def test_counts_are_shown_in_full(capsys):
    large = {"preemptions": 1_234_567, "pool_blocks": 7_654_321}
    results = [new_result(COMPRESSED), new_result(STOCK, **large)]
    results += [new_result(COMPRESSED, 2), new_result(STOCK, 2, **large | {"preemptions": 0})]
    document = document_of(results)
    assert "617,283.5" in printed(document, capsys)
    (preemptions,) = {text for text in texts_of(document) if "7,654,321" in text}
    assert preemptions == "preemptions: 617,283.5\nblocks, peak: 16 of 7,654,321"


def test_the_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    draw(tmp_path / "plot.png", document_of(uneven_results()))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "plot.png").stat().st_size > 20_000
