"""The `bench` command as a user types it; what it measures is tested in tests/bench."""

import json
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import typer
from typer.testing import CliRunner

from rkv_vllm.bench.offline import run_offline
from rkv_vllm.bench.processes import ChildError, InterruptedBySignal
from rkv_vllm.bench.served import run_served
from rkv_vllm.bench.sides import Side
from rkv_vllm.bench.workload import Scenario
from rkv_vllm.cli import app
from rkv_vllm.cli.bench_input import make_workload
from tests.bench.results import new_result, new_workload

# The tiny tokenizer makes 70 to 140 tokens of a prompt: a pool of 512 holds one or two whole.
LOAD = ["--num-prompts", "4", "--output-len", "200", "--pool-tokens", "512"]
SMALL = [*LOAD, "--budget", "64", "--buffer", "32"]
SCENARIO = Scenario(
    num_prompts=4, output_lens=(200,), pool_tokens=512, budgets=(64,), buffer=32, block_size=32
)
COMPRESSED = Side(64, ("--kv-compression=rkv", "--kv-budget=64", "--kv-buffer=32"), when="always")
WAIT_SECONDS = 240


@pytest.fixture(scope="module")
def model(random_model_dir) -> Path:
    return random_model_dir("qwen3", 2)


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def good_result(workload, run):
    """What a run of this workload gives when all is well."""
    budget = run.side.budget
    return new_result(
        run.side,
        run.repeat,
        mode=run.mode,
        prompt_lens=list(workload.prompt_lens),
        output_lens=list(workload.output_lens),
        pool_blocks=(run.side.pool_tokens or workload.pool_tokens) // workload.block_size,
        compactions=0 if budget is None else workload.expected_compactions(budget)[1],
    )


@pytest.fixture
def runs(monkeypatch):
    """Replaces the measuring; a test may put an error in for the run of its number."""
    errors = {}

    def run_all(workload, schedule, engine_flags, measured):
        for number, each in enumerate(schedule):
            if number in errors:
                raise errors[number]
            measured.results.append(good_result(workload, each))

    monkeypatch.setattr("rkv_vllm.bench.session.run_all", run_all)
    return errors


def test_standard_output_ends_with_the_document(model, runs):
    result = run(model, *SMALL, "--budget", "100", "--repeats", "2")
    assert result.exit_code == 0, result.stderr
    *shown, line = result.stdout.splitlines()
    document = json.loads(line)
    assert document["workload"]["budgets"] == [64, 100]
    (offline,) = document["results"]
    assert [(each["side"], each["repeat"]) for each in offline["runs"]] == [
        *(("budget 100", 1), ("budget 64", 1), ("stock", 1)),
        *(("stock", 2), ("budget 64", 2), ("budget 100", 2)),
    ]
    assert offline["ratios"].keys() == {"budget 64", "budget 100"}
    text = "\n".join(shown)
    assert "budget 100 / stock, tokens/s: 1.50 x" in text
    assert str(model) in text


def test_json_is_the_only_line(model, runs):
    result = run(model, *SMALL, "--json")
    (line,) = result.stdout.splitlines()
    assert json.loads(line)["results"][0]["ratios"]["budget 64"]["median"] == 1.5


def test_commas_separate_budgets(model, runs):
    result = run(model, *LOAD, "--buffer", "32", "--budget", "64, 70", "--budget", "80", "--json")
    assert json.loads(result.stdout)["workload"]["budgets"] == [64, 70, 80]


def test_options_override_the_scenario(model, runs):
    result = run(model, "--scenario", "ample", "--pool-tokens", "2048", "--json")
    workload = json.loads(result.stdout)["workload"]
    assert (workload["num_prompts"], workload["pool_tokens"]) == (8, 2048)


