"""An attention group of vLLM whose layers attend to a compressed cache, for both runners.

vLLM makes the metadata of every attention layer through the two methods overridden here, in real,
dummy and captured runs. Next: lengths.py for what replaces the logical lengths.
"""

from collections.abc import Iterable
from typing import Any

from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.utils import AttentionGroup

from rkv_vllm.fit.overrides import overrides
from rkv_vllm.worker.lengths import GroupRows


class PhysicalAttentionGroup(AttentionGroup):
    """AttentionGroup that attends to as many tokens as the cache holds.

    Made by exchanging the class of a constructed AttentionGroup.
    """

    rows: GroupRows

    @overrides("vllm.v1.worker.utils:AttentionGroup.build_metadata")
    def build_metadata(
        self,
        common_attn_metadata: CommonAttentionMetadata,
        ubatch_idx: int = 0,
        common_prefix_len: int = 0,
        **kwargs: Any,
    ) -> Any:
        """Make the metadata of a step."""
        common = self.rows.apply(common_attn_metadata)
        return super().build_metadata(common, ubatch_idx, common_prefix_len, **kwargs)

    @overrides("vllm.v1.worker.utils:AttentionGroup.build_metadata_for_cudagraph_capture")
    def build_metadata_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata, ubatch_idx: int = 0
    ) -> Any:
        """Make the metadata that a graph is captured with."""
        common = self.rows.apply(common_attn_metadata)
        return super().build_metadata_for_cudagraph_capture(common, ubatch_idx)


def attend_to_physical_lengths(groups: Iterable[AttentionGroup], rows: GroupRows) -> None:
    """Let the attention groups of one compressed KV-cache group see its physical lengths.

    Args:
        groups: vLLM's, made with the cache.
        rows: of that KV-cache group.
    """
    for group in groups:
        group.__class__ = PhysicalAttentionGroup
        group.rows = rows
        for builder in group.metadata_builders:
            # V1 would hand the metadata of one group, its lengths included, to the next group of
            # an equal spec.
            builder.supports_update_block_table = False
