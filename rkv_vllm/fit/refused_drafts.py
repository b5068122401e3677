"""Speculative decoding that compression does not support."""

from typing import TYPE_CHECKING

from rkv_vllm.cache_owners import NONE
from rkv_vllm.fit.refusal import Refusal, layer_budgets, named, pipeline_stages
from rkv_vllm.fit.refused_models import other_layers, some_see_less
from rkv_vllm.options import CONFIG_KEY

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Methods of speculative decoding whose drafts come without a cache of their own, and those of draft
# models, whose layers are compacted beside the target's.
DRAFTERS = ("ngram", "ngram_gpu", "suffix", "medusa", "custom_class")
DRAFT_MODELS = ("draft_model", "eagle", "eagle3", "mtp")


def _speculation(vllm_config: "VllmConfig") -> str | None:
    speculation = vllm_config.speculative_config
    if speculation is None or speculation.method in DRAFTERS:
        return None
    if speculation.method in DRAFT_MODELS:
        # Theirs reads the target's cache, or has several heads that look ahead.
        if speculation.use_gemma4_mtp() or speculation.use_step3p5_mtp():
            return f"method 'mtp' of {speculation.draft_model_config.model}"
        if not speculation.use_multi_module_mtp():
            return None
        return f"method 'mtp' with {speculation.num_speculative_tokens} tokens of as many modules"
    return f"method {speculation.method!r}"


def _has_draft_model(vllm_config: "VllmConfig") -> bool:
    speculation = vllm_config.speculative_config
    return speculation is not None and speculation.method in DRAFT_MODELS


def _draft_model_on_v1(vllm_config: "VllmConfig") -> str | None:
    if not _has_draft_model(vllm_config) or vllm_config.use_v2_model_runner:
        return None
    return f"method {vllm_config.speculative_config.method!r} on the V1 runner"


def _beside_a_draft_model(vllm_config: "VllmConfig") -> str | None:
    """What keeps a draft model's layers from standing in the group of the target's."""
    if not _has_draft_model(vllm_config):
        return None
    speculation = vllm_config.speculative_config
    options = vllm_config.additional_config[CONFIG_KEY]
    used = {
        "layers of other kinds in target or draft model": other_layers(vllm_config)
        or some_see_less(speculation.draft_model_config),
        "--kv-layer-budgets": layer_budgets(vllm_config),
        "--kv-share-layers": options.get("share_layers", NONE) != NONE,
        "--kv-swap-space": options.get("swap_space"),
        "a cache dtype of its own": speculation.kv_cache_dtype,
        "adaptive verification": speculation.enable_adaptive_verification,
        "a method that knows each layer (triattention)": options.get("method") == "triattention",
    }
    return ", ".join(name for name, is_used in used.items() if is_used) or None


def _state_beside_drafts(vllm_config: "VllmConfig") -> str | None:
    model = vllm_config.model_config
    in_use = vllm_config.speculative_config and (model.is_hybrid or model.use_mla)
    return named(model) if in_use else None


DRAFTS: tuple[Refusal, ...] = (
    # Drafters that read the target's cache, or draft in other shapes than the target's.
    Refusal(
        "this method of speculative decoding",
        _speculation,
        f"one of {', '.join((*DRAFTERS, *DRAFT_MODELS))}, mtp with one module",
        "choose one of these, or remove --speculative-config and --spec-...",
    ),
    # There drafters compute slots from logical positions.
    Refusal(
        "draft models on this runner",
        _draft_model_on_v1,
        "the V2 runner, or a method without a cache of its own",
        "unset VLLM_USE_V2_MODEL_RUNNER, choose ngram, or remove --speculative-config",
    ),
    Refusal(
        "a draft model beside",
        _beside_a_draft_model,
        "none of these",
        "remove them, draft without a model (ngram), or remove --speculative-config",
    ),
    # The first stages learn of rejections late.
    Refusal(
        "speculative decoding with pipeline parallelism",
        lambda c: pipeline_stages(c) if c.speculative_config else None,
        "1",
        "use tensor parallelism, or remove --speculative-config",
        early=True,
    ),
    # Nobody has looked at what rejected drafts leave there, beside a compacted cache.
    Refusal(
        "speculative decoding of models that keep a state or latent rows",
        _state_beside_drafts,
        "a model without one",
        "remove --speculative-config and --spec-...",
    ),
)