def test_scenarios_requests_take_turns(model, runs):
    load = ["--num-prompts", "5", "--output-len", "200, 210", "--prompt-len", "0,150"]
    flags = [*SMALL, *load, "--priority", "1,0,-1", "--pool-tokens", "1024"]
    workload = json.loads(run(model, *flags, "--json").stdout)["workload"]
    assert workload["output_lens"] == [200, 210, 200, 210, 200]
    assert workload["priorities"] == [1, 0, -1, 1, 0]
    filled = workload["prompt_lens"][1::2]
    # A note takes about 20 tokens here, a task up to 140.
    assert all(110 < length <= 150 for length in filled), filled


def test_baselines_and_policies_are_sides(model, runs):
    flags = ["--baseline", "fp8", "--baseline", "--max-num-seqs=2", "--when", "always,pressure"]
    # Room for all: nothing is compacted under pressure, but `good_result` says otherwise.
    result = run(model, *SMALL, *flags, "--json")
    (offline,) = json.loads(result.stdout)["results"]
    assert [side["side"] for side in offline["sides"]] == [
        *("stock", "stock, fp8", "stock, --max-num-seqs=2"),
        *("budget 64, always", "budget 64, pressure"),
    ]
    assert offline["failed_checks"] == []
    result = run(model, *SMALL, *flags, "--json", "--pool-tokens", "4096")
    assert result.exit_code == 1
    (problem,) = json.loads(result.stdout)["results"][0]["failed_checks"]
    assert problem.startswith("budget 64, pressure, run 1: ")
    assert problem.endswith("compactions, wanted none")


def test_fp8_compression_and_both_are_sides_in_one_table(model, runs):
    result = run(model, *SMALL, "--baseline", "fp8", "--cache-dtype", "auto,fp8")
    assert result.exit_code == 0, result.output
    (offline,) = json.loads(result.stdout.splitlines()[-1])["results"]
    names = ["stock", "stock, fp8", "budget 64", "budget 64, fp8"]
    assert [side["side"] for side in offline["sides"]] == names
    assert [*offline["ratios"]] == names[1:]
    for name in names[1:]:
        assert f"{name} / stock, tokens/s: " in result.stdout
    assert "budget 64, fp8: a pool of 2,048 tokens (4.00 x), in the same bytes" in result.stdout


@pytest.mark.parametrize("dtypes", ["fp4", "auto,fp8,fp8", "int8_per_token_head", ""])
def test_a_cache_that_compression_does_not_read_is_refused(model, runs, dtypes):
    result = run(model, *SMALL, "--cache-dtype", dtypes)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: --cache-dtype: got ")
    assert len(result.stderr.splitlines()) == 1


def test_a_failed_check_is_exit_code_1_and_no_ratio(model, runs, monkeypatch):
    monkeypatch.setattr("rkv_vllm.bench.workload.num_compactions", lambda *_, **__: 99)
    workload = new_workload()
    assert workload.expected_compactions(64) == (198, 198)
    monkeypatch.setattr(
        "tests.cli.test_bench.good_result", lambda _, run: new_result(run.side, run.repeat)
    )
    result = run(model, *SMALL)
    assert result.exit_code == 1
    document = json.loads(result.stdout.splitlines()[-1])
    assert document["results"][0]["ratios"] is None
    assert document["results"][0]["failed_checks"]
    assert "No ratio" in result.stdout
    assert " x (" not in result.stdout


def test_a_failed_run_shows_its_log_and_what_was_measured(model, runs, tmp_path):
    log = tmp_path / "log"
    log.write_text("loading\nno such kernel\n")
    runs[1] = ChildError("stock, offline: the process ended with exit code 3", log)
    result = run(model, *SMALL, "--repeats", "2")
    assert result.exit_code == 1
    assert "loading\nno such kernel\nError: stock, offline" in result.stderr
    document = json.loads(result.stdout.splitlines()[-1])
    assert document["failure"] == str(runs[1])
    assert len(document["results"][0]["runs"]) == 1
    assert document["results"][0]["ratios"] is None


