"""The `plan` command as a user types it."""

import json
import re
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from rkv_vllm.cache_owners import write_owners
from rkv_vllm.cli import app
from tests.checkpoint_configs import LATENT, LLAMA, write_config

ROOM = ["--gpu-memory", "64MiB", "--reserved", "1MiB", "--output-len", "1000"]
SMALL = ["--budget", "64", "--buffer", "16", "--observation-slots", "4"]


@pytest.fixture
def model(tmp_path):
    return write_config(tmp_path / "llama", LLAMA)


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def document(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_json_adds_up(model):
    found = document(model, *ROOM, *SMALL, "--prompt-len", "100", "--weights", "2MiB")
    stock, fp8, rkv, both = found["sides"].values()
    assert [*found["sides"]] == ["stock", "stock_fp8", "rkv", "rkv_fp8"]
    assert stock["cache_bytes"] == int(64 * 2**20 * 0.92) - 3 * 2**20
    assert found["observation_bytes"] == stock["cache_bytes"] - rkv["cache_bytes"] > 0
    assert stock["bytes_per_token"] == 2 * fp8["bytes_per_token"] == 2 * 2 * 32 * 2
    # The ring holds queries of the model's dtype beside either cache.
    assert both["cache_bytes"] == rkv["cache_bytes"]
    assert both["bytes_per_token"] == fp8["bytes_per_token"]
    assert both["request_peak_tokens"] == rkv["request_peak_tokens"]
    assert both["pool_blocks"] in (2 * rkv["pool_blocks"], 2 * rkv["pool_blocks"] + 1)
    for side in (stock, fp8, rkv, both):
        assert side["pool_tokens"] == 16 * side["pool_blocks"]
        assert side["pool_blocks"] == side["cache_bytes"] // (16 * side["bytes_per_token"])
    assert stock["request_peak_tokens"] == 100 + 1000 - 1
    assert rkv["request_peak_tokens"] == 100 + 16 + 2
    assert stock["at_once_peak"] == (stock["pool_blocks"] - 1) // 69
    for basis in ("peak", "mean"):
        assert rkv["at_once_peak"] > fp8[f"at_once_{basis}"] > stock[f"at_once_{basis}"]
    # Twice the blocks and one that is empty: twice the requests, or one more.
    assert both["at_once_peak"] in range(2 * rkv["at_once_peak"], 2 * rkv["at_once_peak"] + 3)


def test_a_protected_prompt_is_held_by_every_request(model):
    asked = [*ROOM, *SMALL, "--prompt-len", "100"]
    plain, protected = (
        document(model, *asked, "--protect", what)["sides"]["rkv"] for what in ("none", "prompt")
    )
    # 64 of budget come on top of the prompt, and nothing is evicted before.
    assert plain["request_peak_tokens"] == 100 + 16 + 2
    assert protected["request_peak_tokens"] == 100 + 64 + 16 + 2
    assert protected["at_once_peak"] < plain["at_once_peak"]


def test_layers_that_share_a_cache_leave_room_for_more_tokens(model, tmp_path):
    path = tmp_path / "shared.json"
    write_owners(path, "llama", LLAMA["num_hidden_layers"], {1: 0})
    alone, shared = (document(model, *ROOM, *more) for more in ([], ["--share-layers", path]))
    # One of two layers: half the bytes per token, half the query ring.
    assert (shared["shared_layers"], shared["num_layers"]) == (1, 2)
    assert 2 * shared["observation_bytes"] == alone["observation_bytes"]
    sides = [each["sides"]["rkv"] for each in (alone, shared)]
    assert 2 * sides[1]["bytes_per_token"] == sides[0]["bytes_per_token"]
    saved = alone["observation_bytes"] - shared["observation_bytes"]
    assert sides[1]["cache_bytes"] == sides[0]["cache_bytes"] + saved
    assert sides[1]["pool_blocks"] >= 2 * sides[0]["pool_blocks"]
    assert shared["sides"]["stock"] == alone["sides"]["stock"]
    printed = run(model, *ROOM, "--share-layers", path).stdout
    assert re.search(r"layers with a cache\D+2\D+2\D+1 \D+1 ", printed)


def test_table_says_what_json_says(model):
    found = document(model, *ROOM, *SMALL)
    printed = run(model, *ROOM, *SMALL).stdout
    for side in found["sides"].values():
        for value in (side["at_once_peak"], side["at_once_mean"], side["pool_tokens"]):
            assert f"{value:,}" in printed
    assert all(note in printed for note in found["notes"])


def test_both_spellings_of_an_option_hold(model):
    assert document(
        model, *ROOM, "--kv-budget", "64", "--kv-buffer", "16", "--kv-seats", "3"
    ) == document(model, *ROOM, "--budget", "64", "--buffer", "16", "--observation-slots", "3")


@pytest.mark.parametrize(
    ("arguments", "note"),
    [
        ([], "Weights are estimated"),
        (["--budget", "2000"], "No request grows long enough"),
        (["--output-len", "2000"], "the model was made for 2048"),
        ([*SMALL, "--observation-slots", "1"], "raise --seats"),
        (SMALL, "--max-num-seqs"),
    ],
)
def test_what_limits_the_answer_is_noted(model, arguments, note):
    assert any(note in each for each in document(model, *ROOM, *arguments)["notes"])


def test_nothing_is_noted_without_a_reason(model):
    arguments = ["--weights", "1MiB", "--budget", "512", "--gpu-memory", "16MiB"]
    assert document(model, *ROOM, *arguments)["notes"] == []


BAD = {
    "unknown model": (["no/such/model", *ROOM], 2, "MODEL: got 'no/such/model'"),
    "no memory": (["{model}"], 2, "--gpu-memory, --kv-cache-memory-bytes: got neither"),
    "two memories": (
        ["{model}", *ROOM, "--kv-cache-memory-bytes", "1GiB"],
        2,
        "--gpu-memory, --kv-cache-memory-bytes: got both",
    ),
    "size": (["{model}", "--gpu-memory", "eighty"], 2, "--gpu-memory: got 'eighty'"),
    "share": (["{model}", *ROOM, "--gpu-memory-utilization", "1.5"], 2, "utilization: got 1.5"),
    "nan": (["{model}", *ROOM, "--gpu-memory-utilization", "nan"], 2, "utilization: got nan"),
    "budget": (["{model}", *ROOM, "--budget", "8"], 2, "--kv-budget (budget): got 8"),
    "buffer": (["{model}", *ROOM, "--buffer", "4"], 2, "--kv-buffer (buffer): got 4"),
    "protect": (["{model}", *ROOM, "--protect", "all"], 2, "--kv-protect (protect): got 'all'"),
    "dtype": (["{model}", *ROOM, "--dtype", "int8"], 2, "--dtype: got 'int8'"),
    "ranks": (
        ["{model}", *ROOM, "--tensor-parallel-size", "3"],
        2,
        "--tensor-parallel-size: got 3",
    ),
    "weights": (["{model}", *ROOM, "--weights", "1GiB"], 1, "1.0 GiB of weights"),
    "slots": (["{model}", *ROOM, "--observation-slots", "99999"], 1, "lower --seats"),
    "output": (["{model}", *ROOM, "--output-len", "999999"], 1, "--output-len: got 999999"),
    "prompt": (["{model}", *ROOM, "--prompt-len", "999999"], 1, "--prompt-len: got 999999"),
    "plot": (["{model}", *ROOM, "--plot", "x.svg"], 2, "--plot: got 'x.svg'"),
    "plot's folder": (["{model}", *ROOM, "--plot", "/no/x.png"], 2, "--plot: got '/no/x.png'"),
    "shared": (["{model}", *ROOM, "--share-layers", "no"], 2, "--kv-share-layers (share_layers): "),
    "attention": (["{latent}", *ROOM], 1, "multi-head latent attention"),
}


@pytest.mark.parametrize(("arguments", "code", "message"), BAD.values(), ids=BAD)
def test_bad_input_ends_with_one_line(tmp_path, arguments, code, message):
    folders = {
        "{model}": write_config(tmp_path / "llama", LLAMA),
        "{latent}": write_config(tmp_path / "latent", LATENT),
    }
    result = run(*(folders.get(argument, argument) for argument in arguments))
    assert result.exit_code == code
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert all(word in result.stderr for word in ("got ", "wanted ", "; "))


def test_the_longest_output_that_is_named_is_accepted(model):
    refused = run(model, *ROOM, "--output-len", "999999").stderr
    longest = int(refused.partition("at most ")[2].partition(":")[0])
    assert run(model, *ROOM, "--output-len", longest).exit_code == 0
    assert run(model, *ROOM, "--output-len", longest + 1).exit_code == 1


def test_a_compressed_prompt_may_be_longer_than_the_pool(model):
    long = ("--prompt-len", "500000", "--output-len", "10")
    assert run(model, *ROOM, *long).exit_code == 1
    result = run(model, *ROOM, *long, "--compress-prompt", "--json")
    assert result.exit_code == 0
    sides = json.loads(result.stdout)["sides"]
    assert sides["stock"]["at_once_peak"] == 0 < sides["rkv"]["at_once_peak"]
    # A budget and a chunk, which is more than the last chunk, the buffer and what is in flight.
    assert sides["rkv"]["request_peak_tokens"] == 1024 + 2048
    refused = run(model, *ROOM, *long, "--compress-prompt", "--prompt-chunk", "1000000")
    assert refused.exit_code == 1
    assert "a budget, a chunk and a buffer" in refused.stderr


def test_plot_without_matplotlib_is_refused_with_the_cure(model, monkeypatch):
    # Python's own way to make an import fail.
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run(model, *ROOM, "--plot", "x.png")
    assert result.exit_code == 1
    assert "run: pip install matplotlib" in result.stderr


def test_plot_draws_the_three_sides(model, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "plot.png"
    assert run(model, *ROOM, *SMALL, "--plot", file).exit_code == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    assert file.stat().st_size > 10_000


def test_help_imports_neither_torch_nor_vllm():
    """They take seconds."""
    code = (
        "import sys, rkv_vllm.cli; "
        "print({'torch', 'vllm', 'transformers', 'matplotlib'} & set(sys.modules))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout == "set()\n"


@pytest.mark.parametrize("command", ["plan", "doctor", "version"])
def test_help_gives_every_parameter_a_meaning(command):
    described = typer.main.get_command(app).commands[command]
    assert described.help
    assert all(parameter.help for parameter in described.params)


@pytest.mark.parametrize("command", ["plan", "doctor"])
def test_examples_of_help_keep_their_lines_and_options(command):
    described = typer.main.get_command(app).commands[command]
    examples = described.help.split("```")[1].strip().splitlines()
    known = {flag for parameter in described.params for flag in parameter.opts}
    for example in examples:
        flags = re.findall(r"--[a-z-]+", example.partition(" -- ")[0])
        assert known.issuperset(flags)
        assert example.startswith(("M=", f"rkv-vllm {command}"))
    printed = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "100"}).stdout
    assert all(example in printed for example in examples)
