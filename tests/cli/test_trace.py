"""The `trace` command as a user types it, and its page against explicit eviction."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from rkv_vllm.cli import app, trace
from rkv_vllm.cli.errors import CommandError
from rkv_vllm.cli.trace_input import check_lengths
from rkv_vllm.methods.rkv import RKV
from rkv_vllm.option_field import options_of
from rkv_vllm.options import ServerOptions
from rkv_vllm.trace.capture import TracedRequest
from rkv_vllm.trace.record import NEVER
from tests import reference
from tests.checkpoint_configs import LLAMA, write_config
from tests.models import EOS_TOKEN_ID
from tests.trace.test_page import document

PROMPT = "the quick brown fox jumps over the lazy dog. " * 3
SMALL = ["--budget", "64", "--buffer", "32"]
LAYERS, HEADS = 4, 2


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The command sets variables for its own process; tests take them back."""
    for name in ("VLLM_LOGGING_STREAM", "VLLM_ENABLE_V1_MULTIPROCESSING", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


def run(*arguments):
    return CliRunner().invoke(app, ["trace", *map(str, arguments)])


def explicit_evictions(monkeypatch, model, prompt_ids, num_tokens, config):
    """Which compaction evicts which token [layers, heads, tokens], by really cutting lists."""
    cuts = []
    keep_indices = reference.keep_indices

    def noting(keys, *args, **kwargs):
        kept = keep_indices(keys, *args, **kwargs)
        cuts.append((keys.shape[1], kept.tolist()))
        return kept

    monkeypatch.setattr(reference, "keep_indices", noting)
    result = reference.generate_reference(model, prompt_ids, num_tokens, config)
    evicted_at = np.full((LAYERS, HEADS, len(prompt_ids) + num_tokens), NEVER)
    caches = [[list(range(len(prompt_ids))) for _ in range(HEADS)] for _ in range(LAYERS)]
    for index, compaction in enumerate(result.compactions):
        for layer, cache in enumerate(caches):
            settled_len, kept = cuts[index * LAYERS + layer]
            for head in range(HEADS):
                # Cached when this step ran: the prompt, and one token per step.
                newest = cache[head][-1] + 1
                cache[head] += range(newest, len(prompt_ids) + compaction.step)
                stay = {cache[head][i] for i in kept[head]}
                for token in set(cache[head][:settled_len]) - stay:
                    evicted_at[layer, head, token] = index
                cache[head] = [
                    t for i, t in enumerate(cache[head]) if t in stay or i >= settled_len
                ]
    return result, evicted_at


@pytest.mark.engine
def test_the_page_says_what_explicit_eviction_does(random_model_dir, tmp_path, monkeypatch):
    model = random_model_dir("qwen3", 3)
    path = tmp_path / "trace.html"
    arguments = [model, PROMPT, *SMALL, "--block-size", "32", "-o", path, "--json"]
    result = run(*arguments, "--raw", "--dtype", "float32", "--max-tokens", "120", "--ignore-eos")
    assert result.exit_code == 0, result.output
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt_ids = tokenizer.encode(PROMPT)
    config = ServerOptions(budget=64, buffer=32)
    expected, evicted_at = explicit_evictions(monkeypatch, model, prompt_ids, 120, config)
    assert len(expected.compactions) >= 3
    found = json.loads(result.stdout.splitlines()[-1])
    data = document(path.read_bytes())
    shown = data["evictedAt"].reshape(LAYERS, HEADS, -1).astype(int)
    assert np.array_equal(np.where(shown == 255, NEVER, shown), evicted_at)
    ids = [*prompt_ids, *expected.token_ids]
    assert "".join(data["pieces"]) == tokenizer.decode(ids)
    # Of those that a head judged last, the evicted ranked lower than the kept.
    last = len(expected.compactions) - 1
    ranks = data["lastRank"].reshape(LAYERS, HEADS, -1)
    settled = expected.compactions[-1].settled_len + sum(
        c.evicted for c in expected.compactions[:-1]
    )
    for at, rank in zip(shown.reshape(8, -1), ranks.reshape(8, -1), strict=True):
        judged = np.arange(len(at)) < settled - config.window
        assert rank[at == last].max() <= rank[(at == 255) & judged].min()
        assert not rank[settled - config.window :].any()
    evicted = sum(c.evicted for c in expected.compactions)
    assert found["output"] == str(path)
    assert found["bytes"] == path.stat().st_size
    assert found["compactions"] == len(expected.compactions)
    assert found["evicted_tokens"] == evicted == data["counts"]["evicted_tokens"]
    assert found["physical_len"] == found["logical_len"] - evicted == expected.physical_lens[-1]
    assert found["freed_blocks"] > 0
    assert os.listdir(tmp_path) == ["trace.html"]


@pytest.fixture
def model(tmp_path):
    return write_config(tmp_path / "llama", LLAMA)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "trace.txt"], "--output: got 'trace.txt', wanted a file that ends in .html"),
        (["-o", "no/such/trace.html"], "wanted a file in a folder that exists"),
        (["-o", "/proc/trace.html"], "wanted a folder that can be written to"),
        (["--budget", "8"], "--kv-budget (budget): got 8, wanted more tokens than --kv-window"),
        (["--lambda", "2"], "--kv-lambda (lam): got 2.0, wanted a number from 0 to 1"),
        (["--method", "nope"], "--kv-compression (method)"),
        (["--dtype", "int4"], "--dtype: got 'int4'"),
        (["--max-tokens", "0"], "max-tokens"),
        (["--temperature", "3"], "--temperature: got 3.0, wanted a number from 0 to 2"),
        (["--temperature", "nan"], "--temperature: got nan, wanted a number from 0 to 2"),
    ],
)
def test_wrong_options_end_it_before_anything_loads(model, monkeypatch, options, message):
    monkeypatch.setattr("rkv_vllm.cli.trace_input.load_tokenizer", None)
    result = run(model, PROMPT, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_model_that_is_none_ends_it(tmp_path, monkeypatch):
    monkeypatch.setattr("rkv_vllm.cli.trace_input.load_tokenizer", None)
    result = run(tmp_path / "nowhere", PROMPT, "-o", tmp_path / "t.html")
    assert result.exit_code == 2
    assert "nowhere" in result.stderr
    assert run(tmp_path, PROMPT, "-o", tmp_path / "t.html").exit_code == 2


def test_a_checkpoint_without_a_tokenizer_is_named(model, tmp_path):
    result = run(model, PROMPT, "-o", tmp_path / "t.html")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: MODEL: got")
    assert "tokenizer" in result.stderr


def test_prompts_and_lengths_that_do_not_fit_are_refused(random_model_dir, tmp_path):
    folder = random_model_dir("qwen3", 3)
    output = ["-o", tmp_path / "t.html"]
    for prompt, options, exit_code, message in (
        ("a~" * 2500, [], 1, "PROMPT: got 5002 tokens, wanted less than the model's context"),
        ("ab", ["--raw", "--max-tokens", "60", *SMALL], 2, "--max-tokens: got 60, wanted at least"),
        ("ab", ["--raw", "--max-tokens", "9999"], 2, "--max-tokens: got 9999, wanted at most"),
        ("  ", [], 2, "PROMPT: got nothing"),
    ):
        result = run(folder, prompt, *output, *options)
        assert (result.exit_code, message in result.stderr) == (exit_code, True), result.stderr
    assert not list(tmp_path.iterdir())


def test_the_smallest_number_of_tokens_still_sees_a_compaction(random_model_dir):
    model = random_model_dir("qwen3", 3)
    config = ServerOptions(budget=24, buffer=8)
    for prompt_len in (10, 60):
        prompt = list(range(20, 20 + prompt_len))
        smallest = next(n for n in range(1, 99) if not refuses(prompt, n, config))
        # Two schedules; with the asynchronous one a token settles one step later.
        for unprocessed in (0, 1):
            result = reference.generate_reference(
                model, prompt, smallest, config, unprocessed_steps=unprocessed
            )
            # A step follows, which moves the survivors.
            assert result.compactions[0].step <= smallest - 2


def refuses(prompt, max_tokens, config) -> bool:
    try:
        check_lengths(TracedRequest(prompt, max_tokens, 0.0, False), config, None)
    except CommandError:
        return True
    return False


def test_an_end_before_the_first_compaction_is_said_and_nothing_written(
    random_model_dir, tmp_path, monkeypatch
):
    from rkv_vllm.trace import capture

    @contextmanager
    def no_engine(*args, **kwargs):
        yield None

    ended = capture.Capture([9, 9, EOS_TOKEN_ID], "stop", None)
    monkeypatch.setattr(capture, "running_engine", no_engine)
    monkeypatch.setattr(capture, "capture", lambda *args: ended)
    result = run(random_model_dir("qwen3", 3), "ab", *SMALL, "-o", tmp_path / "t.html")
    assert result.exit_code == 1
    assert "got the end of its text after 3 tokens" in result.stderr
    assert "--ignore-eos" in result.stderr
    assert not list(tmp_path.iterdir())


def test_ctrl_c_ends_it_with_130_and_leaves_nothing(random_model_dir, tmp_path):
    model = random_model_dir("qwen3", 3)
    command = [sys.executable, "-m", "rkv_vllm.cli", "trace", str(model), "ab", "--ignore-eos"]
    log = tmp_path / "stderr.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*command, "--max-tokens", "3900", "-o", str(tmp_path / "t.html")],
            stderr=stderr,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 200
        while "Generating:" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert log.read_text().rstrip().endswith("Error: interrupted; nothing was written")
        assert process.stdout.read() == b""
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert os.listdir(tmp_path) == ["stderr.log"]


def test_help_states_the_defaults_of_the_method():
    """Their table is the method's, which `--help` does not import."""
    stated = {
        "lam": trace._WEIGHT,
        "pool": trace._WIDTH,
        "threshold": trace._COSINE,
    }
    with_flags = {name: each for name, each in options_of(RKV.Options).items() if each.flag}
    for name, each in with_flags.items():
        assert f"Default: {each.default}." in stated.pop(name)
    assert not stated
