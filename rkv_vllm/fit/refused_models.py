"""Models that compression does not support, by what their layers keep and who sees whom."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rkv_vllm.fit.refusal import Refusal, named, refused_model
from rkv_vllm.options import CONFIG_KEY

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

# Values of --kv-cache-dtype: bytes that are floats, times a factor of a layer or of a head.
FP8_CACHES = ("fp8", "fp8_e4m3", "fp8_e5m2")

_FULL_ATTENTION_LAYERS = {"full_attention", "attention"}


def has_limited_layers(checkpoint: Mapping[str, Any], windowed: bool) -> bool:
    """Tells whether some layers see less than all tokens.

    Args:
        checkpoint: the fields of the text model in a `config.json`.
        windowed: what its other fields say, where it does not name the kind of each layer.
    """
    layer_types = checkpoint.get("layer_types")
    return not _FULL_ATTENTION_LAYERS.issuperset(layer_types) if layer_types else windowed


def other_layers(vllm_config: "VllmConfig") -> str | None:
    """The model, where not all layers are of full attention with a cache of their own."""
    model = vllm_config.model_config
    is_mixed = model.use_mla or model.is_hybrid or some_see_less(model)
    if not is_mixed and not model.hf_text_config.to_dict().get("num_kv_shared_layers"):
        return None
    return named(model)


def some_see_less(model: "ModelConfig") -> bool:
    """Whether some layers have a window or chunks."""
    windowed = model.get_sliding_window() is not None or model.attention_chunk_size is not None
    return has_limited_layers(model.hf_text_config.to_dict(), windowed)


def _has_no_full_layer(vllm_config: "VllmConfig") -> bool:
    """As far as a config tells; what remains is found when the cache is specified (runner.py)."""
    model = vllm_config.model_config
    # The config of the checkpoint, not of vLLM: each model family has other fields.
    checkpoint = model.hf_text_config.to_dict()
    if layer_types := checkpoint.get("layer_types"):
        has_bound = model.get_sliding_window() is not None or model.attention_chunk_size is not None
        return has_bound and _FULL_ATTENTION_LAYERS.isdisjoint(layer_types)
    # vLLM sets it where it knows of no other layers; MiMo names them in a field of its own.
    in_all = vllm_config.cache_config.sliding_window is not None
    return in_all and "hybrid_layer_pattern" not in checkpoint


def _bounded_layers_as_full(vllm_config: "VllmConfig") -> str | None:
    """What makes vLLM keep every token of layers with a window or chunks, in one block table."""
    model = vllm_config.model_config
    checkpoint = model.hf_text_config.to_dict()
    chunked = model.attention_chunk_size is not None
    windowed = model.get_sliding_window() is not None
    if not vllm_config.scheduler_config.disable_hybrid_kv_cache_manager or not (
        chunked or has_limited_layers(checkpoint, windowed)
    ):
        return None
    variable = "VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE=0"
    return f"--disable-hybrid-kv-cache-manager or {variable}"


def _sees_pieces(model: "ModelConfig") -> bool:
    checkpoint = model.hf_text_config.to_dict()
    is_dual = checkpoint.get("dual_chunk_attention_config") is not None
    return is_dual or model.rswa_window is not None


def _is_bidirectional(vllm_config: "VllmConfig") -> bool:
    model = vllm_config.model_config
    return (
        model.is_mm_prefix_lm
        or model.is_diffusion
        or vllm_config.diffusion_config is not None
        or vllm_config.attention_config.use_non_causal
    )


def _has_indexer(vllm_config: "VllmConfig") -> bool:
    return vllm_config.model_config.hf_text_config.to_dict().get("index_topk") is not None


def _latent_by_accident(vllm_config: "VllmConfig") -> str | None:
    model = vllm_config.model_config
    asked = vllm_config.additional_config[CONFIG_KEY].get("experimental_mla")
    if not model.use_mla or asked:
        return None
    return named(model)


def _beside_latents(vllm_config: "VllmConfig") -> str | None:
    from vllm.platforms import current_platform

    options = vllm_config.additional_config[CONFIG_KEY]
    found = {
        "a GPU": current_platform.device_type != "cpu",
        "--speculative-config": vllm_config.speculative_config is not None,
        "an fp8 --kv-cache-dtype": vllm_config.cache_config.cache_dtype in FP8_CACHES,
        "--kv-compress-prompt": options.get("compress_prompt"),
        "--kv-swap-space": options.get("swap_space"),
        "layers of other kinds": vllm_config.model_config.is_hybrid,
    }
    if not vllm_config.model_config.use_mla or not any(found.values()):
        return None
    return ", ".join(feature for feature, is_there in found.items() if is_there)


def _runner(vllm_config: "VllmConfig") -> str | None:
    runner = vllm_config.model_config.runner_type
    return None if runner == "generate" else f"runner {runner!r}"


MODELS: tuple[Refusal, ...] = (
    # Nothing is decoded, so nothing is ever compacted.
    Refusal(
        "models that do not generate text",
        _runner,
        "'generate'",
        "pass --runner generate or remove --kv-compression",
    ),
    # Its indexer has a cache of its own, which would have to keep the same tokens.
    refused_model(
        "sparse attention with an indexer (DSA: DeepSeek-V3.2, GLM-5)",
        _has_indexer,
        "a model whose layers attend to all tokens",
    ),
    # One latent serves all heads of a layer, so one choice does; nobody has measured what it costs.
    Refusal(
        "multi-head latent attention (MLA) unless it is asked for",
        _latent_by_accident,
        "--kv-experimental-mla with it",
        "pass that flag to try it (its effect on the answers of real models is unknown), or remove "
        "--kv-compression",
    ),
    # Not tried yet.
    Refusal(
        "multi-head latent attention (MLA) together with this",
        _beside_latents,
        "none of it",
        "leave it out, or remove --kv-compression",
    ),
    # A window or a chunk bounds a cache by itself; only other layers are compacted.
    refused_model(
        "models without a layer of full attention",
        _has_no_full_layer,
        "one layer or more that keeps every token",
    ),
    # Then vLLM has one block table for all layers, and compaction would shorten those with a
    # window as well, which find their tokens by logical position.
    Refusal(
        "sliding-window or chunked layers without vLLM's hybrid KV cache manager",
        _bounded_layers_as_full,
        "it enabled",
        "remove the flag and unset the variable",
    ),
    # Both take the place in the cache for the place in the text.
    refused_model(
        "dual chunk attention and reference windows (R-SWA)",
        lambda c: _sees_pieces(c.model_config),
    ),
    # A recurrent state is no list of tokens; beside layers of full attention it stays as it is.
    refused_model("models without attention", lambda c: c.model_config.is_attention_free),
    # ALiBi takes the place in the cache for the place in the text.
    refused_model("ALiBi position biases", lambda c: c.model_config.uses_alibi),
    # Cross-attention has a cache of its own.
    refused_model("encoder-decoder models", lambda c: c.model_config.is_encoder_decoder),
    # A token that is seen by earlier ones is not settled when it is computed.
    refused_model("bidirectional attention and diffusion", _is_bidirectional),
)
