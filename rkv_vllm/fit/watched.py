"""vLLM's functions that we rely on without overriding or calling them: a change is worth a look.

Their code is compared as that of the overridden and called ones is (`code_table.py`); they may be
missing in a release. After changing this list run `scripts/vllm_signatures.py`.
"""

_SCHED = "vllm.v1.core.sched"
_CORE = "vllm.v1.core"
_RUNNER_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_RUNNER_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
_BACKENDS = "vllm.v1.attention.backends"

# What we take for granted -> the functions and classes that it stands in.
WATCHED = {
    "order of a step: who is scheduled, preempted, finished, and when its blocks are free": (
        f"{_SCHED}.scheduler:Scheduler.schedule",
        f"{_SCHED}.scheduler:Scheduler.update_from_output",
        f"{_SCHED}.scheduler:Scheduler._preempt_request",
        f"{_SCHED}.scheduler:Scheduler.finish_requests",
        f"{_SCHED}.scheduler:Scheduler._free_request",
        f"{_SCHED}.scheduler:Scheduler._free_blocks",
        f"{_SCHED}.scheduler:Scheduler._update_request_with_output",
        f"{_SCHED}.async_scheduler:AsyncScheduler._update_request_with_output",
    ),
    "what the workers are told of requests and blocks": (
        f"{_SCHED}.scheduler:Scheduler._make_cached_request_data",
        f"{_SCHED}.output:NewRequestData",
        f"{_SCHED}.output:CachedRequestData",
        f"{_SCHED}.output:SchedulerOutput",
        "vllm.v1.request:Request.append_output_token_ids",
    ),
    "which blocks a request gets, shares, publishes and gives back": (
        f"{_CORE}.kv_cache_manager:KVCacheManager.allocate_slots",
        f"{_CORE}.kv_cache_manager:KVCacheManager.get_computed_blocks",
        f"{_CORE}.kv_cache_coordinator:KVCacheCoordinator.get_num_blocks_to_allocate",
        f"{_CORE}.kv_cache_coordinator:KVCacheCoordinator.cache_blocks",
        f"{_CORE}.kv_cache_coordinator:HybridKVCacheCoordinator.find_longest_cache_hit",
        f"{_CORE}.single_type_kv_cache_manager:SingleTypeKVCacheManager.cache_blocks",
        f"{_CORE}.single_type_kv_cache_manager:SingleTypeKVCacheManager.remove_skipped_blocks",
        f"{_CORE}.single_type_kv_cache_manager:FullAttentionManager.find_longest_cache_hit",
        f"{_CORE}.block_pool:BlockPool.cache_full_blocks",
        f"{_CORE}.block_pool:BlockPool.touch",
        f"{_CORE}.block_pool:BlockPool._maybe_evict_cached_block",
        f"{_CORE}.block_pool:BlockPool.reset_prefix_cache",
    ),
    "hashes of blocks": (
        f"{_CORE}.kv_cache_utils:hash_block_tokens",
        f"{_CORE}.kv_cache_utils:get_request_block_hasher",
    ),
    "groups of layers, and the size of the pool": (
        f"{_CORE}.kv_cache_utils:get_kv_cache_groups",
        f"{_CORE}.kv_cache_utils:get_kv_cache_config_from_groups",
        f"{_CORE}.kv_cache_utils:check_enough_kv_cache_memory",
        # Where vLLM 0.33 has them.
        f"{_CORE}.kv_cache_planning:get_kv_cache_groups",
        f"{_CORE}.kv_cache_planning:get_kv_cache_config_from_groups",
        f"{_CORE}.kv_cache_planning:check_enough_kv_cache_memory",
        "vllm.v1.kv_cache_interface:UniformTypeKVCacheSpecs",
    ),
    "rows of the worker's batch": (
        f"{_RUNNER_V1}._update_states",
        f"{_RUNNER_V1}._prepare_inputs",
        f"{_RUNNER_V1}._build_attention_metadata",
        f"{_RUNNER_V1}.execute_model",
        "vllm.v1.worker.gpu_input_batch:InputBatch.condense",
        f"{_RUNNER_V2}.update_requests",
        f"{_RUNNER_V2}.finish_requests",
        f"{_RUNNER_V2}.prepare_inputs",
        "vllm.v1.worker.gpu.block_table:BlockTables.append_block_ids",
        "vllm.v1.worker.gpu.block_table:BlockTables.gather_block_tables",
        "vllm.v1.worker.gpu.attn_utils:build_attn_metadata",
    ),
    "what attention takes its lengths from": (
        f"{_BACKENDS}.cpu_attn:CPUAttentionMetadataBuilder.build",
        f"{_BACKENDS}.flash_attn:FlashAttentionMetadataBuilder.build",
        f"{_BACKENDS}.flashinfer:FlashInferMetadataBuilder.build",
        f"{_BACKENDS}.triton_attn:TritonAttentionMetadataBuilder.build",
        "vllm.model_executor.layers.attention:Attention.forward",
    ),
    "the way of a request's own options, and when an engine steps": (
        "vllm.v1.engine.input_processor:InputProcessor._validate_params",
        "vllm.v1.engine.core:EngineCore.step",
        "vllm.v1.engine.core:EngineCore.step_with_batch_queue",
        "vllm.v1.engine.core:EngineCore._initialize_kv_caches",
    ),
}

WATCHED_SYMBOLS = tuple(symbol for symbols in WATCHED.values() for symbol in symbols)
