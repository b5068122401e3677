"""`plan` for the models that people serve, against arithmetic by hand.

16 GiB of cache, prompts of 512, outputs of 16,384 tokens: the last one computes 16,895. R-KV with
budget 1,024 and buffer 128 holds 1,154 at most, two tokens being in flight.
"""

import json

import pytest
from typer.testing import CliRunner

from rkv_vllm.cli import app
from tests import model_configs
from tests.checkpoint_configs import write_config

GIB = 2**30


def plan(tmp_path, config, *flags):
    model = write_config(tmp_path, config)
    return CliRunner().invoke(
        app, ["plan", model, "--kv-cache-memory-bytes", "16GiB", *map(str, flags), "--json"]
    )


# Layers compacted and not; then a block's tokens and bytes, and the blocks that a request holds at
# most: ceil(16,895 / block) with stock, ceil(1,154 / block) with R-KV, plus those of other layers.
PLANS = {
    # A token: 2 * 36 layers * 8 heads * 128 * 2 bytes = 147,456.
    "qwen3-8b": (model_configs.QWEN3_8B, [], "36 of full", "none", 16, 16 * 147456, 1056, 73),
    # 2 * 32 * 8 * 128 * 2 = 131,072.
    "r1-distill-llama-8b": (
        *(model_configs.R1_DISTILL_LLAMA_8B, [], "32 of full", "none"),
        *(16, 16 * 131072, 1056, 73),
    ),
    # Two groups of 12 layers of 2 * 8 * 64 * 2 = 2,048 bytes; a window holds
    # ceil((127 + 2) / 16) + 1 = 10 blocks.
    "gpt-oss-20b": (
        *(model_configs.GPT_OSS_20B, [], "12 of full", "12 with a window of 128 tokens"),
        *(16, 16 * 12 * 2048, 1056 + 10, 73 + 10),
    ),
    # 62 layers are 10 full and 52 sliding: one group and 6, of 10 layers of 2 * 16 * 128 * 2 bytes.
    # A window holds ceil((1,023 + 2) / 16) + 1 = 66 blocks.
    "gemma-3-27b": (
        *(model_configs.GEMMA3_27B, [], "10 of full", "52 with a window of 1024 tokens"),
        *(16, 16 * 10 * 8192, 1056 + 6 * 66, 73 + 6 * 66),
    ),
    # A state: 3 * (2 * 2,048 + 4,096) * 2 + 32 * 128 * 128 * 4 = 2,146,304 bytes; a token of a
    # layer 2 * 2 * 256 * 2 = 2,048; so a block 16 * ceil(2,146,304 / 32,768) = 1,056 tokens. 10
    # full and 30 others: one group and 3 with 2 blocks each. ceil(16,895 / 1,056) = 16, and with
    # budget 1,982, which makes 2,112 = two whole blocks, 2.
    "qwen3.5-35b-a3b": (
        *(model_configs.QWEN3_5_35B_A3B, ["--budget", 1982]),
        *("10 of full", "30 with a state (gated delta net)"),
        *(1056, 1056 * 10 * 2048, 16 + 6, 2 + 6),
    ),
    # A state of 2 * 1,024 * 2 bytes fits into 16 tokens of 2 * 8 * 64 * 2. 6 full and 10 others: 10
    # is not less than 1.5 * 6, so one group and 2 with 2 blocks each, of 6 layers.
    "lfm2-350m": (
        *(model_configs.LFM2_350M, [], "6 of full", "10 with a short convolution"),
        *(16, 16 * 6 * 2048, 1056 + 4, 73 + 4),
    ),
    # A state: 3 * (8,192 + 2 * 128) * 2 + 128 * 64 * 128 * 2 = 2,147,840 bytes; a token of a layer
    # 2 * 8 * 128 * 2 = 4,096; so a block 16 * ceil(2,147,840 / 65,536) = 528 tokens. 4 full and 36
    # others: one group and 9 with 3 blocks each. ceil(16,895 / 528) = 32, ceil(1,154 / 528) = 3.
    "granite-4-h-small": (
        *(model_configs.GRANITE_4_H_SMALL, [], "4 of full", "36 with a state (Mamba2)"),
        *(528, 528 * 4 * 4096, 32 + 27, 3 + 27),
    ),
}


@pytest.mark.parametrize(
    ("config", "flags", "compacted", "kept", "block", "block_bytes", "stock_blocks", "rkv_blocks"),
    PLANS.values(),
    ids=PLANS,
)
def test_what_is_compacted_and_how_many_requests_fit(
    tmp_path, config, flags, compacted, kept, block, block_bytes, stock_blocks, rkv_blocks
):
    result = plan(tmp_path, config, *flags)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["layers"].startswith(f"{compacted} attention are compacted")
    assert found["layers"].endswith(f"as vLLM has them: {kept}")
    stock, rkv = found["sides"]["stock"], found["sides"]["rkv"]
    num_blocks = 16 * GIB // block_bytes
    for side, blocks in ((stock, stock_blocks), (rkv, rkv_blocks)):
        assert side["block_tokens"] == block
        assert side["pool_blocks"] == num_blocks
        assert side["request_peak_blocks"] == blocks
        assert side["at_once_peak"] == (num_blocks - 1) // blocks
    assert any("freed whole" in note for note in found["notes"]) == (block > 16)


def test_a_budget_below_a_state_is_refused_with_the_number_that_works(tmp_path):
    result = plan(tmp_path, model_configs.QWEN3_5_35B_A3B, "--budget", 1024)
    assert result.exit_code == 1
    assert "--kv-budget: got 1024, wanted at least 1056" in result.stderr
    assert "blocks of 1056 tokens" in result.stderr
    # 2 * 1,056 tokens, less a buffer of 128 and two in flight.
    assert "pass --kv-budget 1982" in result.stderr
    assert plan(tmp_path, model_configs.QWEN3_5_35B_A3B, "--budget", 1982).exit_code == 0
    assert plan(tmp_path, model_configs.QWEN3_5_35B_A3B, "--budget", 1056).exit_code == 0


def test_ranks_share_states_and_heads(tmp_path):
    """Half of 4 KV heads' worth stays one head of 256: 1,024 bytes; half a state is 1,073,152."""
    flags = ("--budget", 2000, "--tensor-parallel-size", 2)
    found = json.loads(plan(tmp_path, model_configs.QWEN3_5_35B_A3B, *flags).stdout)
    assert found["sides"]["rkv"]["block_tokens"] == 16 * -(-1073152 // (16 * 1024)) == 1056


def test_a_latent_cache_is_refused_by_name(tmp_path):
    result = plan(tmp_path, model_configs.DEEPSEEK_V3)
    assert result.exit_code == 1
    assert "multi-head latent attention (kv_lora_rank)" in result.stderr
