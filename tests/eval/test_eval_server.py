"""`rkv-vllm eval --base-url`: what is asked of servers, and which of them are refused."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rkv_vllm.cli import app
from tests.eval.fake_server import OUTPUT_LEN, PROMPT_LEN, fake_server

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def server():
    with fake_server() as fake:
        yield fake


def command(folder, *arguments, model="tiny"):
    rows = [{"question": f"{n}?", "answer": 5, "id": n} for n in range(4)]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = ["--problems", str(folder / "mine.jsonl"), "--out", str(folder / "out.jsonl")]
    return ["eval", model, *own, "--json", *map(str, arguments)]


def run(folder, *arguments, **more):
    return CliRunner().invoke(app, command(folder, *arguments, **more))


def lines_of(folder, kind):
    lines = [json.loads(text) for text in (folder / "out.jsonl").read_bytes().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_sides_are_options_of_requests_to_one_server(server, tmp_path):
    result = run(
        tmp_path,
        *("--base-url", f"{server.url}/v1/", "--budgets", "64", "--protect", "none,prompt"),
        *("--buffer", "32", "--methods", "rkv,rkv[lam=0.5]", "--max-tokens", "99"),
    )
    assert result.exit_code == 0, result.stderr
    asked = [json.dumps(body.get("vllm_xargs"), sort_keys=True) for body in server.asked]
    common = {"kv_compression": "rkv", "kv_buffer": 32}
    sides = [
        {"kv_compression": "off"},
        {**common, "kv_budget": 64, "kv_protect": 0},
        {**common, "kv_budget": 64 - 48, "kv_protect": 48},
        {**common, "kv_budget": 64, "kv_protect": 0, "kv_option": ["lam=0.5"]},
        {**common, "kv_budget": 64 - 48, "kv_protect": 48, "kv_option": ["lam=0.5"]},
    ]
    assert asked == [json.dumps(side, sort_keys=True) for side in sides for _ in range(4)]
    first = server.asked[0]
    assert (first["model"], first["max_tokens"], first["temperature"]) == ("tiny", 99, 0)
    (found,) = json.loads(result.stdout)["results"]
    assert [side["compactions"] for side in found["sides"]] == [0, 2, 2, 2, 2]
    assert [side["evicted"] for side in found["sides"]] == [0, 64, 64, 64, 64]
    assert all(side["accuracy"]["mean"] == 1 for side in found["sides"])
    for line in lines_of(tmp_path, "run"):
        assert (line["prompt_len"], line["output_len"]) == (PROMPT_LEN, OUTPUT_LEN)
        assert (line["finish"], line["is_looping"]) == ("stop", False)


def test_samples_have_the_same_seeds_on_all_sides(server, tmp_path):
    sampling = ["--temperature", "0.6", "--top-p", "0.9", "--samples", "2", "--seed", "7"]
    result = run(tmp_path, "--base-url", server.url, "--budgets", "64", *sampling)
    assert result.exit_code == 0, result.stderr
    assert sorted(body["seed"] for body in server.asked) == [7] * 8 + [8] * 8
    assert {(body["temperature"], body["top_p"]) for body in server.asked} == {(0.6, 0.9)}


def test_as_many_requests_are_open_as_was_asked_for(server, tmp_path):
    server.wait_seconds = 0.3
    run(tmp_path, "--base-url", server.url, "--concurrency", "3")
    assert server.open_at_once == 3


def test_a_server_is_measured_as_it_is_against_another_one(server, tmp_path):
    with fake_server() as stock:
        stock.has_plugin = False
        urls = ["--base-url", server.url, "--stock-url", stock.url]
        result = run(tmp_path, *urls, "--limit", "2")
        assert result.exit_code == 0, result.stderr
        assert (len(stock.asked), len(server.asked)) == (2, 2)
        assert not any("vllm_xargs" in body for body in (*stock.asked, *server.asked))
    (found,) = json.loads(result.stdout)["results"]
    assert [(side["side"], side["compactions"]) for side in found["sides"]] == [
        ("stock", 0),
        ("as it is", 2),
    ]


def test_a_server_that_compacts_nothing_is_refused_in_the_end(server, tmp_path):
    server.compacts = False
    result = run(tmp_path, "--base-url", server.url, "--budgets", "64")
    assert result.exit_code == 1
    (found,) = json.loads(result.stdout)["results"]
    assert [side["side"] for side in found["sides"]] == ["stock"]
    assert "rkv 64: 0 compactions in 4 requests" in found["failed_checks"][0]


def test_a_second_start_asks_only_for_what_is_missing(server, tmp_path):
    urls = ["--base-url", server.url, "--budgets"]
    assert run(tmp_path, *urls, "64", "--limit", "2").exit_code == 0
    assert len(server.asked) == 4
    result = run(tmp_path, *urls, "64,96", "--limit", "3")
    assert result.exit_code == 0, result.stderr
    assert len(server.asked) == 9
    (found,) = json.loads(result.stdout)["results"]
    assert [side["num_requests"] for side in found["sides"]] == [3, 3, 3]
    assert [side["compactions"] for side in found["sides"]] == [0, 2, 2]


def test_results_of_another_server_are_not_gone_on_with(server, tmp_path):
    assert run(tmp_path, "--base-url", server.url).exit_code == 0
    with fake_server() as other:
        for urls in (
            ["--base-url", other.url],
            [*("--base-url", server.url), "--stock-url", other.url],
        ):
            result = run(tmp_path, *urls)
            assert (result.exit_code, result.stdout) == (2, "")
            assert re.search(
                f"whose results have .*_url = .*, wanted the '{other.url}'", result.stderr
            )
        assert not other.asked


def test_what_a_server_refuses_ends_the_evaluation_with_its_words(server, tmp_path):
    server.refuses = (400, "kv_budget: got 64, wanted more tokens than --kv-window 128")
    result = run(tmp_path, "--base-url", server.url, "--budgets", "64")
    assert result.exit_code == 1
    assert re.search(r"Error: rkv 64, problem [0-3]-\w+: .*kv-window 128", result.stderr)
    document = json.loads(result.stdout)
    assert document["results"][0]["unfinished"] == ["rkv 64: 0 of 4 requests finished"]


def test_answers_without_numbers_of_tokens_are_refused_by_name(server, tmp_path):
    server.counts_tokens = False
    result = run(tmp_path, "--base-url", server.url)
    assert result.exit_code == 1
    assert f"got an answer without usage from {server.url}, wanted" in result.stderr


def test_servers_that_cannot_be_measured_are_refused_before_anything_is_asked(server, tmp_path):
    nowhere = "http://127.0.0.1:9"
    server.has_plugin = False
    for arguments, model, said in (
        (["--base-url", nowhere], "tiny", f"--base-url: got {nowhere}, where nothing answers"),
        (["--base-url", server.url], "small", f"wanted one that {server.url} serves: tiny"),
        (["--base-url", server.url], "tiny", "whose /metrics has no vllm:kv_compression_comp"),
        (["--base-url", f"{server.url}/x"], "tiny", "/v1/models with status 404"),
    ):
        result = run(tmp_path, *arguments, model=model)
        assert (result.exit_code, result.stdout) == (1, ""), result.stderr
        assert said in result.stderr
    assert not server.asked
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--forced"], "--forced: got it with --base-url"),
        (["--methods", "rkv,snapkv"], "wanted the one method of that server"),
        (["--methods", "rkv[window=16]"], "start the server with --kv-window"),
        (["--", "--enforce-eager"], "ENGINE_FLAGS: got --enforce-eager with --base-url"),
    ],
)
def test_what_no_server_can_do_is_refused(server, tmp_path, arguments, said):
    result = run(tmp_path, "--base-url", server.url, *arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.stderr
    assert said in result.stderr
    assert not server.asked


def test_a_stock_server_alone_is_refused(server, tmp_path):
    result = run(tmp_path, "--stock-url", server.url)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--stock-url: got it without --base-url" in result.stderr


def test_an_interrupted_evaluation_keeps_what_was_answered(server, tmp_path):
    server.wait_seconds = 1.0
    arguments = command(tmp_path, "--base-url", server.url, "--concurrency", "1")
    with subprocess.Popen(
        [sys.executable, "-m", "rkv_vllm.cli", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while len(server.asked) < 6 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    (found,) = json.loads(stdout)["results"]
    assert [side["num_requests"] for side in found["sides"]] == [4, 1]
    assert found["unfinished"] == ["rkv 128: 1 of 4 requests finished"]
    # A second start asks for the other three.
    assert run(tmp_path, "--base-url", server.url).exit_code == 0
    assert len(lines_of(tmp_path, "run")) == 8
