"""`rkv-vllm eval` with engines: a random model, stock and a good, a broken and an idle side."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from rkv_vllm.bench.workload import num_compactions
from rkv_vllm.cli import app
from rkv_vllm.eval.engine import batches
from rkv_vllm.eval.statistics import paired_bootstrap
from rkv_vllm.policy import Terms

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
BUFFER, MAX_TOKENS = 32, 120
OLDEST = "tests.eval.oldest.Oldest"
QUESTIONS = ("add 2 and 3", "name a bee", "why is the sky blue")
WAIT_SECONDS = 240


def command(model, folder, *more):
    problems = folder / "mine.jsonl"
    problems.write_text(
        "".join(json.dumps({"question": q, "answer": "5", "id": q[:4]}) + "\n" for q in QUESTIONS)
    )
    return [
        *("eval", str(model), "--problems", str(problems), "--max-tokens", str(MAX_TOKENS)),
        *("--buffer", str(BUFFER), "--dtype", "float32", "--out", str(folder / "out.jsonl"), *more),
        *("--", "--enforce-eager", "--block-size=32", "--kv-cache-memory-bytes=100000000"),
    ]


def lines_of(folder, kind=None):
    lines = [json.loads(text) for text in (folder / "out.jsonl").read_bytes().splitlines()]
    return [line for line in lines if kind in (None, line["kind"])]


def by_side(lines):
    sides = {}
    for line in lines:
        sides.setdefault(line["side"], {})[line["problem"]] = line
    return sides


def runs(evaluation):
    return lines_of(evaluation.folder, "run")


def prompt_lens_of(evaluation):
    return {line["problem"]: line["prompt_len"] for line in runs(evaluation)}


class Evaluation(NamedTuple):
    folder: Path
    exit_code: int
    document: dict
    stderr: str


@pytest.fixture(scope="module")
def model(random_model_dir) -> Path:
    return random_model_dir("qwen3", 2)


# With 4000 tokens the side is never compacted.
SIDES = ["--methods", f"rkv,{OLDEST}", "--budgets", "64,4000", "--protect", "prompt", "--forced"]


@pytest.fixture(scope="module")
def evaluation(model, tmp_path_factory) -> Evaluation:
    folder = tmp_path_factory.mktemp("eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        result = CliRunner().invoke(app, command(model, folder, *SIDES, "--json"))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    (line,) = result.stdout.splitlines()
    return Evaluation(folder, result.exit_code, json.loads(line), result.stderr)


def test_every_request_of_every_side_has_its_line(evaluation):
    for kind in ("run", "forced"):
        sides = by_side(lines_of(evaluation.folder, kind))
        assert list(sides) == [
            "stock",
            *(f"{method} {budget} +prompt" for method in ("rkv", OLDEST) for budget in (64, 4000)),
        ]
        assert all(len(problems) == len(QUESTIONS) for problems in sides.values())
    speeds = lines_of(evaluation.folder, "speed")
    assert [each["side"] for each in speeds] == list(sides)
    assert all(each["output_tokens"] > 0 and each["seconds"] > 0 for each in speeds)


def test_compactions_are_those_of_the_rules(evaluation):
    for kind in ("run", "forced"):
        sides = by_side(lines_of(evaluation.folder, kind))
        prompt_lens = prompt_lens_of(evaluation)
        for problem, line in sides["rkv 64 +prompt"].items():
            prefix = min(prompt_lens[problem], 48)
            terms = Terms(64 - prefix, BUFFER, prefix)
            length = line.get("output_len") or line["all_num_tokens"]
            wanted = num_compactions(prompt_lens[problem], length, terms, in_flight=1)
            assert line["compactions"] == wanted > 0
            assert line["evicted"] > 0
        assert all(line["compactions"] == 0 for line in sides["stock"].values())


def test_a_side_without_compactions_is_stock_itself_and_refused(evaluation):
    sides = by_side(runs(evaluation))
    stock, idle = sides["stock"], sides["rkv 4000 +prompt"]
    assert {p: line["token_ids"] for p, line in idle.items()} == {
        p: line["token_ids"] for p, line in stock.items()
    }
    lengths = [
        {p: [float(line["output_len"])] for p, line in side.items()} for side in (stock, idle)
    ]
    same = paired_bootstrap(*lengths, seed=0)
    assert (same.ratio.low, same.ratio.mean, same.ratio.high) == (1, 1, 1)
    assert same.difference.low <= 0 <= same.difference.high
    (result,) = evaluation.document["results"]
    assert evaluation.exit_code == 1
    for name in ("rkv 4000 +prompt", f"{OLDEST} 4000 +prompt"):
        assert sum(check.startswith(f"{name}: 0 comp") for check in result["failed_checks"]) == 2
        assert name not in [side["side"] for side in (*result["sides"], *result["forced"])]


def test_stock_forced_through_its_own_text_agrees(evaluation):
    stock = by_side(lines_of(evaluation.folder, "forced"))["stock"]
    for line in stock.values():
        assert line["all_num_agree"] == line["all_num_tokens"] > 100
        assert line["all_kl"] == pytest.approx(0, abs=1e-6)
        assert line["num_tokens"] == line["compactions"] == 0


def test_nothing_changes_before_the_first_compaction_and_everything_may_after_it(evaluation):
    sides = by_side(lines_of(evaluation.folder, "forced"))
    assert {line["num_tokens"] for line in sides["rkv 4000 +prompt"].values()} == {0}
    for line in sides["rkv 4000 +prompt"].values():
        assert line["all_kl"] == pytest.approx(0, abs=1e-3)
    prompt_lens = prompt_lens_of(evaluation)
    for problem, line in sides["rkv 64 +prompt"].items():
        # Due when so many tokens are settled; the step that finds them computes one more, and the
        # next one is the first to see the compacted cache.
        due = max(64, prompt_lens[problem]) + BUFFER
        assert line["all_num_tokens"] - line["num_tokens"] == due + 2 - prompt_lens[problem]
        assert line["kl"] == pytest.approx(line["all_kl"], abs=1e-3)
        assert line["kl"] > 1
        assert line["all_num_agree"] - line["num_agree"] == (
            line["all_num_tokens"] - line["num_tokens"]
        )


def test_a_method_that_keeps_the_oldest_is_found_worse(evaluation):
    (result,) = evaluation.document["results"]
    found = {side["side"]: side for side in result["forced"]}
    good, broken = found["rkv 64 +prompt"], found[f"{OLDEST} 64 +prompt"]
    assert min(good["compactions"], broken["compactions"]) >= 1
    assert good["num_tokens"] == broken["num_tokens"]
    assert good["kl"]["mean"] < broken["kl"]["mean"]
    assert good["agreement"]["mean"] > broken["agreement"]["mean"]


def test_the_same_command_goes_on_and_does_only_what_is_missing(evaluation, model, tmp_path):
    shutil.copytree(evaluation.folder, tmp_path, dirs_exist_ok=True)
    before = lines_of(tmp_path)
    # As a kill leaves it: results of two sides are not there, and one more is cut short.
    sides = ("rkv 64 +prompt", "rkv 4000 +prompt")
    missing = [line for line in before if line["kind"] == "forced" and line["side"] in sides]
    text = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
    kept = [line for line in text if json.loads(line) not in missing]
    (tmp_path / "out.jsonl").write_bytes(b"".join(kept) + json.dumps(missing[0]).encode()[:50])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        # Both sides share a batch now, which must change nothing.
        arguments = command(model, tmp_path, *SIDES, "--at-once", "--json")
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.stderr
    added = lines_of(tmp_path)[len(kept) :]
    assert [line["kind"] for line in added] == ["card", *("forced",) * len(missing)]
    found = by_side(added[1:])
    assert found.keys() == set(sides)
    for line in missing:
        again = found[line["side"]][line["problem"]]
        assert again["kl"] == pytest.approx(line["kl"], rel=1e-2, abs=1e-3)
        assert again["compactions"] == line["compactions"]
    assert json.loads(result.stdout)["results"][0]["unfinished"] == []


def test_sides_are_served_one_by_one_or_all_of_a_kind_at_once():
    tasks = [{"kind": kind} for kind in ("run", "forced", "run")]
    assert list(batches(tasks, at_once=False)) == [[task] for task in tasks]
    assert list(batches(tasks, at_once=True)) == [[tasks[0], tasks[2]], [tasks[1]]]


@pytest.mark.nightly
def test_an_interrupted_evaluation_shows_what_is_finished(model, tmp_path):
    arguments = command(model, tmp_path, "--budgets", "64", "--rounds", "3", "--json")
    with subprocess.Popen(
        [sys.executable, "-m", "rkv_vllm.cli", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            if (tmp_path / "out.jsonl").exists() and lines_of(tmp_path, "run"):
                break
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Interrupted." in stderr
    assert "Traceback" not in stderr
    document = json.loads(stdout)
    finished = by_side(lines_of(tmp_path, "run"))
    (result,) = document["results"]
    assert result["unfinished"][0].startswith(f"stock: {len(finished['stock'])} of 3 requests")
    assert document["failure"] == "interrupted"
    assert os.path.exists(tmp_path / "out.jsonl")
