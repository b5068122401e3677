"""What is read out of a config.json, and what is refused."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rkv_vllm.cli.checkpoint import find_config, read_config, read_decoder, weight_bytes
from rkv_vllm.cli.errors import CommandError
from tests import checkpoint_configs, model_configs
from tests.checkpoint_configs import LLAMA, write_config

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 8, "moe_intermediate_size": 512, "decoder_sparse_step": 1}
FAMILIES = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, biases": {"attention_bias": True},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 8, "sliding_window": None},
    "qwen3_moe": {**EXPERTS, "mlp_only_layers": []},
}


@pytest.mark.parametrize(("family", "changes"), FAMILIES.items(), ids=FAMILIES)
def test_estimated_weights_are_those_of_the_model(tmp_path, family, changes):
    fields = {**SHAPE, **changes, "model_type": family.partition(",")[0]}
    config = AutoConfig.from_pretrained(write_config(tmp_path, fields))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    exact = sum(parameter.numel() for parameter in model.parameters())
    estimate, is_guess = weight_bytes(tmp_path, read_decoder(fields), "float32")
    assert is_guess
    assert estimate == pytest.approx(4 * exact, rel=2e-4)


def test_weights_that_are_there_are_measured(tmp_path):
    decoder = read_decoder({**LLAMA, "dtype": "float32"})
    (tmp_path / "model-00001.safetensors").write_bytes(bytes(800))
    (tmp_path / "model-00002.safetensors").write_bytes(bytes(400))
    # Stored in 4 bytes; vLLM's `auto` takes 2.
    assert weight_bytes(tmp_path, decoder, "float32") == (1200, False)
    assert weight_bytes(tmp_path, decoder, "auto") == (600, False)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"metadata": {"total_size": 1000}, "weight_map": {}}')
    assert weight_bytes(tmp_path, decoder, "float32") == (1000, False)
    # Quantised weights keep their size.
    quantised = read_decoder({**LLAMA, "quantization_config": {"quant_method": "awq"}})
    assert weight_bytes(tmp_path, quantised, "float32") == (1000, False)


def test_heads_that_are_not_stated_follow_from_the_others():
    fields = {k: v for k, v in LLAMA.items() if k not in ("head_dim", "num_key_value_heads")}
    decoder = read_decoder(fields)
    assert (decoder.num_kv_heads, decoder.head_size) == (2, 32)


def test_the_text_part_of_a_multimodal_model_is_read():
    fields = {"model_type": "x", "text_config": LLAMA, "vision_config": {}}
    assert read_decoder(fields) == read_decoder(LLAMA)


def test_what_the_text_part_leaves_to_its_family_is_transformers():
    decoder = read_decoder(model_configs.GEMMA3_4B)
    shape = (decoder.num_layers, decoder.num_heads, decoder.num_kv_heads, decoder.head_size)
    assert shape == (34, 8, 4, 256)
    assert decoder.layers.num_full == 5
    unknown = {**model_configs.GEMMA3_4B, "model_type": "no-such-family"}
    with pytest.raises(CommandError, match="'num_attention_heads': got nothing"):
        read_decoder(unknown)


@pytest.mark.parametrize(
    ("changes", "feature"),
    [
        (checkpoint_configs.SLIDING_WINDOW, "2 layers with a window of 128 tokens, wanted one"),
        (checkpoint_configs.ALL_WINDOWS, "2 layers with a window of 128 tokens, wanted one"),
        (checkpoint_configs.CHUNKED, "2 layers with chunks of 128 tokens, wanted one"),
        ({"layer_types": ["full_attention", "rwkv"]}, "layers of kind 'rwkv', wanted"),
        ({"layer_types": ["full_attention", "mamba"]}, "mamba layers without 'mamba_n_heads'"),
        (checkpoint_configs.LATENT, "latent"),
        (checkpoint_configs.CROSS_ATTENTION, "encoder"),
        ({"hidden_size": None}, "'hidden_size': got nothing"),
        ({"num_attention_heads": 0}, "'num_attention_heads': got 0"),
        ({"num_hidden_layers": "2"}, "'num_hidden_layers': got '2'"),
        ({"text_config": []}, "'text_config'"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(changes, feature):
    with pytest.raises(CommandError, match=r"got .*, wanted .*; .*") as error:
        read_decoder({**LLAMA, **changes})
    assert feature in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"intermediate_size": None},
        {"vocab_size": None},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"decoder_sparse_step": 2},
        {"mlp_only_layers": [1]},
    ],
)
def test_weights_that_cannot_be_estimated_are_refused_by_name(tmp_path, changes):
    with pytest.raises(CommandError, match=r"got .*, wanted .*; .*") as error:
        weight_bytes(tmp_path, read_decoder({**LLAMA, **changes}), "auto")
    assert next(iter(changes)) in str(error.value)


def test_a_window_that_is_switched_off_is_no_window():
    assert read_decoder(checkpoint_configs.UNUSED_WINDOW).num_layers == 2


def test_a_hub_id_is_found_in_the_local_cache(tmp_path, monkeypatch):
    commit = "0" * 40
    repository = tmp_path / "models--someone--model"
    write_config(repository / "snapshots" / commit, LLAMA)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert read_config(find_config("someone/model")) == LLAMA


@pytest.mark.parametrize("model", ["no/such/folder/here", "no-such-model", "a//b", "~nobody/x"])
def test_unknown_models_are_refused_by_name(model):
    with pytest.raises(CommandError, match=r"^MODEL: got .*, wanted a folder with .*; "):
        find_config(model)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(CommandError, match="a folder without config"):
        find_config(str(tmp_path))


@pytest.mark.parametrize("content", ["", "{", "[]", "\udcff"])
def test_a_broken_config_is_refused(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CommandError, match=r"config.json: got .*, wanted .*; "):
        read_config(path)


def test_the_config_is_read_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert read_config(find_config(str(tmp_path))) == LLAMA
