"""Lets later requests start from a long prefix that another one has compressed already.

What is left of a prompt after its compaction at a boundary depends on the tokens before it and on
the options, as long as the method looks at nothing else (`Method.depends_on_prefix_only`). So those
blocks are put under keys of their own into vLLM's block pool, beside the blocks of uncompressed
text: they are found, shared, and evicted by age like those. vLLM's KV-cache events stay silent, so
nothing is published where they are on. Knows the pool and the books. Next: prompts.py for when.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from hashlib import sha256

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, make_block_hash_with_group_id
from vllm.v1.request import Request

from rkv_vllm.fit.overrides import calls
from rkv_vllm.policy import Terms
from rkv_vllm.scheduling.admission import Track
from rkv_vllm.scheduling.directive import EvictionDirective, StepPlan
from rkv_vllm.scheduling.prompt_rule import PromptRule


class CompressedPrefixes:
    """Publishes and finds the survivors of prompts.

    Args:
        tracks: the compressed groups, which are all of the engine.
        pool: vLLM's.
        rule: where prompts are compacted.
        hash_block_size: tokens of each of a request's block hashes.
        options_of: everything of a request that shapes the result beside its tokens and terms.
    """

    def __init__(
        self,
        tracks: Sequence[Track],
        pool: BlockPool,
        rule: PromptRule,
        hash_block_size: int,
        options_of: Callable[[Request], str],
    ) -> None:
        self._tracks = tracks
        self._pool = pool
        self._rule = rule
        self._hash_block_size = hash_block_size
        self._options_of = options_of
        # Evicted tokens of each group that the books reckon with in this step's allocation.
        self._asked: dict[str, list[int]] = {}

    def publish(
        self,
        request: Request,
        terms: Sequence[Terms] | None,
        directives: Iterable[EvictionDirective],
    ) -> None:
        """Make the survivors of a compaction of a prompt findable.

        Call it when the workers are bound to carry it out before anything that is scheduled later,
        and before the request is compacted again.

        Args:
            request: of the directives; it still runs.
            terms: of the request in each group.
            directives: those of one step.
        """
        of_group = {directive.group_id: directive for directive in directives}
        position = next(iter(of_group.values())).settled_logical_len
        keys = self._keys(request, terms, position)
        if keys is None:
            return
        rows = []
        for own, track in zip(terms, self._tracks, strict=True):
            directive = of_group.get(track.books.kv_cache_group_id)
            # A group with a larger budget may have nothing to evict yet.
            held = track.books.req_to_blocks.get(request.request_id)
            if directive is None or held is None:
                return
            rows.append(held[: _num_kept(own) // track.books.block_size])
        if self._find(keys, terms) is None:
            for track, row in zip(self._tracks, rows, strict=True):
                self._insert(track.books.kv_cache_group_id, keys, row)

    def longest(
        self, request: Request, terms: Sequence[Terms] | None
    ) -> tuple[list[list[KVCacheBlock]], int] | None:
        """The longest compressed prefix of a request: blocks of each group, logical tokens.

        From here to `step` the books reckon with it.
        """
        first = self._rule.first_boundary(terms, request.num_tokens)
        if first is None:
            return None
        chunk = terms[0].prompt_chunk
        for position in range((request.num_tokens - 1) // chunk * chunk, first - 1, -chunk):
            keys = self._keys(request, terms, position)
            found = None if keys is None else self._find(keys, terms)
            if found is None:
                continue
            num_evicted = [position - _num_kept(own) for own in terms]
            for number, track in zip(num_evicted, self._tracks, strict=True):
                track.books.adopt(request.request_id, number)
            self._asked[request.request_id] = num_evicted
            return found, position
        return None

    def step(self, scheduled: Collection[str], plan: StepPlan) -> None:
        """Tell the workers who started from a compressed prefix; forget whom vLLM did not admit."""
        for req_id, num_evicted in self._asked.items():
            for number, track in zip(num_evicted, self._tracks, strict=True):
                books = track.books
                if req_id in scheduled:
                    plan.adopted.append((req_id, books.kv_cache_group_id, number))
                else:
                    books.pop_blocks_for_free(req_id)
        self._asked.clear()

    def _keys(
        self, request: Request, terms: Sequence[Terms] | None, position: int
    ) -> list[BlockHash] | None:
        """One key for every block; None where blocks do not end with the survivors."""
        if terms is None or position % self._hash_block_size:
            return None
        sizes = [track.books.block_size for track in self._tracks]
        if any(_num_kept(own) % size for own, size in zip(terms, sizes, strict=True)):
            return None
        # It covers all tokens up to there, and what vLLM adds to them: LoRA, salt, images.
        prefix = request.block_hashes[position // self._hash_block_size - 1]
        said = repr((bytes(prefix), self._options_of(request), tuple(terms))).encode()
        digest = sha256(said).digest()
        most = max(_num_kept(own) // size for own, size in zip(terms, sizes, strict=True))
        return [BlockHash(sha256(digest + i.to_bytes(4, "big")).digest()) for i in range(most)]

    @calls("vllm.v1.core.block_pool:BlockPool.get_cached_block")
    def _find(
        self, keys: Sequence[BlockHash], terms: Sequence[Terms]
    ) -> list[list[KVCacheBlock]] | None:
        rows = []
        for own, track in zip(terms, self._tracks, strict=True):
            books, row = track.books, []
            for key in keys[: _num_kept(own) // books.block_size]:
                found = self._pool.get_cached_block(key, [books.kv_cache_group_id])
                if found is None:
                    return None
                row.extend(found)
            if books.num_sharable(row) < len(row):
                return None
            rows.append(row)
        return rows

    @calls(
        "vllm.v1.core.block_pool:BlockHashToBlockMap.insert",
        "vllm.v1.core.kv_cache_utils:KVCacheBlock.set_block_hash",
    )
    def _insert(self, group_id: int, keys: Sequence[BlockHash], row: list[KVCacheBlock]) -> None:
        for key, block in zip(keys, row, strict=False):
            own_key = make_block_hash_with_group_id(key, group_id)
            if block.block_hash is None:
                block.set_block_hash(own_key)
            else:
                # A block of protected tokens is findable by its text as well.
                more = self._pool.cached_block_hashes_by_block.setdefault(block.block_id, set())
                more.add(own_key)
            self._pool.cached_block_hash_to_block.insert(own_key, block)


def _num_kept(terms: Terms) -> int:
    return terms.prefix_len + terms.budget
