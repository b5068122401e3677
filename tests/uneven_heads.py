"""A small random model whose layers have different numbers of KV heads.

vLLM serves the kind as Nemotron-NAS; transformers only with code from the hub, so config and model
are registered here.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from tests.families import HEAD_DIM, HIDDEN, MAX_POSITIONS, VOCAB, draw_weights
from tests.models import EOS_TOKEN_ID, SPECIAL_TOKENS, tiny_tokenizer

NUM_HEADS = 6
KV_HEADS = (1, 3, 6, 2)


class Part(dict):
    """A JSON object whose fields are attributes too."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class UnevenConfig(LlamaConfig):
    """Nemotron-NAS's config.json: `block_configs` has a description of each layer."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[dict] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block_configs = [
            Part({name: Part(part) for name, part in block.items()})
            for block in block_configs or ()
        ]


class UnevenForCausalLM(LlamaForCausalLM):
    """A Llama with as many KV heads in each layer as its config says."""

    config_class = UnevenConfig

    def __init__(self, config: UnevenConfig) -> None:
        super().__init__(config)
        for layer_idx, (layer, block) in enumerate(
            zip(self.model.layers, config.block_configs, strict=True)
        ):
            own = LlamaConfig(**{**config.to_dict(), "model_type": "llama"})
            own.num_key_value_heads = NUM_HEADS // block.attention.n_heads_in_group
            own._attn_implementation = config._attn_implementation
            layer.self_attn = LlamaAttention(own, layer_idx)


AutoConfig.register(UnevenConfig.model_type, UnevenConfig)
AutoModelForCausalLM.register(UnevenConfig, UnevenForCausalLM)


def uneven_model(directory: Path) -> Path:
    """Writes the model with its tokenizer and returns its folder."""
    ffn = {"no_op": False, "intermediate_size": 2 * HIDDEN}
    config = UnevenConfig(
        block_configs=[
            {"attention": {"no_op": False, "n_heads_in_group": NUM_HEADS // kv_heads}, "ffn": ffn}
            for kv_heads in KV_HEADS
        ],
        architectures=["DeciLMForCausalLM"],
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=len(KV_HEADS),
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=KV_HEADS[0],
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=SPECIAL_TOKENS.index("<s>"),
        eos_token_id=EOS_TOKEN_ID,
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        dtype=torch.float32,
    )
    model = UnevenForCausalLM(config).to(torch.float32)
    draw_weights(model, torch.Generator().manual_seed(0))
    model.save_pretrained(directory)
    config.architectures = ["DeciLMForCausalLM"]
    config.save_pretrained(directory)
    tiny_tokenizer(VOCAB, MAX_POSITIONS).save_pretrained(directory)
    return directory
