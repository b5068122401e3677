"""`doctor` for the models that people serve: what is compacted, what not, what a start refuses."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from rkv_vllm.cli.diagnosis import examine
from tests import model_configs
from tests.checkpoint_configs import write_config


def text_only(config: dict, architecture: str) -> dict:
    """The language part alone: inspecting the whole needs torchvision, which is not installed."""
    return {**config["text_config"], "architectures": [architecture], "dtype": "bfloat16"}


GEMMA3 = text_only(model_configs.GEMMA3_27B, "Gemma3ForCausalLM")
# Of the same shape; Qwen3.5's own class needs torchvision even so.
QWEN3_NEXT = {
    **text_only(model_configs.QWEN3_5_35B_A3B, "Qwen3NextForCausalLM"),
    "model_type": "qwen3_next",
}
# A layer that keeps windows or states is one of `rkv-vllm plan`'s, whose tests reckon by hand.
FINE = {
    "qwen3-8b": (model_configs.QWEN3_8B, "36 of full attention are compacted", "none"),
    "r1-distill": (model_configs.R1_DISTILL_LLAMA_8B, "32 of full attention", "none"),
    "gpt-oss-20b": (model_configs.GPT_OSS_20B, "12 of full", "12 with a window of 128 tokens"),
    "gemma-3-27b": (GEMMA3, "10 of full", "52 with a window of 1024 tokens"),
    "lfm2-350m": (model_configs.LFM2_350M, "6 of full", "10 with a short convolution"),
    "granite-4": (model_configs.GRANITE_4_H_SMALL, "4 of full", "36 with a state (Mamba2)"),
}


def diagnosed(tmp_path, config, *flags):
    """Findings by name, and messages of those that refuse."""
    model = write_config(tmp_path / "model", config)
    flags = ["--dtype", "bfloat16", "--max-model-len", "8192", *flags]
    findings = list(examine(model, flags))
    refused = [each.message for each in findings if each.status == "refused"]
    return {each.name: each for each in findings}, refused


# vLLM inspects each architecture in a process of its own, half a minute the first time.
@pytest.mark.nightly
@pytest.mark.parametrize(("config", "compacted", "kept"), FINE.values(), ids=FINE)
def test_what_is_compacted_is_said(tmp_path, config, compacted, kept):
    # On CPUs Mamba2's states are float32, and blocks have 1,152 tokens.
    found, refused = diagnosed(tmp_path, config, "--kv-budget", "2048")
    assert refused == []
    assert found["layers"].message.startswith(compacted)
    assert found["layers"].message.endswith(f"as vLLM has them: {kept}")


@pytest.mark.nightly
def test_a_budget_below_a_state_is_refused_with_the_number_that_works(tmp_path):
    """The block is that of test_plan_families.py, by vLLM's own arithmetic."""
    flags = ["--block-size", "32"]
    found, refused = diagnosed(tmp_path, QWEN3_NEXT, *flags)
    assert found["layers"].message.startswith("10 of full attention are compacted")
    (sentence,) = refused
    assert sentence.startswith("--kv-budget: got 1024, wanted at least 1056: ")
    # Two blocks, less a buffer of 128 and one token in flight: a CPU schedules synchronously.
    assert "pass --kv-budget 1983, " in sentence
    found, refused = diagnosed(tmp_path, QWEN3_NEXT, *flags, "--kv-budget", "1983")
    assert refused == []
    assert found["blocks"].message.startswith("of 1056 tokens")


@pytest.mark.nightly
def test_a_latent_cache_is_refused_by_name(tmp_path):
    _, refused = diagnosed(tmp_path, model_configs.DEEPSEEK_V3)
    assert any("multi-head latent attention (MLA)" in sentence for sentence in refused)


@pytest.mark.nightly
@pytest.mark.skipif(find_spec("torchvision") is not None, reason="it is the package that lacks")
def test_a_vision_part_that_lacks_a_package_is_one_sentence_and_the_text_part_is_judged(tmp_path):
    model = write_config(tmp_path / "model", model_configs.GEMMA3_4B)
    command = [sys.executable, "-m", "rkv_vllm.cli", "doctor", model, "--", "--dtype=bfloat16"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = " ".join(done.stdout.split())
    assert "5 of full attention are compacted; as vLLM has them: 29 with a window of 1024" in said
    assert "Gemma3ForConditionalGeneration, this model's class: ModuleNotFoundError: No module" in (
        said
    )
    assert "pip install torchvision A start of " in said
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == 1
