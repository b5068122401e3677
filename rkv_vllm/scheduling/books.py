"""Books what requests hold in one compressed KV-cache group: lengths, blocks, what goes back.

Knows vLLM's block pool and one group; does not decide when (planner.py) and moves no data
(worker/flush.py). Reads `physical = logical - evicted` into every length that vLLM's full-attention
manager gets from the scheduler.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from rkv_vllm.fit.overrides import calls, overrides
from rkv_vllm.scheduling.publishing import publish_no_more


class GroupBooks(FullAttentionManager):
    """FullAttentionManager for requests whose cache is shorter than their text.

    A request that was never compacted is handled by the base class in every method.

    Attributes:
        num_evicted: tokens evicted from each compacted request since its (re)admission; the
            scheduler's only record of that number.
        total_evicted: their sum.
        required_at_admission: turns the blocks that a newcomer needs into those that must be free;
            set by the scheduler for one group of an engine (admission.py).
        resumed_len: tokens of a preempted request that vLLM would resume for its first chunk alone,
            0 for others; set by the scheduler.
        longest_prefill: most physical tokens of a request's prefill; set where prompts are
            compacted (prompts.py).
        kept_at: the tokens [first, stop) that a request's survivors take when its prompt is
            compacted once so many tokens are computed, None where it is not; set likewise.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.num_evicted: dict[str, int] = {}
        self.total_evicted = 0
        self.required_at_admission: Callable[[str, int], int] | None = None
        self.resumed_len: Callable[[str], int] | None = None
        self.longest_prefill: Callable[[str], int] | None = None
        self.kept_at: Callable[[str, int], tuple[int, int] | None] | None = None
        self._emptied: list[KVCacheBlock] = []
        # For the private copies that prompts need at the end of this step.
        self._set_aside: dict[str, list[KVCacheBlock]] = {}
        # Blocks of theirs that nobody may begin to share before.
        self._moving: set[int] = set()

    def num_shared_blocks(self, req_id: str, prefix_len: int, num_tokens: int) -> int:
        """Blocks of tokens [prefix_len, num_tokens) that others hold, so that they need a copy."""
        first, stop = prefix_len // self.block_size, cdiv(num_tokens, self.block_size)
        return sum(block.ref_cnt > 1 for block in self.req_to_blocks.get(req_id, ())[first:stop])

    def num_leading_shared_blocks(self, req_id: str, first: int = 0) -> int:
        """Blocks from index `first` on that others hold, up to the first that nobody else does.

        Whoever shares a block shares all before it (or a copy of them that the prefix cache took
        for the same), so the counts do not rise along a row. An estimate; `evict` counts exactly.
        """
        blocks = self.req_to_blocks.get(req_id, ())
        if first >= len(blocks):
            return 0
        return bisect_left(blocks, True, lo=first, key=lambda block: block.ref_cnt < 2) - first

    def num_shared_with_one(self, req_id: str) -> int:
        """Blocks of the request that exactly one other request holds."""
        return sum(block.ref_cnt == 2 for block in self.req_to_blocks.get(req_id, ()))

    def share_of_shared(self, req_id: str) -> float:
        """Of the blocks that others hold as well, the request's part."""
        blocks = self.req_to_blocks.get(req_id, ())
        return sum(1 / block.ref_cnt for block in blocks if block.ref_cnt > 1)

    def fair_share(self, req_id: str) -> float:
        """Blocks of the request, of shared ones its part."""
        blocks = self.req_to_blocks.get(req_id, ())
        share, first = 0.0, 0
        while first < len(blocks):
            count = blocks[first].ref_cnt
            fewer = bisect_left(blocks, True, lo=first + 1, key=lambda b, n=count: b.ref_cnt < n)
            share, first = share + (fewer - first) / count, fewer
        return share

    def held_len(self, req_id: str, num_tokens: int) -> int:
        """Most tokens that a request's cache holds while these are computed, before it decodes."""
        held = num_tokens - self.num_evicted.get(req_id, 0)
        return held if self.longest_prefill is None else min(held, self.longest_prefill(req_id))

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
        running requests will grow into are asked for as well. Where a prompt is compacted after
        this step, so are private copies of what it shares. A preempted request that vLLM would
        resume for its first chunk is asked for whole.
        """
        num_evicted = self.num_evicted.get(request_id, 0)
        # Not by `num_cached_block`: vLLM counts nothing there without prefix caching.
        is_running = num_evicted or bool(self.req_to_blocks.get(request_id))
        if is_running and self.kept_at is None and not (apply_admission_cap or new_computed_blocks):
            # A thousand of these are asked for per step.
            num_required = -((num_evicted - num_tokens) // self.block_size)
            return max(num_required - len(self.req_to_blocks[request_id]), 0)
        num_copies = 0
        if self.kept_at is not None:
            num_copies = self._num_copies(request_id, num_tokens_main_model, new_computed_blocks)
            if apply_admission_cap:
                num_tokens = num_evicted + self.held_len(request_id, num_tokens)
        if num_evicted or (is_running and not apply_admission_cap):
            # A running request hits no further prefix.
            num_required = -((num_evicted - num_tokens) // self.block_size)
            held = len(self.req_to_blocks.get(request_id, ())) + len(new_computed_blocks)
            num_blocks = max(num_required - held, 0)
            if new_computed_blocks:
                # Those of a compressed prefix that wait for their eviction leave the free ones.
                num_blocks += self._get_num_evictable_blocks(new_computed_blocks)
        else:
            num_blocks = super().get_num_blocks_to_allocate(
                request_id,
                num_tokens,
                new_computed_blocks,
                total_computed_tokens,
                num_local_computed_tokens,
                num_tokens_main_model,
                apply_admission_cap,
                prefill_end,
            )
        num_blocks += num_copies
        is_gated = apply_admission_cap
        if self.resumed_len is not None and not (is_running or is_gated):
            whole = self.held_len(request_id, self.resumed_len(request_id))
            num_blocks += max(cdiv(whole, self.block_size) - cdiv(num_tokens, self.block_size), 0)
            is_gated = whole > 0
        if is_gated and self.required_at_admission is not None:
            return self.required_at_admission(request_id, num_blocks)
        return num_blocks

    @overrides("vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.allocate_new_blocks")
    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Allocate up to `num_tokens` logical tokens of this request."""
        num_evicted = self.num_evicted.get(request_id, 0)
        held = len(self.req_to_blocks[request_id]) * self.block_size
        allocated: list[KVCacheBlock] = []
        if num_tokens - num_evicted > held or request_id in self._partial_hit_reqs:
            allocated = super().allocate_new_blocks(
                request_id, num_tokens - num_evicted, num_tokens_main_model - num_evicted
            )
        if self.kept_at is not None:
            self._set_copies_aside(request_id, num_tokens_main_model)
        return allocated

    @overrides(
        "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager"
        ".add_local_computed_blocks"
    )
    def add_local_computed_blocks(self, request_id: str, *args, **kwargs) -> None:
        """Take over the blocks of a prefix; behind a compressed one nothing is published."""
        super().add_local_computed_blocks(request_id, *args, **kwargs)
        if request_id in self.num_evicted:
            publish_no_more([self], request_id)

    def _num_copies(self, req_id: str, end: int, hits: Sequence[KVCacheBlock]) -> int:
        """Private copies that the compaction needs which follows when `end` tokens are computed.

        Args:
            req_id: of the request.
            end: logical tokens.
            hits: blocks of a request that is not running yet; it does not hold them yet either.
        """
        others = 0 if hits else 1
        row = hits or self.req_to_blocks.get(req_id, ())
        return sum(block.ref_cnt > others for block in self._written(req_id, end, row))

    def _written(
        self, req_id: str, end: int, row: Sequence[KVCacheBlock]
    ) -> Sequence[KVCacheBlock]:
        """The blocks of a row that a compaction at `end` writes; none where there is none."""
        kept = self.kept_at(req_id, end)
        if kept is None or end - self.num_evicted.get(req_id, 0) <= kept[1]:
            return ()
        return row[kept[0] // self.block_size : cdiv(kept[1], self.block_size)]

    @calls("vllm.v1.core.block_pool:BlockPool.get_new_blocks")
    def _set_copies_aside(self, req_id: str, end: int) -> None:
        """Take what `_num_copies` asked for, so that no later allocation of the step does."""
        written = self._written(req_id, end, self.req_to_blocks[req_id])
        if written:
            num_shared = sum(block.ref_cnt > 1 for block in written)
            self._set_aside[req_id] = self.block_pool.get_new_blocks(num_shared)
            self._moving.update(block.block_id for block in written if block.ref_cnt == 1)

    def num_sharable(self, hits: Sequence[KVCacheBlock]) -> int:
        """How many of these blocks, from the first, a newcomer may share.

        A prompt that is compacted after this step has no copies for further ones.
        """
        ids = (block.block_id for block in hits)
        return next((i for i, each in enumerate(ids) if each in self._moving), len(hits))

    @overrides("vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.pop_blocks_for_free")
    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget the request; a later resume starts with physical = logical."""
        self.total_evicted -= self.num_evicted.pop(request_id, 0)
        set_aside = self._set_aside.pop(request_id, [])
        return [*super().pop_blocks_for_free(request_id), *set_aside]

    def adopt(self, req_id: str, num_evicted: int) -> None:
        """Give a request that holds nothing yet the evicted tokens of the cache it will get."""
        self.num_evicted[req_id] = num_evicted
        self.total_evicted += num_evicted

    def evict(
        self, req_id: str, num_evict: int, total_len: int, prefix_len: int = 0
    ) -> tuple[list[int], list[int]] | None:
        """Book an eviction; the blocks that it empties go back to the pool with `reclaim`.

        Every block the survivors move to belongs to this request alone and is not findable in the
        prefix cache. Full blocks of the protected prefix stay as they are, shared or not. Call it
        only after all blocks of the step are allocated: blocks freed here must not be handed out
        before the workers have read them (DESIGN section 1).

        Args:
            req_id: vLLM's request id.
            num_evict: tokens that leave, >= 1.
            total_len: physical tokens before the eviction.
            prefix_len: protected tokens at the front.

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
        num_untouched = prefix_len // self.block_size
        kept = blocks[num_untouched : cdiv(total_len - num_evict, self.block_size)]
        set_aside = self._set_aside.pop(req_id, [])
        private = self._make_private(kept, set_aside)
        self._emptied.extend(set_aside)
        if private is None:
            return None
        replaced = [old for old, new in zip(kept, private, strict=True) if old is not new]
        row = blocks[:num_untouched] + private
        self.req_to_blocks[req_id] = row
        self.num_evicted[req_id] = self.num_evicted.get(req_id, 0) + num_evict
        self.total_evicted += num_evict
        self._emptied.extend(reversed(replaced + blocks[len(row) :]))
        return old_block_ids, [block.block_id for block in row]

    @calls("vllm.v1.core.block_pool:BlockPool.free_blocks")
    def reclaim(self) -> None:
        """Give the blocks that this step's evictions emptied back to the pool.

        Not one by one: a freed block without a hash is the first to be handed out again, and as the
        private copy of another request of the same step it would part their compactions.
        """
        emptied, self._emptied = self._emptied, []
        self._moving.clear()
        self.block_pool.free_blocks(emptied)

    @calls(
        "vllm.v1.core.block_pool:BlockPool.is_block_writable",
        "vllm.v1.core.block_pool:BlockPool.get_num_free_blocks",
        "vllm.v1.core.block_pool:BlockPool.evict_blocks",
        "vllm.v1.core.block_pool:BlockPool.get_new_blocks",
    )
    def _make_private(
        self, blocks: list[KVCacheBlock], set_aside: list[KVCacheBlock]
    ) -> list[KVCacheBlock] | None:
        """Replace every block that others can see; None when that is impossible now.

        Args:
            blocks: of one request.
            set_aside: taken for this before; what is used leaves the list.
        """
        pool = self.block_pool
        public = [i for i, block in enumerate(blocks) if not pool.is_block_writable(block)]
        shared = [i for i in public if blocks[i].ref_cnt > 1]
        num_fresh = len(set_aside) + pool.get_num_free_blocks()
        if len(shared) > num_fresh:
            return None
        # Shared blocks first: they must be replaced. A sole owner's cached block may, so that
        # the cached prefix survives for others; without a free block it only loses its hash.
        wanted = shared + [i for i in public if blocks[i].ref_cnt == 1]
        replaced = wanted[:num_fresh]
        unhashed = {blocks[i].block_id for i in wanted[len(replaced) :]}
        if unhashed:
            pool.evict_blocks(unhashed)
        taken, set_aside[:] = set_aside[: len(replaced)], set_aside[len(replaced) :]
        taken = [*taken, *pool.get_new_blocks(len(replaced) - len(taken))]
        private = list(blocks)
        for i, fresh in zip(replaced, taken, strict=True):
            private[i] = fresh
        return private
