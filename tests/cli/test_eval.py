"""The `eval` command as a user types it: what it refuses before a model loads, what it prints."""

import json
import re

import pytest
from typer.testing import CliRunner

from rkv_vllm.bench.processes import ChildError, InterruptedBySignal
from rkv_vllm.cli import app
from rkv_vllm.eval.store import FORCED, RUN, SPEED

ROWS = [{"question": "2 + 3?", "answer": "5", "id": n} for n in range(3)]


@pytest.fixture(scope="module")
def model(random_model_dir):
    return random_model_dir("qwen3", 2)


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


@pytest.fixture
def measured(monkeypatch):
    """Replaces the measuring: every request of the plan ends well; a test may put an error in."""
    found = {"plans": [], "compactions": 3, "error": None}

    def run_offline_eval(plan, store):
        found["plans"].append(plan)
        for side in plan.sides:
            for asked in plan.asked:
                count = found["compactions"] if side.budget else 0
                names = {"side": side.name, "set": asked.problem.set, "sample": 0}
                store.append(
                    {
                        **names,
                        "kind": RUN,
                        "problem": asked.problem.id,
                        "prompt_len": 20,
                        "output_len": 9,
                        "finish": "stop",
                        "compactions": count,
                        "evicted": 32 * count,
                        "is_looping": False,
                        "is_correct": True,
                    }
                )
            speed = {"seconds": 1.0, "output_tokens": 27, "num_requests": 3}
            store.append({**names, "kind": SPEED, "round": 1, **speed})
            if found["error"]:
                raise found["error"]

    monkeypatch.setattr("rkv_vllm.eval.session.run_offline_eval", run_offline_eval)
    return found


def run(model, problems, *arguments):
    own = ["--problems", str(problems), "--out", str(problems.with_name("out.jsonl"))]
    return CliRunner().invoke(app, ["eval", str(model), *own, *map(str, arguments)])


def test_standard_output_ends_with_the_document(model, problems, measured):
    result = run(model, problems, "--budgets", "64,96")
    assert result.exit_code == 0, result.stderr
    *shown, line = result.stdout.splitlines()
    (found,) = json.loads(line)["results"]
    assert [side["side"] for side in found["sides"]] == ["stock", "rkv 64", "rkv 96"]
    assert any("accuracy" in text for text in shown)
    only = run(model, problems, "--budgets", "64,96", "--json").stdout.splitlines()
    assert [json.loads(text)["results"] for text in only] == [[found]]


def test_engines_get_what_was_asked_for(model, problems, measured):
    flags = ["--dtype", "float32", "--max-tokens", "70", "--", "--max-num-seqs=8", "--kv-seats=2"]
    assert run(model, problems, *flags).exit_code == 0
    assert run(model, problems, "--out", problems.with_name("other.jsonl")).exit_code == 0
    plan, plain = measured["plans"]
    longest = max(len(asked.prompt_ids) for asked in plan.asked)
    assert plan.engine_flags == (
        *(f"--model={model}", "--dtype=float32", "--seed=0", f"--max-model-len={longest + 70}"),
        "--max-num-seqs=8",
        "--max-num-seqs=8",
    )
    assert (plan.max_num_seqs, plain.max_num_seqs) == (8, 256)
    assert plain.engine_flags[-1] == "--max-num-seqs=256"
    assert plan.common == {"seats": 2, "buffer": 64, "window": 8}


def test_prompts_are_in_the_chat_template_once(model, problems, measured):
    assert run(model, problems).exit_code == 0
    (plan,) = measured["plans"]
    ids = plan.asked[0].prompt_ids
    # <s> would be a second beginning; user and assistant are tokens 4 and 5 of the tiny tokenizer.
    assert (ids[0], ids[-1], ids.count(1)) == (4, 5, 0)


def test_a_side_without_compactions_ends_with_exit_code_1(model, problems, measured):
    measured["compactions"] = 0
    result = run(model, problems)
    assert result.exit_code == 1
    assert "rkv 128: 0 compactions in 3 requests" in result.stdout


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [(ChildError("rkv: the engine ended", None), 1), (InterruptedBySignal(2), 130)],
)
def test_what_is_finished_is_shown_when_an_engine_fails(
    model, problems, measured, error, exit_code
):
    measured["error"] = error
    result = run(model, problems, "--json")
    assert result.exit_code == exit_code
    document = json.loads(result.stdout)
    assert document["failure"]
    assert document["results"][0]["unfinished"] == ["rkv 128: 0 of 3 requests finished"]


