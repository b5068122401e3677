"""What compression does not support: refused at start by name, with the cure.

One row of `REFUSALS` per feature; delete the row and its case in the tests when the feature is
supported. Everything here is asked only when compression is switched on, before a model is loaded.
"""

from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from rkv_vllm.cache_owners import NONE, owners_of_readers
from rkv_vllm.fit.code_table import warn_of_changed_code
from rkv_vllm.fit.overrides import check_overrides
from rkv_vllm.fit.state_blocks import check_budget, state_block_size
from rkv_vllm.fit.versions import SCHEDULER_CLS, check_vllm_version, platform_worker_cls
from rkv_vllm.layer_budgets import METHOD, budgets_of_layers
from rkv_vllm.limits import Limits
from rkv_vllm.log import init_logger
from rkv_vllm.options import CONFIG_KEY, ServerOptions, find_method, prefix_len
from rkv_vllm.policy import Terms, longest_cache

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

    from rkv_vllm.methods.base import ModelShape

# Those whose cache layouts are known (worker/cache_views.py).
ATTENTION_BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "CPU_MLA")

# Values of --kv-cache-dtype: bytes that are floats, times a factor of a layer or of a head.
FP8_CACHES = ("fp8", "fp8_e4m3", "fp8_e5m2")

# Methods of speculative decoding whose drafts come without a cache of their own, and those of draft
# models, whose layers are compacted beside the target's.
DRAFTERS = ("ngram", "ngram_gpu", "suffix", "medusa", "custom_class")
DRAFT_MODELS = ("draft_model", "eagle", "eagle3", "mtp")

_FULL_ATTENTION_LAYERS = {"full_attention", "attention"}


class Refusal(NamedTuple):
    """One unsupported feature.

    Attributes:
        feature: what users know it by.
        got: what an engine config has set, None where it does without the feature.
        wanted: what to set instead.
        cure: the way there.
        early: asked of the engine arguments already, which have the same fields: vLLM takes long
            to make a config, and may hide the feature or advise what would be refused next.
    """

    feature: str
    got: "Callable[[VllmConfig], str | None]"
    wanted: str
    cure: str
    early: bool = False

    def find(self, vllm_config: "VllmConfig") -> str | None:
        """Returns the sentence that users read, None where the feature is not in use."""
        got = self.got(vllm_config)
        if got is None:
            return None
        return (
            f"KV cache compression does not support {self.feature}: got {got}, "
            f"wanted {self.wanted}; {self.cure}"
        )


def check_engine_args(engine_args: "EngineArgs") -> None:
    """Raises ValueError for what must be refused before vLLM makes its config.

    Logs a warning where a release that we were not tested with has changed what we rest on.

    Args:
        engine_args: as the user gave them.
    """
    check_vllm_version()
    check_overrides(SCHEDULER_CLS)
    warn_of_changed_code()
    platform_worker_cls()
    asked = _as_config(engine_args)
    _raise_if_any(rule.find(asked) for rule in REFUSALS if rule.early)


def _as_config(engine_args: "EngineArgs") -> SimpleNamespace:
    """The arguments where an engine config has them, as far as the early rules look."""
    return SimpleNamespace(
        parallel_config=engine_args,
        scheduler_config=engine_args,
        kv_transfer_config=engine_args.kv_transfer_config,
        cache_config=engine_args,
        speculative_config=engine_args.speculative_config,
        additional_config=engine_args.additional_config,
    )


def check(vllm_config: "VllmConfig") -> None:
    """Raises ValueError naming every unsupported feature of a finished engine config.

    Cheap enough to be called again wherever a process cannot know that another one has. Logs a
    warning, once per process, when no request can grow long enough to be compacted, or for
    priorities beside prefix caching.

    Args:
        vllm_config: the engine config that vLLM has made, with our options in it.
    """
    check_vllm_version()
    check_overrides(SCHEDULER_CLS)
    _raise_if_any(rule.find(vllm_config) for rule in REFUSALS)
    options = ServerOptions.from_dict(vllm_config.additional_config[CONFIG_KEY])
    options.check_room(vllm_config.model_config.max_model_len)
    _check_swap_space(vllm_config.parallel_config, options)
    if options.compress_prompt:
        _check_prompts(vllm_config, options)
    _check_override(vllm_config, options)
    check_model(_model_shape(vllm_config.model_config), options)
    if (block_size := state_block_size(vllm_config)) is not None:
        check_budget(options, block_size, vllm_config.max_concurrent_batches)
    _warn_if_never_due(vllm_config, options)
    _warn_of_priorities(vllm_config)


