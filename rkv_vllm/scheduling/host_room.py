"""How many blocks a swap space holds, asked by the scheduler and by every rank.

The scheduler hands the blocks out, a rank allocates its share of them, so all must agree. Knows
sizes from vLLM's configuration, no requests and no tensors. Next: swap.py.
"""

from typing import NamedTuple

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig, UniformTypeKVCacheSpecs, iter_layer_specs

from rkv_vllm.options import ServerOptions

GIB = 2**30


class HostRoom(NamedTuple):
    """The swap space of one engine.

    Attributes:
        num_blocks: host blocks; one takes a block of any KV-cache group, on every rank.
        blocks_per_window: host blocks that the recorded queries of one request take in one group;
            0 when the method asks for none.
        block_bytes: bytes of a host block over all ranks.
    """

    num_blocks: int
    blocks_per_window: int
    block_bytes: int


def ring_len(vllm_config: VllmConfig, window: int) -> int:
    """Positions of a seat: a window is not overwritten by tokens that may be rolled back."""
    drafts = vllm_config.num_speculative_tokens
    return window + vllm_config.max_concurrent_batches * (1 + drafts) + drafts


def host_room(
    options: ServerOptions,
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    records_queries: bool,
) -> HostRoom:
    """Divide a swap space into blocks.

    Args:
        options: of the engine.
        vllm_config: of the engine.
        kv_cache_config: of any rank, or the scheduler's.
        records_queries: whether the method asks for queries.

    Returns:
        The room; the same wherever it is asked for.

    Raises:
        ValueError: layers of several geometries over several pipeline stages, of which no rank
            knows the others' sizes.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    layer_bytes = next(iter(iter_layer_specs(spec))).page_size_bytes
    if parallel.pipeline_parallel_size > 1:
        if isinstance(spec, UniformTypeKVCacheSpecs):
            raise ValueError(
                f"--kv-swap-space: got {options.swap_space} GiB with --pipeline-parallel-size "
                f"{parallel.pipeline_parallel_size} and layers of several geometries, wanted equal "
                "layers; use tensor parallelism or leave --kv-swap-space out"
            )
        # A stage knows its own layers; all know how many there are.
        rank_bytes = layer_bytes * model.get_total_num_hidden_layers()
    else:
        # All tensors are views of one allocation.
        rank_bytes = kv_cache_config.kv_cache_tensors[0].size // kv_cache_config.num_blocks
    block_bytes = rank_bytes * parallel.tensor_parallel_size
    position = model.get_num_attention_heads(parallel) * model.get_head_size()
    window_bytes = ring_len(vllm_config, options.window) * position * model.dtype.itemsize
    return HostRoom(
        num_blocks=int(options.swap_space * GIB) // block_bytes,
        blocks_per_window=-(-window_bytes // layer_bytes) if records_queries else 0,
        block_bytes=block_bytes,
    )
