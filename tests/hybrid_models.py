"""Small random models whose layers keep a state beside those of full attention.

As in `models.py`, weights are scaled so that greedy text varies and depends on what attention
reads; the state layers (short convolution, Mamba2, gated delta net) carry a share of it. vLLM and
transformers load the same folder.
"""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeHybridConfig,
    Lfm2Config,
    PretrainedConfig,
    Qwen3NextConfig,
)

from tests.models import (
    ATTENTION_GAIN,
    COMMON_KEY_ENERGY,
    CONSTANT_CHANNEL,
    EOS_TOKEN_ID,
    KEY_STD,
    LOGIT_STD,
    QUERY_STD,
    SPECIAL_TOKENS,
    tiny_tokenizer,
)

VOCAB, MAX_POSITIONS = 1024, 4096
# Unlike every other width below, so that readers and writers of the residual stream are known.
HIDDEN = 192
HEAD_DIM = 32
CONV, FULL = "conv", "full_attention"

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": False,
    "bos_token_id": SPECIAL_TOKENS.index("<s>"),
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": SPECIAL_TOKENS.index("<pad>"),
    "dtype": torch.float32,
}


def lfm2_config() -> PretrainedConfig:
    """Short convolutions and full attention, two to one."""
    return Lfm2Config(
        **{**_COMMON, "tie_word_embeddings": True},
        intermediate_size=256,
        block_auto_adjust_ff_dim=False,
        # As in the checkpoints; transformers has no fields for them.
        conv_dim=HIDDEN,
        block_dim=HIDDEN,
        num_hidden_layers=6,
        num_attention_heads=HIDDEN // HEAD_DIM,
        layer_types=[CONV, FULL, CONV, CONV, FULL, CONV],
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )


def granite4_config() -> PretrainedConfig:
    """Mamba2 and full attention, with Granite's own multipliers."""
    return GraniteMoeHybridConfig(
        **_COMMON,
        intermediate_size=256,
        shared_intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=HIDDEN // HEAD_DIM,
        num_local_experts=0,
        num_experts_per_tok=0,
        layer_types=["mamba", "attention"] * 2,
        mamba_n_heads=12,
        mamba_d_head=32,
        mamba_d_state=16,
        mamba_n_groups=1,
        mamba_expand=2,
        position_embedding_type="rope",
        attention_multiplier=0.25,
        residual_multiplier=0.8,
        logits_scaling=1.25,
    )


def qwen3_next_config() -> PretrainedConfig:
    """Gated delta nets, full attention and experts."""
    return Qwen3NextConfig(
        **_COMMON,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        layer_types=["linear_attention", FULL] * 2,
    )


CONFIGS = {"lfm2": lfm2_config, "granite4": granite4_config, "qwen3_next": qwen3_next_config}


def random_hybrid_model(directory: Path, family: str, seed: int = 0) -> Path:
    """Writes a random float32 model with its tokenizer and returns its folder.

    Args:
        directory: folder to write to.
        family: a key of CONFIGS.
        seed: of the weights.
    """
    with torch.random.fork_rng():
        # Decay rates of a gated delta net are drawn when it is made.
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIGS[family]()).to(torch.float32)
    _draw_weights(model, torch.Generator().manual_seed(seed))
    model.save_pretrained(directory)
    tiny_tokenizer(VOCAB, MAX_POSITIONS).save_pretrained(directory)
    return directory


@torch.no_grad()
def _draw_weights(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Overwrites matrices; what has one dimension stays as transformers initialises it."""
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            if name.endswith(("q_layernorm.weight", "k_layernorm.weight")):
                weight.fill_(QUERY_STD if "q_" in name else KEY_STD)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                # Qwen3-Next adds one to them.
                weight.fill_((QUERY_STD if "q_" in name else KEY_STD) - 1)
            elif name.endswith("embedding_norm.weight"):
                # LFM2's embedding is its head: without these signs each token would follow itself.
                signs = torch.randint(2, weight.shape, generator=generator) * 2 - 1
                weight.copy_(signs * LOGIT_STD * HIDDEN**-0.5)
                weight[CONSTANT_CHANNEL] = 0
            continue
        part = name.removesuffix(".weight").rpartition(".")[2]
        gain = {"q_proj": QUERY_STD, "k_proj": KEY_STD, "lm_head": LOGIT_STD}.get(part, 1.0)
        if part in ("o_proj", "out_proj"):
            gain = ATTENTION_GAIN
        drawn = torch.randn(weight.shape, generator=generator)
        fan_in = 1 if part == "embed_tokens" else weight.shape[-1]
        weight.copy_(drawn * gain * fan_in**-0.5)
        if part == "embed_tokens":
            weight[:, CONSTANT_CHANNEL] = 1
        elif part == "k_proj":
            weight *= (1 - COMMON_KEY_ENERGY) ** 0.5
            common = torch.randn(weight.shape[0], generator=generator)
            weight[:, CONSTANT_CHANNEL] = common * KEY_STD * COMMON_KEY_ENERGY**0.5
        elif weight.shape[-1] == HIDDEN:
            weight[..., CONSTANT_CHANNEL] = 0
        elif weight.shape[-2] == HIDDEN:
            weight[..., CONSTANT_CHANNEL, :] = 0
    # As in `models.py`: text does not end by chance.
    model.lm_head.weight[: len(SPECIAL_TOKENS)] = 0
