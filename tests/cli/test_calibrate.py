"""The `calibrate` command as a user types it, against queries taken before RoPE."""

import json
import os

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from typer.testing import CliRunner

from rkv_vllm.calibrate import forward
from rkv_vllm.cli import app
from rkv_vllm.methods.query_statistics import load_statistics
from tests.checkpoint_configs import LLAMA, SLIDING_WINDOW, write_config
from tests.models import tiny_tokenizer

WORDS = "the quick brown fox jumps over the lazy dog and counts to seven. "
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The command sets variables for its own process; tests take them back."""
    for name in ("VLLM_LOGGING_STREAM", "VLLM_LOGGING_LEVEL", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


def run(*arguments):
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments)])


def make_model(folder, config_class, **changes):
    """A random model of two layers, 6 query heads, 2 KV heads of 32."""
    config = config_class(
        vocab_size=512,
        hidden_size=192,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=0.2,
        **changes,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    model.save_pretrained(folder)
    tiny_tokenizer(512, 2048).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(WORDS * 30)
    return path


def queries_before_rope(folder, token_ids, context):
    """Complex [layers, query heads, tokens, 16], from hooks on what comes just before RoPE."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    pieces: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    for layer, seen in zip(model.model.layers, pieces, strict=True):
        attention = layer.self_attn
        last = attention.q_norm if hasattr(attention, "q_norm") else attention.q_proj
        last.register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output.reshape(-1, 6, 32))
        )
    with torch.inference_mode():
        for first in range(0, len(token_ids), context):
            model(torch.tensor([token_ids[first : first + context]]), use_cache=False)
    queries = torch.stack([torch.cat(seen) for seen in pieces]).transpose(1, 2)
    return torch.complex(queries[..., :16].double(), queries[..., 16:].double())


@pytest.mark.parametrize(
    ("config_class", "changes"),
    [
        (LlamaConfig, {}),
        (LlamaConfig, {"rope_parameters": LLAMA3}),
        (Qwen3Config, {"rope_parameters": YARN}),
        (Qwen2Config, {}),
        (MistralConfig, {"sliding_window": None}),
    ],
)
def test_the_file_holds_the_means_of_the_queries_before_rope(tmp_path, text, config_class, changes):
    model = make_model(tmp_path / "Tiny-1B", config_class, **changes)
    out = tmp_path / "statistics.safetensors"
    arguments = ["--text", text, "--context", 100, "--max-tokens", 330, "--dtype", "float32"]
    result = run(model, "--out", out, *arguments, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert found == {
        "out": str(out),
        "model": "Tiny-1B",
        "tokens": 330,
        "bytes": out.stat().st_size,
    }
    statistics = load_statistics(str(out))
    token_ids = AutoTokenizer.from_pretrained(model)(text.read_text()).input_ids[:330]
    expected = queries_before_rope(model, token_ids, 100)
    mean = torch.complex(*statistics.mean_query.double().chunk(2, dim=-1))
    torch.testing.assert_close(mean, expected.mean(dim=2), rtol=1e-4, atol=1e-4)
    magnitude = statistics.mean_magnitude.double()
    torch.testing.assert_close(magnitude, expected.abs().mean(dim=2), rtol=1e-4, atol=1e-4)
    assert (mean.abs() < magnitude).all()
    assert (statistics.num_layers, statistics.num_kv_heads, statistics.num_tokens) == (2, 2, 330)
    rotary = AutoModelForCausalLM.from_pretrained(model).model.rotary_emb
    assert torch.equal(statistics.inv_freq, rotary.inv_freq)


def test_without_a_text_and_in_half_precision_the_default_one_is_read(tmp_path):
    model = make_model(tmp_path / "tiny", LlamaConfig)
    out = tmp_path / "statistics.safetensors"
    result = run(model, "--out", out)
    assert result.exit_code == 0, result.output
    assert "2 layers of 6 query heads of tiny" in result.stdout
    assert load_statistics(str(out)).num_tokens > 1500


def test_ctrl_c_leaves_the_older_file_as_it_was(tmp_path, text, monkeypatch):
    model = make_model(tmp_path / "tiny", LlamaConfig)
    out = tmp_path / "statistics.safetensors"
    out.write_text("older")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(forward, "read", interrupted)
    result = run(model, "--out", out, "--text", text)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "Error: interrupted; nothing was written"
    assert out.read_text() == "older"
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, text.name, "tiny"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}, "of type 'gemma2'"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.5}, "RoPE on 0.5 of each head"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "RoPE scaling 'dynamic', wanted full attention with RoPE on whole heads",
        ),
        (SLIDING_WINDOW, "sliding-window attention"),
        ({}, "which cannot be calibrated: "),
    ],
)
def test_models_that_cannot_be_calibrated_are_refused_by_name(tmp_path, text, changes, sentence):
    model = write_config(tmp_path / "model", {**LLAMA, **changes})
    result = run(model, "--out", tmp_path / "out", "--text", text)
    assert result.exit_code == 1, result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: MODEL: got ")
    assert sentence in last
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "exit_code", "sentence"),
    [
        (["--out", "missing/out"], 2, "--out: got 'missing/out', wanted a file that can be"),
        (["--out", "."], 2, "--out: got '.', wanted a file that can be written"),
        (["--out", "out", "--text", "missing"], 1, "--text: got [Errno 2]"),
        (["--out", "out", "--text", "short"], 1, "got 'short' with 2 tokens, wanted at least 256"),
        (["--out", "out", "--text", "bytes"], 1, "--text: got 'utf-8' codec can't decode"),
        (["--out", "out", "--device", "abacus"], 1, "which cannot be calibrated: "),
    ],
)
def test_what_cannot_be_read_or_written_is_named(
    tmp_path, monkeypatch, arguments, exit_code, sentence
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").write_text("abc")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    make_model(tmp_path / "tiny", LlamaConfig)
    result = run("tiny", *arguments)
    assert result.exit_code == exit_code, result.output
    assert sentence in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
