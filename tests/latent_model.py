"""Random models of multi-head latent attention, small enough to write in a second.

Made like those of models.py, so that their text varies and many keys are alike. Ranks are those of
DeepSeek-V2, the only ones that vLLM's CPU attention takes.
"""

from pathlib import Path

import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from tests.models import (
    ATTENTION_GAIN,
    COMMON_KEY_ENERGY,
    CONSTANT_CHANNEL,
    EOS_TOKEN_ID,
    KEY_STD,
    LOGIT_STD,
    QUERY_STD,
    SPECIAL_TOKENS,
    draw,
    share_key_part,
    tiny_tokenizer,
)

LATENT_RANK, ROPE_SIZE = 512, 64
ROW_SIZE = LATENT_RANK + ROPE_SIZE
NUM_LAYERS = 3
HEADS, NOPE_SIZE = 4, 32


def random_latent_model(directory: Path, *, vocab: int = 1024, seed: int = 0) -> Path:
    """Writes a random float32 model of four query heads with its tokenizer; returns its folder."""
    config = DeepseekV2Config(
        vocab_size=vocab,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        kv_lora_rank=LATENT_RANK,
        q_lora_rank=None,
        qk_rope_head_dim=ROPE_SIZE,
        qk_nope_head_dim=NOPE_SIZE,
        v_head_dim=32,
        first_k_dense_replace=NUM_LAYERS,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=SPECIAL_TOKENS.index("<s>"),
        eos_token_id=EOS_TOKEN_ID,
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
        dtype=torch.float32,
    )
    model = DeepseekV2ForCausalLM(config).to(torch.float32)
    _draw_weights(model, torch.Generator().manual_seed(seed))
    model.save_pretrained(directory)
    tiny_tokenizer(vocab, 4096).save_pretrained(directory)
    return directory


@torch.no_grad()
def _draw_weights(model: torch.nn.Module, generator: torch.Generator) -> None:
    embedding = model.model.embed_tokens.weight
    embedding.copy_(torch.randn(embedding.shape, generator=generator))
    embedding[:, CONSTANT_CHANNEL] = 1
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for projection, gain in (
            (attention.q_proj, QUERY_STD),
            (attention.kv_a_proj_with_mqa, KEY_STD),
            (attention.kv_b_proj, KEY_STD),
            (attention.o_proj, ATTENTION_GAIN),
            (mlp.gate_proj, 1.0),
            (mlp.up_proj, 1.0),
            (mlp.down_proj, 1.0),
        ):
            draw(projection.weight, gain, generator)
        for reader in (attention.q_proj, mlp.gate_proj, mlp.up_proj):
            reader.weight[:, CONSTANT_CHANNEL] = 0
        for writer in (attention.o_proj, mlp.down_proj):
            writer.weight[CONSTANT_CHANNEL] = 0
        share_key_part(attention.kv_a_proj_with_mqa.weight, generator)
        # Values are made of the same latents and must not have much in common.
        common = attention.kv_a_proj_with_mqa.weight[:LATENT_RANK, CONSTANT_CHANNEL]
        direction = common / common.norm()
        values = attention.kv_b_proj.weight.view(HEADS, -1, LATENT_RANK)[:, NOPE_SIZE:]
        values -= (values @ direction).unsqueeze(-1) * direction
        values *= (1 - COMMON_KEY_ENERGY) ** -0.5
    draw(model.lm_head.weight, LOGIT_STD, generator)
    model.lm_head.weight[:, CONSTANT_CHANNEL] = 0
    model.lm_head.weight[: len(SPECIAL_TOKENS)] = 0
