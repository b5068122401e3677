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

from rkv_vllm.cache_owners import owners_of_readers
from rkv_vllm.calibrate import forward
from rkv_vllm.calibrate.kvsharer import choose_owners
from rkv_vllm.cli import app
from rkv_vllm.layer_budgets import budgets_of_layers
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


def make_model(folder, config_class, num_hidden_layers=2, **changes):
    """A random model of 6 query heads and 2 KV heads of 32."""
    config = config_class(
        vocab_size=512,
        hidden_size=192,
        intermediate_size=128,
        num_hidden_layers=num_hidden_layers,
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
    assert found == {"model": "Tiny-1B", "tokens": 330, "out": str(out)}
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
    num_tokens = load_statistics(str(out)).num_tokens
    assert f"tiny, 2 layers, {num_tokens} tokens read" in result.stdout
    assert num_tokens > 1500
    # As any file of the user's.
    assert out.stat().st_mode == (tmp_path / "tiny" / "config.json").stat().st_mode


def values_and_outputs(folder, token_ids, context):
    """[layers, query heads, tokens, 32] of both, from hooks around the attention itself."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    values, outputs = ([[] for _ in model.model.layers] for _ in range(2))
    for layer, of_values, of_outputs in zip(model.model.layers, values, outputs, strict=True):
        layer.self_attn.v_proj.register_forward_hook(
            lambda module, args, output, seen=of_values: seen.append(output.reshape(-1, 2, 32))
        )
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda module, args, seen=of_outputs: seen.append(args[0].reshape(-1, 6, 32))
        )
    with torch.inference_mode():
        for first in range(0, len(token_ids), context):
            model(torch.tensor([token_ids[first : first + context]]), use_cache=False)
    values = torch.stack([torch.cat(seen) for seen in values]).repeat_interleave(3, dim=2)
    return values, torch.stack([torch.cat(seen) for seen in outputs])


def test_layers_are_classed_by_how_far_attention_turns_their_values(tmp_path, text):
    model = make_model(tmp_path / "Tiny-1B", LlamaConfig, num_hidden_layers=8)
    path = tmp_path / "classes.json"
    arguments = ["--text", text, "--context", 100, "--max-tokens", 330, "--dtype", "float32"]
    result = run(model, "--layer-budgets", path, *arguments, "--json")
    assert result.exit_code == 0, result.output
    token_ids = AutoTokenizer.from_pretrained(model)(text.read_text()).input_ids[:330]
    cosines = torch.cosine_similarity(*values_and_outputs(model, token_ids, 100), dim=-1)
    importance = 1 - cosines.mean(dim=(1, 2))
    ranked = importance.argsort(descending=True).tolist()
    found = json.loads(path.read_text())
    assert (found["model"], found["num_layers"], len(found["classes"])) == ("Tiny-1B", 8, 4)
    for i, each in enumerate(found["classes"]):
        layers = sorted(ranked[2 * i : 2 * i + 2])
        assert each["layers"] == layers
        assert each["share"] == pytest.approx(float(importance[layers].mean()), abs=1e-4)
    budgets = budgets_of_layers(str(path), str(model), 8, 100, 8)
    assert sum(budgets) == 800
    assert budgets[ranked[0]] == max(budgets) > budgets[ranked[-1]]
    assert json.loads(result.stdout.splitlines()[-1]) == {
        "model": "Tiny-1B",
        "tokens": 330,
        "layer_budgets": str(path),
        "shares": [each["share"] for each in found["classes"]],
    }
    assert sorted(each.name for each in tmp_path.iterdir()) == ["Tiny-1B", path.name, text.name]


def last_hidden_states(folder, token_ids, context, owners):
    """[tokens, hidden size], where projections of readers give what those of their owners gave."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().model
    given = {}
    for number, layer in enumerate(model.layers):
        for name in ("k_proj", "v_proj"):
            key = name, owners.get(number, number)

            def give(module, args, output, key=key, owns=number not in owners):
                return given.setdefault(key, output) if owns else given[key]

            getattr(layer.self_attn, name).register_forward_hook(give)
    hidden = []
    with torch.inference_mode():
        for first in range(0, len(token_ids), context):
            given.clear()
            piece = torch.tensor([token_ids[first : first + context]])
            hidden.append(model(piece, use_cache=False).last_hidden_state[0])
    return torch.cat(hidden)


def test_distant_layers_share_caches_while_the_last_hidden_states_stay_similar(tmp_path, text):
    model = make_model(tmp_path / "Tiny-1B", LlamaConfig, num_hidden_layers=6)
    path = tmp_path / "shared.json"
    arguments = ["--text", text, "--context", 100, "--max-tokens", 330, "--dtype", "float32"]
    arguments += ["--readers", 3, "--least-similarity", 0.6]
    result = run(model, "--share-layers", path, *arguments, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    owners = owners_of_readers(str(path), str(model), 6)
    assert found["reads"] == {str(reader): owner for reader, owner in owners.items()}
    token_ids = AutoTokenizer.from_pretrained(model)(text.read_text()).input_ids[:330]
    alone = last_hidden_states(model, token_ids, 100, {})

    def similarity(owners):
        shared = last_hidden_states(model, token_ids, 100, owners)
        return torch.cosine_similarity(shared, alone, dim=-1).mean().item()

    assert found["similarity"] == pytest.approx(similarity(owners), abs=2e-4)
    assert 0.6 <= found["similarity"] < 0.999
    assert 1 <= len(owners) <= 3


def test_pairs_are_tried_from_the_most_distant_and_owners_keep_their_caches():
    distances = torch.zeros(4, 4)
    order = [(0, 3), (1, 2), (0, 1), (2, 3), (1, 3), (0, 2)]
    for rank, pair in enumerate(order):
        distances[pair] = distances[pair[::-1]] = 10.0 - rank
    tried = []

    def similarity(owners):
        tried.append(owners)
        return 0.1 if owners == {3: 0} else 0.7

    assert choose_owners(distances, 2, similarity, 0.5) == {2: 1, 3: 1}
    # 1 reads 0 is not tried: 1 is an owner. Nor 2 reads 0 and 3 reads 2: 2 reads.
    assert tried == [{3: 0}, {2: 1}, {2: 1, 3: 1}]
    assert choose_owners(distances, 1, similarity, 0.5) == {2: 1}
    assert choose_owners(distances, 2, similarity, 0.8) == {}


def test_what_cannot_be_shared_is_refused(tmp_path, text):
    model = make_model(tmp_path / "Tiny-1B", LlamaConfig, num_hidden_layers=4)
    path = tmp_path / "shared.json"
    result = run(model, "--share-layers", path, "--text", text, "--readers", 3)
    assert result.exit_code == 2
    assert "--readers: got 3 of 4 layers, wanted at most 2; lower it" in result.stderr
    result = run(model, "--share-layers", path, "--text", text, "--least-similarity", 1)
    assert result.exit_code == 1
    assert "--least-similarity: got 1.0, which no pair of layers reaches" in result.stderr
    assert not path.exists()


def test_layers_that_make_no_classes_are_refused_before_the_weights_are_read(tmp_path, text):
    model = write_config(tmp_path / "model", {**LLAMA, "num_hidden_layers": 5})
    result = run(model, "--layer-budgets", tmp_path / "out", "--text", text)
    assert result.exit_code == 1
    assert "got 'a model of 5 layers', wanted one whose layers make" in result.stderr


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
        ([], 2, "--out, --layer-budgets, --share-layers: got none of them, wanted at least"),
        (["--layer-budgets", "."], 2, "--layer-budgets: got '.', wanted a file, not a folder"),
        (["--out", "missing/out"], 2, "--out: got 'missing/out', wanted a file in a folder"),
        (["--out", "."], 2, "--out: got '.', wanted a file, not a folder"),
        (["--out", "/proc/out"], 2, "--out: got '/proc/out', wanted a folder that can be written"),
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
