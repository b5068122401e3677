"""The KV-cache spec that makes vLLM build our books for a group of attention layers.

Importing this module registers the spec with vLLM. Workers return it from `get_kv_cache_spec`, and
unpickling it in the engine process imports this module there, just in time.
"""

from dataclasses import dataclass

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    replace_as,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

from rkv_vllm.fit.overrides import overrides
from rkv_vllm.limits import Limits
from rkv_vllm.options import CONFIG_KEY, ServerOptions, prefix_len
from rkv_vllm.policy import Terms, longest_cache
from rkv_vllm.scheduling.books import GroupBooks

# vLLM registers its own specs only while its registry is empty, so they have to come first.
KVCacheSpecRegistry._ensure_registered(None)


@register_kv_cache_spec(manager_class=GroupBooks, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class CompressedAttentionSpec(FullAttentionSpec):
    """Full attention in vLLM's eyes; its blocks are managed by GroupBooks.

    Attributes:
        layer_budget: tokens that these layers keep where the server keeps `budget`; None for just
            that. Layers of different budgets never share a block table.
    """

    layer_budget: int | None = None

    @classmethod
    @overrides("vllm.v1.kv_cache_interface:FullAttentionSpec.merge")
    def merge(cls, specs: list["CompressedAttentionSpec"]) -> "CompressedAttentionSpec":
        """Merge the specs of one group's layers.

        Raises:
            AssertionError: a spec is not ours (vLLM would shorten layers that need every token), or
                their budgets differ; an AssertionError, as vLLM expects of `merge`.
        """
        layer_budget = cls.common_budget(specs)
        return replace_as(FullAttentionSpec.merge(specs), cls, layer_budget=layer_budget)

    @classmethod
    def common_budget(cls, specs: list["CompressedAttentionSpec"]) -> int | None:
        """Returns the layer budget of all these specs.

        Raises:
            AssertionError: they differ, or a spec is of another class.
        """
        budgets = {spec.layer_budget if isinstance(spec, cls) else spec for spec in specs}
        if len(budgets) != 1 or not all(isinstance(spec, cls) for spec in specs):
            raise AssertionError(
                f"compressed layers of one group: expected equal layer budgets, got {budgets}"
            )
        return specs[0].layer_budget

    @overrides("vllm.v1.kv_cache_interface:FullAttentionSpec.is_uniform_with_collection")
    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether one group can hold all these layers."""
        return super().is_uniform_with_collection(kv_cache_specs) and all(
            isinstance(spec, type(self)) and spec.layer_budget == self.layer_budget
            for spec in kv_cache_specs.values()
        )

    @overrides("vllm.v1.kv_cache_interface:FullAttentionSpec.max_memory_usage_bytes")
    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes that one request of `max_model_len` takes: vLLM wants the pool to hold it."""
        # As plain JSON: this is asked often, and the options' method may be a costly import.
        options = vllm_config.additional_config[CONFIG_KEY]
        if not options.get("compress_prompt"):
            return super().max_memory_usage_bytes(vllm_config)
        server = ServerOptions.from_dict(options)
        max_model_len = vllm_config.model_config.max_model_len
        terms = Terms(
            self.layer_budget or server.budget,
            server.buffer,
            prefix_len(server.protect, max_model_len),
            server.prompt_chunk,
        )
        limits = Limits.of(vllm_config)
        slack = server.slack(self.block_size, limits.max_advance)
        longest = longest_cache(terms, max_model_len, limits.in_flight, slack)
        return cdiv(longest, self.block_size) * self.page_size_bytes


@register_kv_cache_spec(manager_class=GroupBooks, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class CompressedMLASpec(MLAAttentionSpec, CompressedAttentionSpec):
    """The same for layers of multi-head latent attention."""

    @classmethod
    @overrides("vllm.v1.kv_cache_interface:MLAAttentionSpec.merge")
    def merge(cls, specs: list["CompressedMLASpec"]) -> "CompressedMLASpec":
        """Merge the specs of one group's layers.

        Raises:
            AssertionError: see `CompressedAttentionSpec.merge`.
        """
        layer_budget = cls.common_budget(specs)
        return replace_as(MLAAttentionSpec.merge(specs), cls, layer_budget=layer_budget)


def compressed_spec(spec: FullAttentionSpec, layer_budget: int | None) -> CompressedAttentionSpec:
    """Returns vLLM's spec of a layer as ours.

    Args:
        spec: of full or of latent attention.
        layer_budget: tokens that the layer keeps, None for the server's budget.
    """
    cls = CompressedMLASpec if isinstance(spec, MLAAttentionSpec) else CompressedAttentionSpec
    return replace_as(spec, cls, layer_budget=layer_budget)
