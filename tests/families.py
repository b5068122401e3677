"""Small random models of the families that mix kinds of attention layers.

Drawn like those of `models.py`, so that the text depends on what attention reads. What transformers
knows of such a model's windows, sinks and soft caps, `reference.py` computes. Next:
test_families.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models import (
    ATTENTION_GAIN,
    COMMON_KEY_ENERGY,
    CONSTANT_CHANNEL,
    EOS_TOKEN_ID,
    KEY_STD,
    LOGIT_STD,
    MLP_GAIN,
    QUERY_STD,
    SPECIAL_TOKENS,
    tiny_tokenizer,
)

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
WINDOW = 40
HIDDEN, HEAD_DIM = 192, 32
VOCAB = 1024
MAX_POSITIONS = 4096


class Family(NamedTuple):
    """What is special about a family.

    Attributes:
        config: fields of its `config.json` beside the common ones.
        scaled_embedding: whether the model multiplies embeddings by the root of their width.
        offset_norms: whether a norm's weight of zero means one.
        query_std: standard deviation of normed queries.
        num_groups: KV-cache groups that vLLM makes of its layers.
    """

    config: Mapping[str, Any]
    scaled_embedding: bool = False
    offset_norms: bool = False
    query_std: float = QUERY_STD
    num_groups: int = 2


_PLAIN = Family({})
_GEMMA = {"tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"}
# Scales that are not those of the head size.
FAMILIES = {
    "gemma2": Family(
        {
            "model_type": "gemma2",
            "layer_types": [SLIDING, FULL] * 2,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 30.0,
            **_GEMMA,
        },
        scaled_embedding=True,
        offset_norms=True,
    ),
    "gemma3": Family(
        {
            "model_type": "gemma3_text",
            "layer_types": [SLIDING, SLIDING, FULL] * 2,
            "query_pre_attn_scalar": 20,
            **_GEMMA,
        },
        scaled_embedding=True,
        offset_norms=True,
        num_groups=3,
    ),
    # The last two layers read the caches of the two before them. Full layers have larger heads, so
    # vLLM gives their blocks half as many tokens.
    "gemma4": Family(
        {
            "model_type": "gemma4_text",
            "layer_types": [SLIDING, FULL] * 3,
            "num_kv_shared_layers": 2,
            "global_head_dim": 2 * HEAD_DIM,
            "hidden_size_per_layer_input": 0,
            "hidden_activation": "gelu_pytorch_tanh",
        },
        scaled_embedding=True,
        # Its logits are not scaled.
        query_std=QUERY_STD * HEAD_DIM**-0.5,
    ),
    "gpt-oss": Family(
        {
            "model_type": "gpt_oss",
            "layer_types": [SLIDING, FULL] * 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "attention_bias": True,
        }
    ),
    "ministral": Family({"model_type": "mistral", "layer_types": [SLIDING, FULL] * 2}),
    "command-r7b": Family(
        {
            "model_type": "cohere2",
            "layer_types": [SLIDING, FULL] * 2,
            "logit_scale": 1.0,
            "tie_word_embeddings": True,
        }
    ),
    "llama4": Family(
        {
            "model_type": "llama4_text",
            "layer_types": [CHUNKED, FULL] * 2,
            "no_rope_layers": [1, 0] * 2,
            "attention_chunk_size": 64,
            "moe_layers": [],
            "interleave_moe_layer_step": 99,
            "intermediate_size_mlp": 2 * HIDDEN,
        }
    ),
}


def compressed_layers(name: str) -> list[bool]:
    """Which layers of a family own a cache of full attention."""
    config = FAMILIES[name].config
    layer_types = config["layer_types"]
    num_owners = len(layer_types) - config.get("num_kv_shared_layers", 0)
    return [kind == FULL and i < num_owners for i, kind in enumerate(layer_types)]


def random_family(directory: Path, name: str, num_kv_heads: int = 2, group: int = 3) -> Path:
    """Writes a random float32 model of a family and returns its folder.

    Args:
        directory: folder to write to, made when missing.
        name: of `FAMILIES`.
        num_kv_heads: KV heads.
        group: query heads per KV head.
    """
    family = FAMILIES[name]
    fields = dict(family.config)
    config = AutoConfig.for_model(
        fields.pop("model_type"),
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=len(fields["layer_types"]),
        num_attention_heads=num_kv_heads * group,
        num_key_value_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=SPECIAL_TOKENS.index("<s>"),
        eos_token_id=EOS_TOKEN_ID,
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
        dtype=torch.float32,
        **({} if CHUNKED in fields["layer_types"] else {"sliding_window": WINDOW}),
        **{"tie_word_embeddings": False, **fields},
    )
    model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    draw_weights(model, torch.Generator().manual_seed(0), family)
    model.save_pretrained(directory)
    tiny_tokenizer(VOCAB, MAX_POSITIONS).save_pretrained(directory)
    return directory


# By the last names of a weight: its gain, and whether it reads or writes the residual stream.
_READERS = {
    "q_proj.weight": QUERY_STD,
    "v_proj.weight": 1.0,
    "gate_proj.weight": 1.0,
    "up_proj.weight": 1.0,
    "router.weight": 2.0,
}
_WRITERS = {"o_proj.weight": ATTENTION_GAIN, "down_proj.weight": MLP_GAIN}
_EXPERTS = {"experts.gate_up_proj": 1.0, "experts.down_proj": MLP_GAIN}


@torch.no_grad()
def draw_weights(
    model: torch.nn.Module, generator: torch.Generator, family: Family = _PLAIN
) -> None:
    """Overwrites all weights of a model.

    Args:
        model: of transformers.
        generator: where the numbers come from.
        family: what is special about it.

    Raises:
        ValueError: a weight of an unknown name.
    """

    def randn(parameter: torch.Tensor) -> torch.Tensor:
        return torch.randn(parameter.shape, generator=generator)

    one = 0.0 if family.offset_norms else 1.0
    for name, parameter in model.named_parameters():
        ending = ".".join(name.split(".")[-2:])
        if ending in _READERS:
            parameter.copy_(randn(parameter) * _READERS[ending] * HIDDEN**-0.5)
            parameter[:, CONSTANT_CHANNEL] = 0
        elif ending in _WRITERS:
            parameter.copy_(randn(parameter) * _WRITERS[ending] * parameter.shape[1] ** -0.5)
            parameter[CONSTANT_CHANNEL] = 0
        elif ending == "k_proj.weight":
            own = (1 - COMMON_KEY_ENERGY) ** 0.5 * KEY_STD
            parameter.copy_(randn(parameter) * own * HIDDEN**-0.5)
            common = torch.randn(parameter.shape[0], generator=generator)
            parameter[:, CONSTANT_CHANNEL] = common * KEY_STD * COMMON_KEY_ENERGY**0.5
        elif ending in _EXPERTS:
            parameter.copy_(randn(parameter) * _EXPERTS[ending] * parameter.shape[1] ** -0.5)
            if ending == "experts.gate_up_proj":
                parameter[:, CONSTANT_CHANNEL] = 0
            else:
                parameter[..., CONSTANT_CHANNEL] = 0
        elif ending.endswith("q_norm.weight"):
            parameter.fill_(family.query_std - 1 + one)
        elif ending.endswith("k_norm.weight"):
            parameter.fill_(KEY_STD - 1 + one)
        elif ending.endswith("sinks"):
            parameter.copy_(randn(parameter))
        elif ending.endswith("norm.weight"):
            parameter.fill_(one)
        elif "bias" in ending:
            parameter.zero_()
        elif ending == "lm_head.weight":
            parameter.copy_(randn(parameter) * LOGIT_STD * HIDDEN**-0.5)
            parameter[:, CONSTANT_CHANNEL] = 0
            parameter[: len(SPECIAL_TOKENS)] = 0
        elif ending != "embed_tokens.weight":
            raise ValueError(f"no rule for {name} {tuple(parameter.shape)}")
    embedding = model.get_input_embeddings().weight
    embedding.copy_(randn(embedding))
    if model.config.tie_word_embeddings:
        _part_channels(model, embedding, one)
    embedding[:, CONSTANT_CHANNEL] = 1
    if family.scaled_embedding:
        embedding *= HIDDEN**-0.5


def _part_channels(model: torch.nn.Module, embedding: torch.Tensor, one: float) -> None:
    """Let a tied embedding say little of its own token in the channels that logits are read from.

    Otherwise the likeliest next token is always the one that was read.
    """
    said = slice(HIDDEN // 2, None)
    embedding[:, said] *= 0.1
    embedding[: len(SPECIAL_TOKENS), said] = 0
    norm = model.get_decoder().norm.weight
    norm.fill_(one - 1)
    scale = 0.1 if model.config.model_type == "cohere2" else 0.1 * HIDDEN**-0.5
    norm[said] = LOGIT_STD / (scale * (HIDDEN // 2) ** 0.5) - 1 + one
