"""The KV-cache spec that makes vLLM build our block manager for a group of attention layers.

Importing this module registers the spec with vLLM. Workers return it from `get_kv_cache_spec`, and
unpickling it in the engine process imports this module there, just in time.
"""

from dataclasses import dataclass

from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

from rkv_vllm.scheduling.books import GroupBooks

# vLLM registers its own specs only while its registry is empty, so they have to come first.
KVCacheSpecRegistry._ensure_registered(None)


@register_kv_cache_spec(manager_class=GroupBooks, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class CompressedAttentionSpec(FullAttentionSpec):
    """Full attention in vLLM's eyes; its blocks are managed by GroupBooks."""
