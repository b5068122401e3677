"""A KV-cache group that vLLM keeps as it is: what a request holds there and may come to hold.

Layers with a window, chunks or a state give blocks back by themselves, so a request of any length
holds a bounded number. Knows vLLM's managers, no policy. Next: demand.py, admission.py and
floors.py, which ask.
"""

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, SlidingWindowSpec

from rkv_vllm.fit.overrides import calls


class KeptGroup:
    """One KV-cache group that is not compressed.

    Args:
        manager: of the group.
        vllm_config: what its spec asks for.

    Attributes:
        block_size: tokens per block.
        most_ever: blocks that one request holds at most, in the midst of its prefill.
    """

    def __init__(self, manager: SingleTypeKVCacheManager, vllm_config: VllmConfig) -> None:
        self._manager = manager
        self._spec = manager.kv_cache_spec
        self._max_model_len = vllm_config.model_config.max_model_len
        self.block_size = manager.block_size
        self.most_ever = cdiv(
            self._spec.max_memory_usage_bytes(vllm_config), self._spec.page_size_bytes
        )

    def most(self, num_tokens: int, in_flight: int) -> int:
        """Blocks that a request holds at most until it is so long.

        Args:
            num_tokens: its length.
            in_flight: of these, tokens that are computed and not settled; only what settles can
                make vLLM give a block back.
        """
        return min(cdiv(num_tokens, self.block_size), self._bound(in_flight))

    @calls(
        "vllm.v1.kv_cache_interface:SlidingWindowSpec.max_admission_blocks_per_request",
        "vllm.v1.kv_cache_interface:ChunkedLocalAttentionSpec.max_admission_blocks_per_request",
    )
    def _bound(self, in_flight: int) -> int:
        if not isinstance(self._spec, (SlidingWindowSpec, ChunkedLocalAttentionSpec)):
            return self.most_ever
        return self._spec.max_admission_blocks_per_request(
            max_in_flight_tokens=in_flight, max_model_len=self._max_model_len
        )

    def num_shared_with_one(self, req_id: str) -> int:
        """Blocks of a request that exactly one other request holds."""
        row = self._manager.req_to_blocks[req_id]
        return sum(block.ref_cnt == 2 and not block.is_null for block in row)

    def growth(self, req_id: str, num_tokens: int, in_flight: int) -> int:
        """Blocks that a running request takes from the pool at most, on its way to a length.

        Args:
            req_id: of the request.
            num_tokens: see `most`.
            in_flight: see `most`.
        """
        row = self._manager.req_to_blocks[req_id]
        num_new = cdiv(num_tokens, self.block_size) - len(row)
        if num_new <= 0:
            return 0
        bound = self._bound(in_flight)
        # The others are given back already; a shared one that is given back is still taken.
        own = sum(block.ref_cnt == 1 and not block.is_null for block in row[-bound:])
        return min(num_new, max(bound - own, 0))
