"""Nothing is published for the prefix cache after a request's first compaction, in any group.

What a request computes after an eviction depends on what was evicted. That is true of its
sliding-window and state layers too, whose managers know nothing of evictions, and another request's
full-attention blocks of the same tokens would make their blocks findable. Next: books.py.
"""

from collections.abc import Iterable

from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

# More blocks than any request has.
_ALL = 2**62


def publish_no_more(managers: Iterable[SingleTypeKVCacheManager], req_id: str) -> None:
    """Let a request count as published in the whole, until its blocks are freed.

    Args:
        managers: of all KV-cache groups; each publishes what lies behind its `num_cached_block`.
        req_id: the request.
    """
    for manager in managers:
        manager.num_cached_block[req_id] = _ALL
