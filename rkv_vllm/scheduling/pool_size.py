"""Whether the pool of blocks can hold one request, at the start and for each that comes.

Knows lengths and blocks; how long a request gets is policy.py's affair. Next: scheduler.py, which
asks.
"""

from collections.abc import Sequence

from rkv_vllm.limits import Limits
from rkv_vllm.log import init_logger
from rkv_vllm.options import OPTIONS, ServerOptions
from rkv_vllm.policy import Terms, floor_blocks, longest_cache
from rkv_vllm.scheduling.admission import Track
from rkv_vllm.scheduling.kept_group import KeptGroup

logger = init_logger(__name__)


class PoolSize:
    """Compares requests with the blocks of the pool.

    Args:
        server: the server's options.
        tracks: the compressed groups.
        kept: the groups that are not compressed.
        limits: of the engine.
    """

    def __init__(
        self,
        server: ServerOptions,
        tracks: Sequence[Track],
        kept: Sequence[KeptGroup],
        limits: Limits,
    ) -> None:
        self._server = server
        self._tracks = tracks
        self._kept = kept
        self._limits = limits
        # vLLM never hands out the null block.
        self._num_blocks = tracks[0].books.block_pool.num_gpu_blocks - 1

    def holds(self, terms: Sequence[Terms] | None, final_len: int) -> bool:
        """Whether the pool can hold a request.

        Args:
            terms: in each compressed group; None if the cache is kept whole.
            final_len: tokens that it cannot exceed.
        """
        return self._most_blocks(terms, final_len) <= self._num_blocks

    def describe(self, server_terms: Sequence[Terms]) -> str:
        """Blocks that an answer to a short prompt holds at most, and those of its whole text."""
        max_len, in_flight = self._limits.max_model_len, self._limits.in_flight
        held = whole = 0
        for terms, track in zip(server_terms, self._tracks, strict=True):
            size = track.books.block_size
            grown = terms.prefix_len + terms.budget + terms.buffer + in_flight
            held += -(-min(grown, max_len) // size)
            whole += -(-max_len // size)
        sizes = sorted({track.books.block_size for track in self._tracks})
        return (
            f"blocks of {' and '.join(map(str, sizes))} tokens, freed whole: an answer to a short "
            f"prompt holds up to {held} of them in layers of full attention, {whole} without "
            f"compression at --max-model-len {max_len}"
        )

    def check_floor(self, server_terms: Sequence[Terms]) -> None:
        """Refuse a protected prefix beside which no request could ever be compacted."""
        total = self._num_blocks
        needed = sum(
            floor_blocks(terms, self._server.window, self._limits.in_flight, track.books.block_size)
            for terms, track in zip(server_terms, self._tracks, strict=True)
        )
        # One in each of the others at the least.
        needed += len(self._kept)
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
        limits = self._limits
        final_len = limits.final_slots(final_len)
        own = [None] * len(self._tracks) if terms is None else terms
        num_blocks = sum(group.most_ever for group in self._kept)
        for each, track in zip(own, self._tracks, strict=True):
            block_size = track.books.block_size
            longest = final_len
            if each is not None:
                slack = self._server.slack(block_size, limits.max_advance)
                longest = longest_cache(each, final_len, limits.in_flight, slack)
            num_blocks += -(-longest // block_size)
        return num_blocks
