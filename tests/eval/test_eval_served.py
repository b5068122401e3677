"""`rkv-vllm eval --base-url` against a server of ours, as a user runs it."""

import json

import pytest
from typer.testing import CliRunner

from rkv_vllm.cli import app
from tests.server import serving

pytestmark = [pytest.mark.engine, pytest.mark.nightly, pytest.mark.timeout(900)]

FLAGS = ["--kv-compression", "rkv", "--kv-budget", "512", "--kv-window", "8"]


@pytest.fixture(scope="module")
def server(random_model_dir):
    with serving(random_model_dir("qwen3", 2), *FLAGS) as running:
        yield running


def run(server, folder, *arguments):
    rows = [{"question": f"count to {n}", "answer": 5, "id": n} for n in range(4)]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = ["--problems", folder / "mine.jsonl", "--out", folder / "out.jsonl", "--json"]
    own += ["--base-url", server.base_url, "--max-tokens", 120, "--buffer", 32]
    return CliRunner().invoke(app, ["eval", server.model, *map(str, (*own, *arguments))])


def test_sides_of_one_server_are_compacted_as_they_ask_and_stock_is_not(server, tmp_path):
    result = run(server, tmp_path, "--budgets", "64,96", "--protect", "none,prompt")
    assert result.exit_code == 0, result.stderr
    (found,) = json.loads(result.stdout)["results"]
    assert [side["side"] for side in found["sides"]] == [
        *("stock", "rkv 64", "rkv 96", "rkv 64 +prompt", "rkv 96 +prompt")
    ]
    stock, *others = found["sides"]
    assert stock["compactions"] == 0
    for side in others:
        assert side["compactions"] >= 1
        assert side["evicted"] >= 32
    lines = [json.loads(text) for text in (tmp_path / "out.jsonl").read_bytes().splitlines()]
    texts = {}
    for line in lines:
        if line["kind"] == "run":
            assert len(line["token_ids"]) == line["output_len"] > 100
            texts.setdefault(line["side"], {})[line["problem"]] = line["text"]
    assert texts["stock"] != texts["rkv 64"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budgets", "8", "--window", "4"], "--kv-window 8"),
        (["--methods", "snapkv"], "this server's method 'rkv'"),
    ],
)
def test_what_the_server_refuses_is_said_in_its_words(server, tmp_path, arguments, said):
    result = run(server, tmp_path, *arguments)
    assert result.exit_code == 1
    assert "refuses it" in result.stderr
    assert said in result.stderr
