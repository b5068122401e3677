"""What compression does not support: refused at start by name, with the cure.

One row of `REFUSALS` per feature, those of models and of drafts in files of their own; delete the
row and its case in the tests when the feature is supported. Everything here is asked only when
compression is switched on, before a model is loaded.
"""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING

import psutil

from rkv_vllm.cache_owners import NONE, owners_of_readers
from rkv_vllm.fit.code_table import warn_of_changed_code
from rkv_vllm.fit.overrides import check_overrides
from rkv_vllm.fit.refusal import Refusal, layer_budgets, pipeline_stages
from rkv_vllm.fit.refused_drafts import DRAFTS
from rkv_vllm.fit.refused_models import FP8_CACHES, MODELS, other_layers
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


def _connector(vllm_config: "VllmConfig") -> str | None:
    transfer = vllm_config.kv_transfer_config
    if transfer is not None:
        # Engine arguments may have it as it was given.
        name = transfer["kv_connector"] if isinstance(transfer, dict) else transfer.kv_connector
        return f"connector {name!r}"
    size = vllm_config.cache_config.kv_offloading_size
    return f"--kv-offloading-size {size}" if size else None


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


def _v1_runner_on_gpu(vllm_config: "VllmConfig") -> str | None:
    from vllm.platforms import current_platform

    on_cpu = current_platform.device_type == "cpu"
    return None if on_cpu or vllm_config.use_v2_model_runner else "V1"


def _attention_backend(vllm_config: "VllmConfig") -> str | None:
    backend = vllm_config.attention_config.backend
    return None if backend is None or backend.name in ATTENTION_BACKENDS else backend.name


def _if_sharing(
    got: "Callable[[VllmConfig], str | None]",
) -> "Callable[[VllmConfig], str | None]":
    """What is set, where layers read other layers' caches."""

    def found(vllm_config: "VllmConfig") -> str | None:
        setting = vllm_config.additional_config[CONFIG_KEY].get("share_layers", NONE)
        return None if setting == NONE else got(vllm_config)

    return found


def _beside_routed_experts(vllm_config: "VllmConfig") -> str | None:
    if not vllm_config.aux_output_config.enable_return_routed_experts:
        return None
    options = vllm_config.additional_config[CONFIG_KEY]
    flags = {"swap_space": "--kv-swap-space", "compress_prompt": "--kv-compress-prompt"}
    return ", ".join(flag for name, flag in flags.items() if options.get(name)) or None


REFUSALS: tuple[Refusal, ...] = (
    *DRAFTS,
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
        lambda c: pipeline_stages(c) if layer_budgets(c) else None,
        "1",
        "use tensor parallelism, or leave --kv-layer-budgets out",
        early=True,
    ),
    # A ladder and a file number all layers of a model, and classes want equally many.
    Refusal(
        "layer budgets (--kv-layer-budgets) with layers of other kinds",
        lambda c: other_layers(c) if layer_budgets(c) else None,
        "a model with full attention and a cache of its own in every layer",
        "leave --kv-layer-budgets out",
    ),
    # Without it vLLM has one block table for all layers.
    Refusal(
        "layer budgets (--kv-layer-budgets) without vLLM's hybrid KV cache manager",
        lambda c: (
            "--disable-hybrid-kv-cache-manager"
            if layer_budgets(c) and c.scheduler_config.disable_hybrid_kv_cache_manager
            else None
        ),
        "it enabled",
        "remove the flag, or leave --kv-layer-budgets out",
        early=True,
    ),
    # Classes of layers are to be equally large, and a reader is in none.
    Refusal(
        "shared caches (--kv-share-layers) with layer budgets",
        _if_sharing(lambda c: f"--kv-layer-budgets {s}" if (s := layer_budgets(c)) else None),
        "one of the two",
        "leave --kv-layer-budgets out, or --kv-share-layers",
        early=True,
    ),
    # A reader may be on another stage than its owner.
    Refusal(
        "shared caches (--kv-share-layers) with pipeline parallelism",
        _if_sharing(pipeline_stages),
        "1",
        "use tensor parallelism, or leave --kv-share-layers out",
        early=True,
    ),
    # A window's cache forgets what a full layer reads; some models share caches by themselves.
    Refusal(
        "shared caches (--kv-share-layers) in models with other layers than full attention",
        _if_sharing(other_layers),
        "a model whose layers all see all tokens and have caches of their own",
        "leave --kv-share-layers out",
    ),
    *MODELS,
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