def _check_swap_space(parallel: "ParallelConfig", options: ServerOptions) -> None:
    # Ranks on other machines bring memory of their own, which nobody here can see.
    if options.swap_space and parallel.nnodes == 1:
        memory = psutil.virtual_memory().total
        options.check_swap_space(memory, max(1, parallel.data_parallel_size_local))


def _check_prompts(vllm_config: "VllmConfig", options: ServerOptions) -> None:
    """Raises ValueError where prompts could never be compacted."""
    scheduler = vllm_config.scheduler_config
    limits = Limits.of(vllm_config)
    # Before a boundary a whole window is computed in one step, beside all that decode.
    room = limits.max_step_tokens - (scheduler.max_num_seqs - 1) * limits.max_advance
    threshold = scheduler.long_prefill_token_threshold
    if min(room, threshold or room) < options.window:
        raise ValueError(
            f"--kv-compress-prompt: got --max-num-batched-tokens "
            f"{scheduler.max_num_batched_tokens}, --max-num-seqs {scheduler.max_num_seqs} and "
            f"--long-prefill-token-threshold {threshold}, wanted room for the "
            f"--kv-window {options.window} tokens of a prompt beside all other requests; raise "
            "--max-num-batched-tokens, or leave the threshold out"
        )


def _check_override(vllm_config: "VllmConfig", options: ServerOptions) -> None:
    """Raises ValueError where the blocks that the user wants could never hold one request."""
    cache, limits = vllm_config.cache_config, Limits.of(vllm_config)
    is_known = cache.num_gpu_blocks_override is not None and cache.user_specified_block_size
    # By -1 vLLM makes of it what the pool can hold.
    if not is_known or vllm_config.model_config.original_max_model_len == -1:
        return
    max_model_len, block_size = limits.max_model_len, cache.block_size
    terms = Terms(
        options.budget,
        options.buffer,
        prefix_len(options.protect, max_model_len),
        options.prompt_chunk,
    )
    slack = options.slack(block_size, limits.max_advance)
    compressed = -(-longest_cache(terms, max_model_len, limits.in_flight, slack) // block_size)
    whole = -(-max_model_len // block_size)
    total = cache.num_gpu_blocks_override - 1
    of_options = (
        f"--kv-budget {options.budget}, --kv-prompt-chunk {options.prompt_chunk}, --kv-buffer "
        f"{options.buffer} and --kv-protect {options.protect} one request takes up to {compressed}"
    )
    if not options.compress_prompt and whole > total:
        raise ValueError(
            f"--num-gpu-blocks-override: got {total + 1}, wanted at least {whole + 1}: prompts and "
            f"preempted texts are cached whole, so one request of --max-model-len {max_model_len} "
            f"takes up to {whole} blocks, and one stays empty; raise it, lower --max-model-len to "
            f"{total * block_size}, or add --kv-compress-prompt: with {of_options}"
        )
    if options.compress_prompt and options.layer_budgets == METHOD and compressed > total:
        raise ValueError(
            f"--num-gpu-blocks-override: got {total + 1}, wanted at least {compressed + 1}: with "
            f"{of_options} blocks, and one stays empty; raise it or lower one of these"
        )


def check_model(shape: "ModelShape", options: ServerOptions) -> None:
    """Raises ValueError where the model is another one than a file or a ladder is for.

    Args:
        shape: of the whole model.
        options: of the engine.
    """
    find_method(options.method).check_model(options.method_options, shape)
    if options.layer_budgets != METHOD:
        budgets_of_layers(
            options.layer_budgets, shape.name, shape.num_layers, options.budget, options.window
        )
    owners_of_readers(options.share_layers, shape.name, shape.num_layers)


def _model_shape(model: "ModelConfig") -> "ModelShape":
    # Deferred, as in options.py: the package of the methods imports torch.
    from rkv_vllm.methods.base import ModelShape

    return ModelShape(
        name=model.model,
        num_layers=model.get_total_num_hidden_layers(),
        num_query_heads=model.model_arch_config.total_num_attention_heads,
        num_kv_heads=model.get_total_num_kv_heads(),
        head_size=model.get_head_size(),
    )


def _raise_if_any(sentences: Iterable[str | None]) -> None:
    if found := [sentence for sentence in sentences if sentence is not None]:
        raise ValueError("\n".join(found))


def _warn_if_never_due(vllm_config: "VllmConfig", options: ServerOptions) -> None:
    max_model_len = vllm_config.model_config.max_model_len
    if options.budget + options.buffer >= max_model_len:
        init_logger(__name__).warning_once(
            "--kv-budget %d plus --kv-buffer %d reach --max-model-len %d: no request will ever be "
            "compacted unless it sets a smaller budget itself; lower the budget",
            options.budget,
            options.buffer,
            max_model_len,
            scope="process",
        )


def _warn_of_priorities(vllm_config: "VllmConfig") -> None:
    """Warn of a fault of vLLM, which it has with and without us (README, limits)."""
    caches_prefixes = vllm_config.cache_config.enable_prefix_caching
    if vllm_config.scheduler_config.policy == "priority" and caches_prefixes:
        init_logger(__name__).warning_once(
            "--scheduling-policy priority with prefix caching: vLLM publishes a block for a step "
            "out of which it may then preempt the request, and whoever shares that prefix reads "
            "what was never computed, with and without KV cache compression; add "
            "--no-enable-prefix-caching",
            scope="process",
        )


def has_limited_layers(checkpoint: Mapping[str, Any], windowed: bool) -> bool:
    """Tells whether some layers see less than all tokens.

    Args:
        checkpoint: the fields of the text model in a `config.json`.
        windowed: what its other fields say, where it does not name the kind of each layer.
    """
    layer_types = checkpoint.get("layer_types")
    return not _FULL_ATTENTION_LAYERS.issuperset(layer_types) if layer_types else windowed


def _named(model: "ModelConfig") -> str:
    return f"{', '.join(model.architectures)} ({model.model})"


def _connector(vllm_config: "VllmConfig") -> str | None:
    transfer = vllm_config.kv_transfer_config
    if transfer is not None:
        # Engine arguments may have it as it was given.
        name = transfer["kv_connector"] if isinstance(transfer, dict) else transfer.kv_connector
        return f"connector {name!r}"
    size = vllm_config.cache_config.kv_offloading_size
    return f"--kv-offloading-size {size}" if size else None


def _pipeline_stages(vllm_config: "VllmConfig") -> str | None:
    number = vllm_config.parallel_config.pipeline_parallel_size
    return f"--pipeline-parallel-size {number}" if number > 1 else None


def _context_parallel(parallel: "ParallelConfig | EngineArgs") -> str | None:
    decode = parallel.decode_context_parallel_size
    prefill = parallel.prefill_context_parallel_size
    return None if decode == prefill == 1 else f"sizes {decode} (decode) and {prefill} (prefill)"


def _micro_batching(parallel: "ParallelConfig | EngineArgs") -> str | None:
    in_use = parallel.enable_dbo or parallel.ubatch_size > 1
    return "--enable-dbo or --ubatch-size above 1" if in_use else None


def _cache_dtype(vllm_config: "VllmConfig") -> str | None:
    got = vllm_config.cache_config.cache_dtype
    model_dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    known = ("auto", model_dtype, *FP8_CACHES)
    return None if got in known else f"{got} with a {model_dtype} model"


def _skipped_layers(vllm_config: "VllmConfig") -> str | None:
    cache = vllm_config.cache_config
    skipped = cache.kv_cache_dtype_skip_layers if cache.cache_dtype in FP8_CACHES else ()
    return f"--kv-cache-dtype-skip-layers {' '.join(skipped)}" if skipped else None


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


def _v1_runner_on_gpu(vllm_config: "VllmConfig") -> str | None:
    from vllm.platforms import current_platform

    on_cpu = current_platform.device_type == "cpu"
    return None if on_cpu or vllm_config.use_v2_model_runner else "V1"


def _attention_backend(vllm_config: "VllmConfig") -> str | None:
    backend = vllm_config.attention_config.backend
    return None if backend is None or backend.name in ATTENTION_BACKENDS else backend.name


def _layer_budgets(vllm_config: "VllmConfig") -> str | None:
    """The setting, where layers have budgets of their own."""
    options = vllm_config.additional_config[CONFIG_KEY]
    setting = options.get("layer_budgets", METHOD)
    return None if setting == METHOD else setting


def _if_sharing(
    got: "Callable[[VllmConfig], str | None]",
) -> "Callable[[VllmConfig], str | None]":
    """What is set, where layers read other layers' caches."""

    def found(vllm_config: "VllmConfig") -> str | None:
        setting = vllm_config.additional_config[CONFIG_KEY].get("share_layers", NONE)
        return None if setting == NONE else got(vllm_config)

    return found


def _other_layers(vllm_config: "VllmConfig") -> str | None:
    """The model, where not all layers are of full attention with a cache of their own."""
    model = vllm_config.model_config
    is_mixed = model.use_mla or model.is_hybrid or _has_limited_layers(model)
    if not is_mixed and not model.hf_text_config.to_dict().get("num_kv_shared_layers"):
        return None
    return _named(model)


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


def _has_limited_layers(model: "ModelConfig") -> bool:
    windowed = model.get_sliding_window() is not None or model.attention_chunk_size is not None
    return has_limited_layers(model.hf_text_config.to_dict(), windowed)


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
        "layers of other kinds in target or draft model": _other_layers(vllm_config)
        or _has_limited_layers(speculation.draft_model_config),
        "--kv-layer-budgets": _layer_budgets(vllm_config),
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
    return _named(model) if in_use else None


def _has_indexer(vllm_config: "VllmConfig") -> bool:
    return vllm_config.model_config.hf_text_config.to_dict().get("index_topk") is not None


def _latent_by_accident(vllm_config: "VllmConfig") -> str | None:
    model = vllm_config.model_config
    asked = vllm_config.additional_config[CONFIG_KEY].get("experimental_mla")
    if not model.use_mla or asked:
        return None
    return _named(model)


def _beside_routed_experts(vllm_config: "VllmConfig") -> str | None:
    if not vllm_config.aux_output_config.enable_return_routed_experts:
        return None
    options = vllm_config.additional_config[CONFIG_KEY]
    flags = {"swap_space": "--kv-swap-space", "compress_prompt": "--kv-compress-prompt"}
    return ", ".join(flag for name, flag in flags.items() if options.get(name)) or None


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


def _model(
    feature: str,
    is_used: "Callable[[VllmConfig], bool]",
    wanted: str = "a decoder whose attention keeps keys and values of every token",
) -> Refusal:
    """A row about what a checkpoint is, whatever the flags."""

    def got(vllm_config: "VllmConfig") -> str | None:
        model = vllm_config.model_config
        shown = _named(model)
        return shown if is_used(vllm_config) else None

    return Refusal(feature, got, wanted, "remove --kv-compression or serve another model")


REFUSALS: tuple[Refusal, ...] = (
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
        lambda c: _pipeline_stages(c) if c.speculative_config else None,
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
    # vLLM looks them up for computed tokens only, and caps its own prefix hits by what it has.
    Refusal(
        "returned routed experts together with this",
        _beside_routed_experts,
        "none of it",
        "leave it out, or remove --enable-return-routed-experts",
    ),
    # A connector takes the content of a block for the tokens it was hashed for.
    Refusal(
        "KV connectors and KV cache offloading",
        _connector,
        "none",
        "remove --kv-transfer-config and --kv-offloading-size",
        early=True,
    ),
    # HiSparse keeps the cache on the host.
    Refusal(
        "HiSparse KV offloading",
        lambda c: c.attention_config.hisparse_config and "attention_config.hisparse_config",
        "none",
        "remove hisparse_config from --attention-config",
    ),
    # The tokens of one request lie interleaved on several ranks.
    Refusal(
        "context parallelism",
        lambda c: _context_parallel(c.parallel_config),
        "1 and 1",
        "remove --decode-context-parallel-size and --prefill-context-parallel-size",
        early=True,
    ),
    # Slices of a batch bring attention metadata of their own. (The CPU platform drops --enable-dbo
    # without a word.)
    Refusal(
        "micro-batching",
        lambda c: _micro_batching(c.parallel_config),
        "neither",
        "remove both flags",
        early=True,
    ),
    # Their cells hold several numbers in a byte, or factors of their own.
    Refusal(
        "this KV cache dtype",
        _cache_dtype,
        f"auto, {', '.join(FP8_CACHES)}",
        "pass one of these as --kv-cache-dtype (a checkpoint may ask for another one by itself: "
        "then pass the model's dtype)",
    ),
    # Blocks of several sizes are padded to the largest.
    Refusal(
        "layers whose KV cache has a dtype of its own",
        _skipped_layers,
        "one dtype for all layers",
        "remove --kv-cache-dtype-skip-layers",
    ),
    # It hands some layers metadata with fewer tokens.
    Refusal(
        "fast prefill with shared KV layers",
        lambda c: "--kv-sharing-fast-prefill" if c.cache_config.kv_sharing_fast_prefill else None,
        "off",
        "remove the flag",
    ),
    # A stage would hold some classes of layers only, and every block of the others be empty there.
    Refusal(
        "layer budgets (--kv-layer-budgets) with pipeline parallelism",
        lambda c: _pipeline_stages(c) if _layer_budgets(c) else None,
        "1",
        "use tensor parallelism, or leave --kv-layer-budgets out",
        early=True,
    ),
    # A ladder and a file number all layers of a model, and classes want equally many.
    Refusal(
        "layer budgets (--kv-layer-budgets) with layers of other kinds",
        lambda c: _other_layers(c) if _layer_budgets(c) else None,
        "a model with full attention and a cache of its own in every layer",
        "leave --kv-layer-budgets out",
    ),
    # Without it vLLM has one block table for all layers.
    Refusal(
        "layer budgets (--kv-layer-budgets) without vLLM's hybrid KV cache manager",
        lambda c: (
            "--disable-hybrid-kv-cache-manager"
            if _layer_budgets(c) and c.scheduler_config.disable_hybrid_kv_cache_manager
            else None
        ),
        "it enabled",
        "remove the flag, or leave --kv-layer-budgets out",
        early=True,
    ),
    # Classes of layers are to be equally large, and a reader is in none.
    Refusal(
        "shared caches (--kv-share-layers) with layer budgets",
        _if_sharing(lambda c: f"--kv-layer-budgets {s}" if (s := _layer_budgets(c)) else None),
        "one of the two",
        "leave --kv-layer-budgets out, or --kv-share-layers",
        early=True,
    ),
    # A reader may be on another stage than its owner.
    Refusal(
        "shared caches (--kv-share-layers) with pipeline parallelism",
        _if_sharing(_pipeline_stages),
        "1",
        "use tensor parallelism, or leave --kv-share-layers out",
        early=True,
    ),
    # A window's cache forgets what a full layer reads; some models share caches by themselves.
    Refusal(
        "shared caches (--kv-share-layers) in models with other layers than full attention",
        _if_sharing(_other_layers),
        "a model whose layers all see all tokens and have caches of their own",
        "leave --kv-share-layers out",
    ),
    # Nothing is decoded, so nothing is ever compacted.
    Refusal(
        "models that do not generate text",
        _runner,
        "'generate'",
        "pass --runner generate or remove --kv-compression",
    ),
    # Its indexer has a cache of its own, which would have to keep the same tokens.
    _model(
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
    _model(
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
    _model(
        "dual chunk attention and reference windows (R-SWA)",
        lambda c: _sees_pieces(c.model_config),
    ),
    # A recurrent state is no list of tokens; beside layers of full attention it stays as it is.
    _model("models without attention", lambda c: c.model_config.is_attention_free),
    # ALiBi takes the place in the cache for the place in the text.
    _model("ALiBi position biases", lambda c: c.model_config.uses_alibi),
    # Cross-attention has a cache of its own.
    _model("encoder-decoder models", lambda c: c.model_config.is_encoder_decoder),
    # A token that is seen by earlier ones is not settled when it is computed.
    _model("bidirectional attention and diffusion", _is_bidirectional),
    # On GPUs only the V2 runner, vLLM's default there, has an adapter.
    Refusal(
        "the V1 model runner on a GPU",
        _v1_runner_on_gpu,
        "V2",
        "unset VLLM_USE_V2_MODEL_RUNNER; if vLLM then logs a feature that V2 does not support yet, "
        "remove that feature",
    ),
    # One that vLLM picks by itself is checked when the cache is allocated.
    Refusal(
        "this attention backend",
        _attention_backend,
        f"one of {', '.join(ATTENTION_BACKENDS)}",
        "choose one of these with --attention-backend, or leave the flag out",
    ),
)