def test_a_second_start_with_other_options_is_refused(model, problems, measured):
    assert run(model, problems).exit_code == 0
    result = run(model, problems, "--max-tokens", "99")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "whose results have max_tokens = 1024, wanted the 99" in result.stderr
    # Further sides are no other options.
    assert run(model, problems, "--budgets", "96").exit_code == 0
    assert len(measured["plans"]) == 2


def test_results_of_other_code_are_told_apart_on_the_card(model, problems, measured, monkeypatch):
    assert "continued_by" not in json.loads(run(model, problems, "--json").stdout)["card"]
    again = json.loads(run(model, problems, "--budgets", "96", "--json").stdout)["card"]
    assert "continued_by" not in again
    changes = {"commit": "abc", "date": "later"}
    monkeypatch.setattr("rkv_vllm.cli.eval.make_card", lambda model: {**again, **changes})
    result = run(model, problems, "--budgets", "64")
    *shown, line = result.stdout.splitlines()
    card = json.loads(line)["card"]
    assert card == {**again, "continued_by": ["later: commit abc"]}
    assert any("later: commit abc" in text for text in shown)


def test_a_plot_is_drawn(model, problems, measured, tmp_path):
    result = run(model, problems, "--plot", tmp_path / "a.png")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (["--methods", "no_such"], 2, "(method): got 'no_such', wanted one of"),
        (["--methods", "rkv[strenght=3]"], 2, "strenght"),
        (["--methods", "rkv,triattention"], 2, "rkv-vllm calibrate"),
        (["--methods", "rkv[layer_budgets=steep]"], 2, "layer_budgets"),
        (["--methods", ""], 2, "--methods: got none"),
        (["--budgets", "8"], 2, "more tokens than --kv-window"),
        (["--budgets", "few"], 2, "--budgets: got 'few', wanted whole numbers"),
        (["--budgets", "64,64"], 2, "--budgets: got 64 twice"),
        (["--budgets", "30", "--protect", "prompt"], 2, "--protect prompt, wanted at least 33"),
        (["--buffer", "4"], 2, "--kv-buffer (buffer): got 4, wanted at least"),
        (["--protect", "all"], 2, "--protect: got 'all', wanted some of none, prompt"),
        (["--problems", "no_such.jsonl"], 2, "no_such.jsonl"),
        (["--temperature", "3"], 2, "--temperature: got 3.0, wanted a number from 0 to 2"),
        (["--top-p", "0"], 2, "--top-p: got 0.0"),
        (["--samples", "4"], 2, "--samples: got 4 at --temperature 0, wanted 1"),
        (["--no-free-running"], 2, "wanted something to measure; add --forced"),
        (["--dtype", "float"], 2, "--dtype: got 'float'"),
        (["--max-tokens", "5000"], 2, "within the model's context of 4096"),
        (["--plot", "plot.pdf"], 2, "wanted a file that ends in .png"),
        (["--", "--max-model-len=9"], 2, "none that eval decides about; leave it out"),
        (["--", "--logprobs-mode", "processed_logprobs"], 2, "the odds of the model itself"),
        (["--", "--kv-budget=9"], 2, "pass --budgets before `--`"),
        (["--", "--kv-threshold=9"], 2, "--kv-threshold"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(
    model, problems, measured, arguments, exit_code, said
):
    result = run(model, problems, *arguments)
    assert (result.exit_code, result.stdout) == (exit_code, ""), result.stderr
    assert re.search(re.escape(said), result.stderr), result.stderr
    assert not measured["plans"]
    assert not problems.with_name("out.jsonl").exists()


def test_a_missing_grader_is_refused_with_the_way_to_get_it(model, problems, measured, monkeypatch):
    monkeypatch.setattr("rkv_vllm.eval.verifier.find_spec", lambda name: None)
    result = run(model, problems)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "pip install 'rkv-vllm[eval]'" in result.stderr


def test_an_out_file_that_cannot_be_written_is_refused(model, problems, measured):
    result = run(model, problems, "--out", problems.parent)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--out: got" in result.stderr


def test_forced_sides_alone_let_stock_write_its_text(model, problems, measured):
    assert run(model, problems, "--forced", "--no-free-running").exit_code == 0
    (plan,) = measured["plans"]
    assert [plan.kinds_of(side) for side in plan.sides] == [(RUN, FORCED), (FORCED,)]
