"""What this package touches in vLLM: by the process that needs it, then by our file.

Touched is what our code overrides, replaces, exchanges the class of, calls with arguments, or reads
and writes on vLLM's objects. A test fails when a file imports or overrides something that is not
listed. After a change here run `scripts/vllm_signatures.py` for every supported version.
"""

from enum import Enum


class Part(Enum):
    """Our code in one kind of process."""

    ENGINE = "makes the engine config and schedules"
    V1_RUNNER = "CPU worker with the V1 runner"
    V2_RUNNER = "worker with the V2 runner"
    # These are compared by the tests only: their modules are not imported yet when a process
    # starts, or never.
    OFFLINE = "asks an offline engine for its counters"
    BACKENDS = "attention backends"
    FRONTEND = "takes requests in and answers /metrics"


def _members(owner: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{owner}.{name}" for name in names)


_ENGINE_ARGS = "vllm.engine.arg_utils:EngineArgs"
_ATTENTION = "vllm.model_executor.layers.attention:Attention"
_SPEC = "vllm.v1.kv_cache_interface"
_OUTPUT = "vllm.v1.core.sched.output"
_LLM_ENGINE = "vllm.v1.engine.llm_engine:LLMEngine"
_BLOCK_POOL = "vllm.v1.core.block_pool:BlockPool"
_MANAGER = "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager"
_V1_RUNNER = "vllm.v1.worker.cpu_model_runner:CPUModelRunner"
_V2_RUNNER = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"

_OFFLINE = {
    "__init__.py": (
        *_members("vllm.entrypoints.llm:LLM", "collective_rpc", "llm_engine"),
        f"{_LLM_ENGINE}.vllm_config",
    ),
    "cli/diagnosis.py": (
        "vllm.envs:VLLM_USE_V2_MODEL_RUNNER",
        "vllm.config:VllmConfig",
        "vllm.engine.arg_utils:AsyncEngineArgs",
        "vllm.platforms:current_platform",
        "vllm.triton_utils:HAS_TRITON",
        "vllm.utils.argparse_utils:FlexibleArgumentParser",
    ),
    "trace/capture.py": (
        "vllm:LLM",
        "vllm:SamplingParams",
        *_members(_LLM_ENGINE, "add_request", "engine_core", "has_unfinished_requests", "step"),
        "vllm.distributed.parallel_state:cleanup_dist_env_and_memory",
        "vllm.outputs:CompletionOutput",
    ),
    "cli/traced_run.py": ("vllm:SamplingParams", "vllm.tokenizers:get_tokenizer"),
    "bench/offline_side.py": (
        "vllm:LLM",
        "vllm:SamplingParams",
        f"{_ENGINE_ARGS}.from_cli_args",
        "vllm.plugins:load_general_plugins",
        "vllm.utils.argparse_utils:FlexibleArgumentParser",
    ),
}

_ENGINE = {
    "log.py": ("vllm.logger:init_logger",),
    "flags.py": ("vllm.utils.argparse_utils:FlexibleArgumentParser.add_argument_group",),
    "patches/add_cli_args.py": (
        f"{_ENGINE_ARGS}.add_cli_args",
        "vllm.utils.argparse_utils:FlexibleArgumentParser",
    ),
    "patches/create_engine_config.py": _members(
        _ENGINE_ARGS,
        "create_engine_config",
        "additional_config",
        "disable_log_stats",
        "scheduler_cls",
        "worker_cls",
    ),
    "support.py": (
        "vllm.platforms:current_platform",
        *_members("vllm.platforms.interface:Platform", "device_name", "device_type"),
        *_members(
            _ENGINE_ARGS,
            "enable_dbo",
            "ubatch_size",
            "decode_context_parallel_size",
            "prefill_context_parallel_size",
        ),
        *_members(
            "vllm.config:VllmConfig",
            "additional_config",
            "attention_config",
            "cache_config",
            "diffusion_config",
            "kv_transfer_config",
            "model_config",
            "parallel_config",
            "scheduler_config",
            "speculative_config",
            "use_v2_model_runner",
        ),
        *_members("vllm.config:AttentionConfig", "backend", "hisparse_config", "use_non_causal"),
        *_members("vllm.config:CacheConfig", "cache_dtype", "kv_sharing_fast_prefill"),
        "vllm.config:KVTransferConfig.kv_connector",
        "vllm.config:SpeculativeConfig.method",
        *_members(
            "vllm.config:ParallelConfig",
            "decode_context_parallel_size",
            "pipeline_parallel_size",
            "prefill_context_parallel_size",
            "use_ubatching",
        ),
        *_members(
            "vllm.config:ModelConfig",
            "architectures",
            "attention_chunk_size",
            "dtype",
            "get_sliding_window",
            "hf_text_config",
            "is_attention_free",
            "is_diffusion",
            "is_encoder_decoder",
            "is_hybrid",
            "is_mm_prefix_lm",
            "max_model_len",
            "model",
            "runner_type",
            "rswa_window",
            "use_mla",
            "uses_alibi",
        ),
    ),
    "scheduling/step_stats.py": (
        "vllm.v1.metrics.stats:SchedulerStats",
        "vllm.v1.metrics.stats:SchedulerStats.num_kv_fetch_reqs_by_stage",
    ),
    "scheduling/spec.py": (
        f"{_SPEC}:FullAttentionSpec",
        "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry._ensure_registered",
        "vllm.v1.kv_cache_spec_registry:register_kv_cache_spec",
    ),
    "scheduling/books.py": (
        *_members(
            _MANAGER,
            "__init__",
            "_null_block",
            "allocate_new_blocks",
            "block_pool",
            "block_size",
            "cache_blocks",
            "get_num_blocks_to_allocate",
            "pop_blocks_for_free",
            "req_to_blocks",
        ),
        *_members(
            _BLOCK_POOL,
            "evict_blocks",
            "free_blocks",
            "get_new_blocks",
            "get_num_free_blocks",
            "is_block_writable",
        ),
        *_members("vllm.v1.core.kv_cache_utils:KVCacheBlock", "block_id", "ref_cnt"),
        "vllm.v1.request:Request.request_id",
        "vllm.utils.math_utils:cdiv",
    ),
    "scheduling/scheduler.py": (
        *_members(
            "vllm.v1.core.sched.scheduler:Scheduler",
            "__init__",
            "_free_request_blocks",
            "_update_after_schedule",
            "add_request",
            "block_size",
            "kv_cache_manager",
            "log_stats",
            "make_stats",
            "max_model_len",
            "requests",
            "running",
            "vllm_config",
        ),
        *_members(
            "vllm.v1.core.sched.async_scheduler:AsyncScheduler",
            "__init__",
            "_free_request_blocks",
            "_update_after_schedule",
            "add_request",
            "make_stats",
        ),
        "vllm.v1.metrics.stats:SchedulerStats",
        "vllm.v1.core.sched.interface:SchedulerInterface",
        "vllm.config:SchedulerConfig.get_scheduler_cls",
        "vllm.config:SchedulerConfig.async_scheduling",
        "vllm.config:VllmConfig.max_concurrent_batches",
        *_members("vllm.v1.core.kv_cache_manager:KVCacheManager", "block_pool", "coordinator"),
        "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.single_type_managers",
        f"{_BLOCK_POOL}.num_gpu_blocks",
        f"{_OUTPUT}:SchedulerOutput",
        *_members(
            "vllm.v1.request:Request",
            "is_finished",
            "is_prefill_chunk",
            "max_tokens",
            "num_computed_tokens",
            "num_in_flight_tokens",
            "num_prompt_tokens",
            "num_tokens",
            "request_id",
            "resumable",
            "sampling_params",
        ),
        "vllm.sampling_params:SamplingParams.extra_args",
        "vllm.utils.math_utils:cdiv",
    ),
}

# What every worker needs, whichever runner it has.
_WORKER = {
    "worker/attention_hook.py": (
        f"{_ATTENTION}.impl",
        "vllm.v1.attention.backend:AttentionImpl.forward",
    ),
    "worker/cache_views.py": _members(_ATTENTION, "attn_backend", "head_size", "impl", "kv_cache"),
}


def _runner(owner: str) -> tuple[str, ...]:
    """What worker/runner.py needs of a model runner and of what comes with it."""
    return (
        *_members(
            owner,
            "__init__",
            "cache_config",
            "compilation_config",
            "device",
            "dtype",
            "execute_model",
            "get_kv_cache_spec",
            "initialize_kv_cache",
            "load_model",
            "max_num_tokens",
            "vllm_config",
        ),
        *_members(
            f"{_OUTPUT}:SchedulerOutput",
            "finished_req_ids",
            "scheduled_cached_reqs",
            "scheduled_new_reqs",
        ),
        f"{_OUTPUT}:CachedRequestData.resumed_req_ids",
        f"{_OUTPUT}:NewRequestData.req_id",
        f"{_SPEC}:replace_as",
        f"{_SPEC}:FullAttentionSpec",
        f"{_SPEC}:KVCacheConfig",
        f"{_SPEC}:KVCacheSpec",
        *_members(_ATTENTION, "head_size", "kv_sharing_target_layer_name", "num_heads"),
        "vllm.config:CacheConfig.block_size",
        "vllm.config:CompilationConfig.static_forward_context",
        "vllm.config:VllmConfig.max_concurrent_batches",
        "vllm.config:VllmConfig.use_v2_model_runner",
        "vllm.envs:VLLM_LOG_STATS_INTERVAL",
    )


_V1 = {
    **_WORKER,
    "worker/block_table_v1.py": (
        "vllm.v1.worker.block_table:MultiGroupBlockTable.compute_slot_mapping",
    ),
    "worker/cpu_worker.py": _members(
        "vllm.v1.worker.cpu_worker:CPUWorker",
        "device",
        "init_device",
        "model_runner",
        "use_v2_model_runner",
        "vllm_config",
    ),
    "worker/runner.py": _runner(_V1_RUNNER),
    "worker/runner_v1.py": (
        f"{_OUTPUT}:SchedulerOutput",
        *_members(
            _V1_RUNNER,
            "_prepare_inputs",
            "input_batch",
            "intermediate_tensors",
            "model",
            "optimistic_seq_lens_cpu",
            "query_start_loc",
            "requests",
            "seq_lens",
        ),
        "vllm.distributed.parallel_state:get_pp_group",
        "vllm.distributed.parallel_state:GroupCoordinator.is_first_rank",
        *_members(
            "vllm.v1.worker.gpu_input_batch:InputBatch",
            "block_table",
            "num_computed_tokens_cpu",
            "num_reqs",
            "req_id_to_index",
            "req_ids",
        ),
        "vllm.v1.worker.block_table:MultiGroupBlockTable.add_row",
        *_members(
            "vllm.v1.worker.gpu_input_batch:CachedRequestState",
            "block_ids",
            "num_prompt_tokens",
            "output_token_ids",
        ),
    ),
}

_V2 = {
    **_WORKER,
    "worker/block_table_v2.py": (
        *_members(
            "vllm.v1.worker.gpu.block_table:BlockTables",
            "__init__",
            "append_block_ids",
            "apply_staged_writes",
            "block_sizes",
            "block_tables",
            "compute_slot_mappings",
            "device",
            "num_blocks",
            "slot_mappings",
        ),
        "vllm.v1.worker.gpu.buffer_utils:StagedWriteTensor.gpu",
        "vllm.v1.worker.gpu.buffer_utils:UvaBackedTensor.np",
        *_members(
            "vllm.v1.worker.gpu.input_batch:InputBatch",
            "idx_mapping_np",
            "num_reqs",
            "seq_lens",
            "seq_lens_cpu_upper_bound",
        ),
        "vllm.utils.torch_utils:async_tensor_h2d",
    ),
    "worker/gpu_worker.py": (
        *_members(
            "vllm.v1.worker.gpu_worker:Worker",
            "_make_model_runner",
            "compile_or_warm_up_model",
            "device",
            "model_runner",
            "vllm_config",
        ),
        _V2_RUNNER,
    ),
    "worker/runner.py": _runner(_V2_RUNNER),
    "worker/runner_v2.py": (
        *_members(
            _V2_RUNNER,
            "add_requests",
            "block_tables",
            "finish_requests",
            "max_num_reqs",
            "model_state",
            "prepare_attn",
            "req_states",
        ),
        "vllm.v1.worker.gpu.model_states.interface:ModelState.prepare_attn",
        "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_attn",
        "vllm.v1.worker.gpu.input_batch:InputBatch",
        *_members("vllm.v1.worker.gpu.states:RequestState", "prompt_len", "req_id_to_index"),
        f"{_OUTPUT}:NewRequestData.prompt_len",
    ),
}

# Known by reading what each backend does with its cache and its queries.
_BACKENDS = {
    "worker/attention_hook.py": tuple(
        f"vllm.v1.attention.backends.{impl}.{method}"
        for impl in (
            "cpu_attn:CPUAttentionBackendImpl",
            "flash_attn:FlashAttentionImpl",
            "flashinfer:FlashInferImpl",
            "triton_attn:TritonAttentionImpl",
        )
        for method in ("do_kv_cache_update", "forward")
    ),
}

_FRONTEND = {
    "patches/generate.py": _members("vllm.v1.engine.async_llm:AsyncLLM", "generate", "vllm_config"),
    "patches/process_inputs.py": (
        *_members("vllm.v1.engine.input_processor:InputProcessor", "process_inputs", "vllm_config"),
        "vllm:SamplingParams",
        "vllm.config:VllmConfig.additional_config",
        "vllm.exceptions:VLLMValidationError.__init__",
        "vllm.sampling_params:SamplingParams.extra_args",
    ),
    "frontend/discovery.py": (
        "vllm.plugins:STAT_LOGGER_PLUGINS_GROUP",
        "vllm.v1.metrics.loggers:load_stat_logger_plugin_factories",
    ),
    "frontend/stat_logger.py": (
        *_members(
            "vllm.v1.metrics.loggers:AggregateStatLoggerBase",
            "__init__",
            "log_engine_initialized",
            "record",
        ),
        "vllm.v1.metrics.loggers:StatLoggerManager.log_engine_initialized",
        "vllm.v1.metrics.buckets:histogram_buckets",
        "vllm.v1.metrics.stats:IterationStats",
        "vllm.v1.metrics.stats:MultiModalCacheStats",
        "vllm.v1.metrics.stats:SchedulerStats",
        *_members(
            "vllm.config:VllmConfig", "additional_config", "model_config", "observability_config"
        ),
        *_members("vllm.config:ModelConfig", "max_model_len", "served_model_name"),
        "vllm.config:ObservabilityConfig.custom_histogram_buckets",
    ),
}

TOUCHED: dict[Part, dict[str, tuple[str, ...]]] = {
    Part.ENGINE: _ENGINE,
    Part.V1_RUNNER: _V1,
    Part.V2_RUNNER: _V2,
    Part.OFFLINE: _OFFLINE,
    Part.BACKENDS: _BACKENDS,
    Part.FRONTEND: _FRONTEND,
}