@pytest.mark.parametrize("finished", [0, 1])
def test_ctrl_c_prints_the_runs_that_are_finished(model, runs, finished):
    runs[finished] = InterruptedBySignal(signal.SIGINT)
    result = run(model, *SMALL)
    assert result.exit_code == 130
    assert "Interrupted." in result.stderr
    assert "Traceback" not in result.stderr
    if not finished:
        assert result.stdout == ""
        return
    assert json.loads(result.stdout.splitlines()[-1])["failure"] == "interrupted"
    assert "No ratio" in result.stdout


BAD = {
    "unknown model": (["no/such/model", *SMALL], 2, "MODEL: got 'no/such/model'"),
    "no config.json": (["{empty}", *SMALL], 2, "a folder without config.json"),
    "no tokenizer": (["{config}", *SMALL], 2, "whose tokenizer cannot be read"),
    "budget": (["{model}", *LOAD, "--budget", "8"], 2, "--kv-budget (budget): got 8"),
    "second budget": (["{model}", *SMALL, "--budget", "4"], 2, "--kv-budget (budget): got 4"),
    "budgets": (["{model}", *LOAD, "--budget", "64,128,64"], 2, "--budget: got 64 more than"),
    "no number": (["{model}", *LOAD, "--budget", "64,many"], 2, "--budget: got '64,many'"),
    "no budget": (["{model}", *LOAD, "--budget", "64,"], 2, "--budget: got '64,'"),
    "buffer": (["{model}", *SMALL, "--buffer", "4"], 2, "--kv-buffer (buffer): got 4"),
    "window": (["{model}", *SMALL, "--", "--kv-window=64"], 2, "--kv-budget (budget): got 64"),
    "never due": (
        ["{model}", *LOAD, "--budget", "400"],
        2,
        "nothing would ever be compacted",
    ),
    "pool": (["{model}", *SMALL, "--pool-tokens", "256"], 2, "--pool-tokens: got 256, wanted"),
    "dtype": (["{model}", *SMALL, "--dtype", "int8"], 2, "--dtype: got 'int8'"),
    "output": (["{model}", *SMALL, "--output-len", "9,0"], 2, "--output-len: got '9,0'"),
    "prompt": (["{model}", *SMALL, "--prompt-len", "-1"], 2, "--prompt-len: got '-1'"),
    "whose prompts": (
        ["{model}", *SMALL, "--prompt-len", "9", "--dataset-path", "{one}"],
        2,
        "--prompt-len: got it with --dataset-path",
    ),
    "priority": (["{model}", *SMALL, "--priority", "high"], 2, "--priority: got 'high'"),
    "served": (
        ["{model}", *SMALL, "--priority", "0,1", "--mode", "both"],
        2,
        "--priority: got it with --mode served",
    ),
    "when": (["{model}", *SMALL, "--when", "never"], 2, "--kv-when (when): got 'never'"),
    "whens": (["{model}", *SMALL, "--when", "always,always"], 2, "--when: got always more than"),
    "no baseline": (["{model}", *SMALL, "--baseline", "fp4"], 2, "--baseline: got 'fp4'"),
    "baseline": (
        ["{model}", *SMALL, "--baseline", "--port 8000"],
        2,
        "--baseline: got '--port 8000': --port: got it among",
    ),
    "rate": (["{model}", *SMALL, "--request-rate", "0"], 2, "--request-rate: got 0.0"),
    "no rate": (["{model}", *SMALL, "--request-rate", "nan"], 2, "--request-rate: got nan"),
    "plot": (["{model}", *SMALL, "--plot", "x.svg"], 2, "--plot: got 'x.svg'"),
    "plot's folder": (["{model}", *SMALL, "--plot", "/no/x.png"], 2, "--plot: got '/no/x.png'"),
    "prompts": (["{model}", *SMALL, "--dataset-path", "/no/file"], 2, "--dataset-path: got "),
    "few prompts": (["{model}", *SMALL, "--dataset-path", "{one}"], 2, "got 1 prompts, wanted"),
    "no prompt": (
        ["{model}", *SMALL, "--num-prompts", "1", "--dataset-path", "{text}"],
        2,
        "got 'Hello' as prompt 1",
    ),
    "context": (
        ["{model}", *SMALL, "--pool-tokens", "0", "--output-len", "4096"],
        2,
        "--output-len: got 4096 for prompts of up to ",
    ),
    "abbreviation": (["{model}", *SMALL, "--", "--kv-bud=64"], 2, "--kv-budget: got it among"),
    "two values": (["{model}", *SMALL, "--", "--kv-window", "8", "9"], 2, "got '9' after"),
    "port": (["{model}", *SMALL, "--", "--port", "8000"], 2, "--port: got it among the flags"),
    "max_model_len": (["{model}", *SMALL, "--", "--max_model_len=9"], 2, "--max-model-len: got"),
}


