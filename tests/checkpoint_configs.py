"""Folders with nothing but a `config.json`: enough for vLLM to make an engine config, not to load.

One small decoder that compression supports, and its variants that it refuses.
"""

import json
from pathlib import Path

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# All variants keep the architecture: vLLM inspects each one in a process of its own, 30 s the first
# time. What is refused follows from the other fields.
SLIDING_WINDOW = {**LLAMA, "model_type": "mistral", "sliding_window": 128}
MIXED_WINDOWS = {
    **LLAMA,
    "model_type": "qwen3",
    "use_sliding_window": True,
    "sliding_window": 128,
    "layer_types": ["full_attention", "sliding_attention"],
}
ALL_WINDOWS = {**MIXED_WINDOWS, "layer_types": ["sliding_attention"] * 2}
UNUSED_WINDOW = {**LLAMA, "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 128}
CHUNKED = {**LLAMA, "attention_chunk_size": 128}
DUAL_CHUNK = {
    **UNUSED_WINDOW,
    "dual_chunk_attention_config": {"chunk_size": 512, "local_size": 128},
}
ALIBI = {**LLAMA, "alibi": True}
LATENT = {
    **LLAMA,
    "model_type": "deepseek_v2",
    "num_key_value_heads": 2,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
CROSS_ATTENTION = {**LLAMA, "is_encoder_decoder": True}


def write_config(directory: Path, fields: dict) -> str:
    """Writes the checkpoint's `config.json` and returns the folder as vLLM's `model` argument."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields))
    return str(directory)
