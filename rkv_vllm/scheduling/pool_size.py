"""Whether the pool of blocks can hold one request, at the start and for each that comes.

Knows lengths and blocks; how long a request gets is policy.py's affair. Next: scheduler.py, which
asks.
"""

from collections.abc import Sequence

from vllm.config import VllmConfig
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

from rkv_vllm.log import init_logger
from rkv_vllm.options import OPTIONS, ServerOptions
from rkv_vllm.policy import Terms, floor_blocks, longest_cache
from rkv_vllm.scheduling.admission import Limits, Track

logger = init_logger(__name__)


class PoolSize:
    """Compares requests with the blocks of the pool.

    Args:
        server: the server's options.
        tracks: the compressed groups.
        managers: of all groups.
        limits: of the engine.
        vllm_config: what specs of other groups ask for.
    """

    def __init__(
        self,
        server: ServerOptions,
        tracks: Sequence[Track],
        managers: Sequence[SingleTypeKVCacheManager],
        limits: Limits,
        vllm_config: VllmConfig,
    ) -> None:
        self._vllm_config = vllm_config
        self._server = server
        self._tracks = tracks
        self._managers = managers
        self._limits = limits
        # vLLM never hands out the null block.
        self._num_blocks = managers[0].block_pool.num_gpu_blocks - 1

    def holds(self, terms: Sequence[Terms] | None, final_len: int) -> bool:
        """Whether the pool can hold a request.

        Args:
            terms: in each compressed group; None if the cache is kept whole.
            final_len: tokens that it cannot exceed.
        """
        return self._most_blocks(terms, final_len) <= self._num_blocks

    def check_floor(self, server_terms: Sequence[Terms]) -> None:
        """Refuse a protected prefix beside which no request could ever be compacted."""
        total = self._num_blocks
        needed = sum(
            floor_blocks(terms, self._server.window, self._limits.in_flight, track.books.block_size)
            for terms, track in zip(server_terms, self._tracks, strict=True)
        )
        protected = server_terms[0].prefix_len
        if protected and needed > total:
            raise ValueError(
                f"--kv-protect (protect): got {protected}, which with --kv-budget "
                f"{self._server.budget} takes {needed} blocks for one request, wanted at most the "
                f"{total} blocks of the pool; protect fewer tokens or give the cache more memory"
            )

    def check_bound(self, server_terms: Sequence[Terms]) -> None:
        """Refuse a pool that cannot hold one request, whatever its prompt; else say what it holds.

        vLLM has asked before (`CompressedAttentionSpec.max_memory_usage_bytes`), with an answer
        that knows nothing of these options.
        """
        if self._server.protect == "prompt":
            server_terms = [
                own._replace(prefix_len=self._limits.max_model_len) for own in server_terms
            ]
        needed = self._most_blocks(server_terms, self._limits.max_model_len)
        total = self._num_blocks
        options = ", ".join(
            f"{OPTIONS[name].flag} {getattr(self._server, name)}"
            for name in ("protect", "budget", "prompt_chunk", "buffer")
        )
        if needed > total:
            raise ValueError(
                f"--kv-compress-prompt: got {options}, with which one request takes up to "
                f"{needed} blocks, wanted at most the {total} blocks of the pool; lower one of "
                "them or give the cache more memory"
            )
        logger.info(
            "Prompts are compressed: with %s a request of up to --max-model-len %d tokens takes at "
            "most %d of the %d blocks of the pool",
            options,
            self._limits.max_model_len,
            needed,
            total,
        )

    def _most_blocks(self, terms: Sequence[Terms] | None, final_len: int) -> int:
        """Most blocks that a request ever holds, of all KV-cache groups.

        Args:
            terms: in each compressed group; None if the cache is kept whole.
            final_len: tokens that it cannot exceed.
        """
        own = [None] * len(self._tracks) if terms is None else terms
        of_track = {
            track.books.kv_cache_group_id: final_len
            if each is None
            else longest_cache(
                each, final_len, self._limits.in_flight, self._server.slack(track.books.block_size)
            )
            for each, track in zip(own, self._tracks, strict=True)
        }
        num_blocks = 0
        for manager in self._managers:
            spec, group_id = manager.kv_cache_spec, manager.kv_cache_group_id
            if group_id in of_track:
                num_blocks += -(-of_track[group_id] // manager.block_size)
            else:
                size = spec.max_memory_usage_bytes(self._vllm_config)
                num_blocks += -(-size // spec.page_size_bytes)
        return num_blocks