@pytest.mark.parametrize(("arguments", "code", "message"), BAD.values(), ids=BAD)
def test_bad_input_ends_with_one_line(model, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.setattr(
        "rkv_vllm.bench.session.run_all", lambda *_: pytest.fail("a run was started")
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text((model / "config.json").read_text())
    (tmp_path / "one").write_text('{"prompt": "a"}\n')
    (tmp_path / "text").write_text("Hello\n")
    names = {f"{{{name}}}": tmp_path / name for name in ("empty", "config", "one", "text")}
    names["{model}"] = model
    result = run(*(names.get(argument, argument) for argument in arguments))
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert all(word in result.stderr for word in ("got ", "wanted ", "; "))


def test_the_tokenizer_of_a_hub_id_is_read_from_the_local_folder(model, monkeypatch):
    monkeypatch.setattr("rkv_vllm.cli.bench_input.find_config", lambda _: model / "config.json")
    workload = make_workload("no/such-model", SCENARIO, None, 0, float("inf"), None)
    assert workload.model == "no/such-model"
    assert min(workload.prompt_lens) > 8


@pytest.mark.parametrize("option", ["--repeats", "--num-prompts", "--max-concurrency"])
def test_zero_of_a_thing_is_refused(model, option):
    result = run(model, *SMALL, option, "0")
    assert result.exit_code == 2
    assert option in result.stderr


@pytest.mark.parametrize(
    ("option", "package"), [(["--plot", "x.png"], "matplotlib"), (["--mode", "both"], "pandas")]
)
def test_a_missing_package_is_named_before_anything_runs(model, monkeypatch, option, package):
    # Python's own way to make an import fail.
    monkeypatch.setitem(sys.modules, package, None)
    result = run(model, *SMALL, *option)
    assert result.exit_code == 1
    assert f"run: pip install {package}" in result.stderr


def test_help_explains_every_parameter_and_its_examples_run(model, runs, tmp_path, monkeypatch):
    # Where the plot of an example goes.
    monkeypatch.chdir(tmp_path)
    described = typer.main.get_command(app).commands["bench"]
    assert all(parameter.help for parameter in described.params)
    setting, *examples = described.help.split("```")[1].strip().splitlines()
    assert setting.startswith("M=")
    for example in examples:
        command, *arguments = shlex.split(example.replace("$M", str(model)))
        assert (command, arguments.pop(0)) == ("rkv-vllm", "bench")
        result = run(*arguments)
        assert result.exit_code == 0, result.output


def fake_python(folder: Path, monkeypatch, script: str) -> None:
    """Puts a shell script in the place of the Python that children run."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


@pytest.mark.parametrize("execute", [run_offline, run_served])
def test_a_child_that_dies_shows_the_end_of_its_log(tmp_path, monkeypatch, execute):
    fake_python(tmp_path, monkeypatch, "seq 100; echo no such kernel >&2; exit 3")
    with pytest.raises(ChildError, match="exit code 3") as caught:
        execute(new_workload(), COMPRESSED, (), tmp_path, lambda *_: None)
    assert caught.value.log_tail == [*map(str, range(72, 101)), "no such kernel"]


def test_a_key_in_the_environment_does_not_lock_the_server(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    fake_python(tmp_path, monkeypatch, 'echo "key: $VLLM_API_KEY"; exit 3')
    with pytest.raises(ChildError) as caught:
        run_served(new_workload(), COMPRESSED, (), tmp_path, lambda *_: None)
    assert caught.value.log_tail == ["key: "]


def test_a_server_that_hangs_shows_the_end_of_its_log(tmp_path, monkeypatch):
    fake_python(tmp_path, monkeypatch, "echo loading; exec sleep 600")
    monkeypatch.setattr("rkv_vllm.bench.server.START_SECONDS", 1)
    with pytest.raises(ChildError, match="did not come up within 1 s") as caught:
        run_served(new_workload(), COMPRESSED, (), tmp_path, lambda *_: None)
    assert caught.value.log_tail == ["loading"]


@pytest.fixture(scope="module")
def offline(model, tmp_path_factory):
    """The document of a real offline benchmark, and its plot."""
    plot = tmp_path_factory.mktemp("bench") / "bench.png"
    result = run(model, *SMALL, "--plot", plot, "--", "--enforce-eager", "--kv-window", "16")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1]), plot, result.stderr


@pytest.mark.engine
@pytest.mark.timeout(2 * WAIT_SECONDS)
def test_offline_measures_both_sides(offline):
    document, plot, progress = offline
    (result,) = document["results"]
    assert result["failed_checks"] == []
    assert result["ratios"]["budget 64"]["median"] > 0
    stock, compressed = result["sides"]
    # Four requests of about 300 tokens in a pool of 512, of 100 to 170 when compressed.
    assert stock["preemptions"] > 0
    assert compressed["preemptions"] == 0
    assert stock["peak_blocks"] == 16 == stock["pool_blocks"]
    assert stock["running_mean"] < compressed["running_mean"] <= 4
    assert compressed["compactions"] == 4 * ((200 - 2) // 32) > stock["compactions"] == 0
    assert [each["output_lens"] for each in result["runs"]] == [[200] * 4] * 2
    for side, run in zip((compressed, stock), result["runs"], strict=True):
        # Of requests that wait for room, the first token takes long; the others take a step.
        assert 0 < side["itl_ms"]["p50"] < side["ttft_ms"]["p99"] < 1000 * run["seconds"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "run 1 of 2: budget 64, offline" in progress
    assert "run 2 of 2: stock, offline" in progress


@pytest.mark.nightly
@pytest.mark.engine
@pytest.mark.timeout(4 * WAIT_SECONDS)
def test_every_kind_of_side_is_measured_or_reported(model):
    more = ["--output-len", "200,120", "--priority", "1,0", "--when", "always,pressure"]
    more += ["--baseline", "fp8", "--baseline", "--attention-backend NONE_SUCH"]
    more += ["--cache-dtype", "auto,fp8"]
    result = run(model, *SMALL, *more, "--", "--enforce-eager")
    assert result.exit_code == 0, result.output
    (offline,) = json.loads(result.stdout.splitlines()[-1])["results"]
    assert offline["failed_checks"] == []
    reasons = offline["not_available"]
    assert "NONE_SUCH" in reasons.pop("stock, --attention-backend NONE_SUCH")
    sides = {side["side"]: side for side in offline["sides"]}
    of_fp8 = ("stock, fp8", "budget 64, always, fp8", "budget 64, pressure, fp8")
    if reasons:
        # vLLM's own words, on a CPU without AVX-512.
        assert set(reasons) == set(of_fp8)
        assert "FP8" in reasons["stock, fp8"]
    else:
        for name in of_fp8:
            assert sides[name]["pool_blocks"] == 4 * 16
            assert sides[name]["preemptions"] == 0
        assert sides[of_fp8[1]]["compactions"] == sides["budget 64, always"]["compactions"]
        # Room for all.
        assert sides[of_fp8[2]]["compactions"] == 0
    always, pressure = sides["budget 64, always"], sides["budget 64, pressure"]
    assert always["compactions"] == 2 * ((200 - 2) // 32) + 2 * ((120 - 2) // 32)
    # Two at once outgrow the pool, which is not needed whole for long.
    assert 0 < pressure["compactions"] < 4 * 200
    assert sides["stock"]["compactions"] == 0
    for side in sides.values():
        first, second = side["classes"]
        assert (first["priority"], second["priority"]) == (0, 1)
        assert first["num_requests"] == second["num_requests"] == 2
        # Who may overtake waits less.
        assert first["ttft_ms"]["p99"] <= second["ttft_ms"]["p99"]


@pytest.mark.nightly
@pytest.mark.engine
@pytest.mark.timeout(2 * WAIT_SECONDS)
def test_served_counts_what_offline_counts(model, offline, tmp_path):
    workload = make_workload(
        str(model), SCENARIO, None, seed=0, request_rate=float("inf"), max_concurrency=None
    )
    phases = []
    result = run_served(
        workload,
        COMPRESSED,
        ["--enforce-eager"],
        tmp_path,
        lambda phase, share: phases.append((phase, share)),
    )
    of_offline, of_stock = offline[0]["results"][0]["runs"]
    for name in ("output_lens", "compactions", "preemptions", "deferred", "pool_blocks"):
        assert result[name] == of_offline[name], name
    assert sorted(result["prompt_lens"]) == sorted(of_offline["prompt_lens"])
    assert result["probe"] == of_stock["probe"]
    assert result["tokens_per_s"] == pytest.approx(800 / result["seconds"])
    assert 0 < result["itl_ms"]["p50"] <= result["itl_ms"]["p99"]
    assert 0 < result["ttft_ms"]["p50"] <= result["ttft_ms"]["p99"]
    # The whole load may take half a second, between two samples.
    assert 0 <= result["running_mean"] <= result["running_peak"] <= 4
    assert {phase for phase, _ in phases} == {"starting", "generating"}


@pytest.mark.engine
@pytest.mark.timeout(2 * WAIT_SECONDS)
def test_ctrl_c_leaves_no_process_behind(model):
    mine = psutil.Process()
    before = set(mine.children(recursive=True))
    started = []

    def press_ctrl_c() -> None:
        # The API server, multiprocessing's resource tracker, the engine that still imports.
        deadline = time.monotonic() + WAIT_SECONDS
        while len(started) < 3 and time.monotonic() < deadline:
            started[:] = set(mine.children(recursive=True)) - before
            time.sleep(0.1)
        os.kill(mine.pid, signal.SIGINT)

    # While there are children, the command has its own handler of the signal.
    thread = threading.Thread(target=press_ctrl_c)
    thread.start()
    result = run(model, *SMALL, "--mode", "served", "--", "--enforce-eager")
    thread.join()
    assert len(started) >= 3
    _, survivors = psutil.wait_procs(started, timeout=0)
    assert [p for p in survivors if p.status() != psutil.STATUS_ZOMBIE] == []
    assert result.exit_code == 130
    assert result.stdout == ""
    assert result.stderr.endswith("Interrupted.\n")


def test_stock_is_started_without_an_option_of_ours(model, tmp_path, monkeypatch):
    """The flags that the child of a stock run gets."""
    fake_python(tmp_path, monkeypatch, "exit 3")
    with pytest.raises(ChildError):
        run_offline(new_workload(), Side(None, ()), ["--enforce-eager"], tmp_path, lambda *_: None)
    job = json.loads((tmp_path / "job.json").read_text())
    assert "--enforce-eager" in job["engine_flags"]
    assert not any(flag.startswith("--kv-") for flag in job["engine_flags"] if "memory" not in flag)
    assert job["is_compressed"] is False
