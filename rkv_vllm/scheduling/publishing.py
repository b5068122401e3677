"""Nothing is published for the prefix cache after a request's first compaction, in any group.

What a request computes after an eviction depends on what was evicted. That is true of its
sliding-window and state layers too, whose managers know nothing of evictions, and another request's
full-attention blocks of the same tokens would make their blocks findable. Next: books.py.
"""

from collections.abc import Mapping
from functools import cache

from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.request import Request

from rkv_vllm.fit.overrides import overrides


def publish_until_evicted(
    coordinator: KVCacheCoordinator, evicted: tuple[Mapping[str, int], ...]
) -> None:
    """Make a coordinator publish hashes of requests that were never compacted, and no others.

    Args:
        coordinator: of an engine; its class is exchanged.
        evicted: of each compressed group, the tokens evicted from each compacted request.
    """
    coordinator.__class__ = _guarded(type(coordinator))
    coordinator.evicted = evicted


@overrides("vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.cache_blocks")
@cache
def _guarded(base: type[KVCacheCoordinator]) -> type[KVCacheCoordinator]:
    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        for evicted in self.evicted:
            if request.request_id in evicted:
                return
        base.cache_blocks(self, request, num_computed_tokens)

    return type(f"Guarded{base.__name__}", (base,), {"cache_blocks": cache_blocks})
