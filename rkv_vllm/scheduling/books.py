"""Books what a compacted request holds: physical lengths, private blocks, the blocks given back.

Knows vLLM's block pool and one KV-cache group; does not decide when (planner.py) and moves no
data (worker/flush.py). Reads `physical = logical - evicted` into every length that vLLM's
full-attention manager gets from the scheduler.
"""

from collections.abc import Callable, Sequence

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from rkv_vllm.fit.overrides import calls, overrides


class GroupBooks(FullAttentionManager):
    """FullAttentionManager for requests whose cache is shorter than their text.

    A request that was never compacted is handled by the base class in every method.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._num_evicted: dict[str, int] = {}
        # Blocks that running requests will still need; the scheduler knows (scheduler.py).
        self.admission_reserve: Callable[[str], int] = lambda request_id: 0

    def num_evicted(self, req_id: str) -> int:
        """Tokens evicted from this request since its (re)admission."""
        return self._num_evicted.get(req_id, 0)

    def num_shared_blocks(self, req_id: str, num_tokens: int) -> int:
        """Blocks among the first `num_tokens` that a compaction has to replace by private ones."""
        blocks = self.req_to_blocks.get(req_id, ())[: cdiv(num_tokens, self.block_size)]
        return sum(block.ref_cnt > 1 for block in blocks)

    @overrides(
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.get_num_blocks_to_allocate"
    )
    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Blocks that `num_tokens` logical tokens of this request still need.

        When vLLM asks whether to admit a request (`apply_admission_cap`), the blocks that the
        running requests will grow into are asked for as well.
        """
        num_evicted = self._num_evicted.get(request_id)
        if num_evicted is None:
            num_blocks = super().get_num_blocks_to_allocate(
                request_id,
                num_tokens,
                new_computed_blocks,
                total_computed_tokens,
                num_local_computed_tokens,
                num_tokens_main_model,
                apply_admission_cap=apply_admission_cap,
                prefill_end=prefill_end,
            )
            return num_blocks + (self.admission_reserve(request_id) if apply_admission_cap else 0)
        num_required = cdiv(num_tokens - num_evicted, self.block_size)
        return max(num_required - len(self.req_to_blocks[request_id]), 0)

    @overrides("vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.allocate_new_blocks")
    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Allocate up to `num_tokens` logical tokens of this request."""
        num_evicted = self.num_evicted(request_id)
        return super().allocate_new_blocks(
            request_id, num_tokens - num_evicted, num_tokens_main_model - num_evicted
        )

    @overrides("vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.cache_blocks")
    def cache_blocks(self, request: Request, *args, **kwargs) -> None:
        """Publish hashes of full blocks, unless their content is no token prefix any more."""
        if request.request_id not in self._num_evicted:
            super().cache_blocks(request, *args, **kwargs)

    @overrides("vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.pop_blocks_for_free")
    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget the request; a later resume starts with physical = logical."""
        self._num_evicted.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    @calls("vllm.v1.core.block_pool:BlockPool.free_blocks")
    def compact(
        self, req_id: str, num_evict: int, total_len: int
    ) -> tuple[list[int], list[int]] | None:
        """Book an eviction and give the blocks it empties back to the pool.

        Every block the survivors move to belongs to this request alone and is not findable in
        the prefix cache. Call it only after all blocks of the step are allocated: blocks freed
        here must not be handed out before the workers have read them (DESIGN section 1).

        Args:
            req_id: vLLM's request id.
            num_evict: tokens that leave, >= 1.
            total_len: physical tokens before the eviction.

        Returns:
            (old, new) block ids in order, or None (nothing changed) when a shared block needs a
            private copy and the pool has no free block for it.

        Raises:
            RuntimeError: the row holds the null block; the bookkeeping is broken.
        """
        blocks = self.req_to_blocks[req_id]
        old_block_ids = [block.block_id for block in blocks]
        if self._null_block.block_id in old_block_ids:
            raise RuntimeError(f"request {req_id}: null block inside its row {old_block_ids}")
        kept = blocks[: cdiv(total_len - num_evict, self.block_size)]
        private = self._make_private(kept)
        if private is None:
            return None
        replaced = [old for old, new in zip(kept, private, strict=True) if old is not new]
        self.req_to_blocks[req_id] = private
        self._num_evicted[req_id] = self.num_evicted(req_id) + num_evict
        self.block_pool.free_blocks(reversed(replaced + blocks[len(kept) :]))
        return old_block_ids, [block.block_id for block in private]

    @calls(
        "vllm.v1.core.block_pool:BlockPool.is_block_writable",
        "vllm.v1.core.block_pool:BlockPool.get_num_free_blocks",
        "vllm.v1.core.block_pool:BlockPool.evict_blocks",
        "vllm.v1.core.block_pool:BlockPool.get_new_blocks",
    )
    def _make_private(self, blocks: list[KVCacheBlock]) -> list[KVCacheBlock] | None:
        """Replace every block that others can see; None when that is impossible now."""
        pool = self.block_pool
        public = [i for i, block in enumerate(blocks) if not pool.is_block_writable(block)]
        shared = [i for i in public if blocks[i].ref_cnt > 1]
        if len(shared) > pool.get_num_free_blocks():
            return None
        # Shared blocks first: they must be replaced. A sole owner's cached block may, so that
        # the cached prefix survives for others; without a free block it only loses its hash.
        wanted = shared + [i for i in public if blocks[i].ref_cnt == 1]
        replaced = wanted[: pool.get_num_free_blocks()]
        unhashed = {blocks[i].block_id for i in wanted[len(replaced) :]}
        if unhashed:
            pool.evict_blocks(unhashed)
        private = list(blocks)
        for i, fresh in zip(replaced, pool.get_new_blocks(len(replaced)), strict=True):
            private[i] = fresh
        return private
