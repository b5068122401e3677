"""What the model runners with compression have in common.

Everything vLLM computes stays logical except what attention sees: slots and sequence lengths. How
those become physical differs between vLLM's two runners: runner_v1.py and runner_v2.py. When a
flush runs, who records queries and what is reported does not, and stands here. Next: flush.py
for the flush, attention_hook.py for the queries.
"""

import time
from abc import ABC, abstractmethod
from collections import deque

import torch
from vllm import envs
from vllm.model_executor.layers.attention import Attention
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec, replace_as

from rkv_vllm.config import CONFIG_KEY, KVCompressionConfig
from rkv_vllm.fit.overrides import check_overrides, overrides
from rkv_vllm.log import init_logger
from rkv_vllm.scheduling.directive import STEP_PLAN_ATTRIBUTE, EvictionDirective, StepPlan
from rkv_vllm.scheduling.spec import CompressedAttentionSpec
from rkv_vllm.worker.attention_hook import observe_queries
from rkv_vllm.worker.cache_views import view_caches
from rkv_vllm.worker.flush import Compactor
from rkv_vllm.worker.query_ring import QueryRing

logger = init_logger(__name__)

_FINISHED_REPORTS = 256


def compression_runner(base: type, use_v2: bool) -> type["CompressionRunner"]:
    """The subclass of one of vLLM's model runners that records queries and compacts its cache.

    Args:
        base: a model runner of vLLM.
        use_v2: whether that is a V2 runner.
    """
    # Imported here: V2 needs Triton, which a CPU build of vLLM may lack.
    if use_v2:
        from rkv_vllm.worker.runner_v2 import CompressionRunnerV2 as Compression
    else:
        from rkv_vllm.worker.runner_v1 import CompressionRunnerV1 as Compression
    check_overrides()
    name = f"Compression{base.__name__}"
    return type(name, (Compression, base), {"__module__": Compression.__module__})


class CompressionRunner(ABC):
    """A vLLM model runner that records queries and compacts the cache; to be mixed in first."""

    compactor: Compactor | None
    query_ring: QueryRing

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # None while there is no cache: vLLM profiles with dummy batches first.
        self.compactor = None
        self.compression = KVCompressionConfig.from_dict(
            self.vllm_config.additional_config[CONFIG_KEY]
        )
        self.finished_reports: deque[dict[str, int | str]] = deque(maxlen=_FINISHED_REPORTS)
        self._logged_at = time.monotonic()

    @overrides(
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner.get_kv_cache_spec",
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.get_kv_cache_spec",
    )
    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Ask for our block manager; refuse layers it cannot manage."""
        specs = super().get_kv_cache_spec()
        for name, spec in specs.items():
            windowed = type(spec) is FullAttentionSpec and (
                spec.sliding_window is not None or spec.attention_chunk_size is not None
            )
            if type(spec) is not FullAttentionSpec or windowed:
                raise ValueError(
                    f"KV cache compression supports full attention only, got layer {name} with "
                    f"{spec}; serve this model without --kv-compression"
                )
        return {name: replace_as(spec, CompressedAttentionSpec) for name, spec in specs.items()}

    @overrides(
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner.load_model",
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.load_model",
    )
    def load_model(self, *args, **kwargs) -> None:
        """Load the model, then make its attention layers record queries.

        The observation pool is allocated here, where vLLM's memory profiling counts it.
        """
        super().load_model(*args, **kwargs)
        layers = self._attention_layers()
        shared = [name for name, layer in layers.items() if layer.kv_sharing_target_layer_name]
        if shared:
            raise ValueError(
                "KV cache compression does not support layers that share another layer's cache, "
                f"got {shared}; serve this model without --kv-compression"
            )
        shapes = {(layer.num_heads, layer.head_size) for layer in layers.values()}
        if len(shapes) != 1:
            raise ValueError(
                "KV cache compression expected the same (query heads, head size) in all layers, "
                f"got {sorted(shapes)}; serve this model without --kv-compression"
            )
        self.query_ring = self._allocate_pool(len(layers), *shapes.pop())
        for layer_idx, layer in enumerate(layers.values()):
            observe_queries(layer, layer_idx, self.query_ring)

    @overrides(
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner.initialize_kv_cache",
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.initialize_kv_cache",
    )
    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, is_profiling: bool = False, **kwargs
    ) -> None:
        """Allocate the cache, then view it and make slots follow physical positions."""
        # Views would keep an older cache alive beside the new one.
        self.compactor = None
        super().initialize_kv_cache(kv_cache_config, is_profiling, **kwargs)
        self._follow_physical_positions()
        if is_profiling:
            # A small cache on which vLLM measures captured graphs, and throws away.
            return
        block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        views = view_caches(self._attention_layers(), block_size)
        self.compactor = Compactor(self.compression, views, self.query_ring)

    # A flush writes to caches that vLLM may have allocated in inference mode.
    @overrides(
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner.execute_model",
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model",
    )
    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput, *args, **kwargs):
        """Flush what the last step left, then run this step."""
        self.flush_compaction()
        self._admit_and_forget(scheduler_output)
        # Outputs that do not come from our scheduler (warm-up, dummy batches) carry no plan.
        plan: StepPlan | None = getattr(scheduler_output, STEP_PLAN_ATTRIBUTE, None)
        if plan is not None:
            self.compactor.begin_step(plan)
        self._watched = {} if plan is None else plan.watched
        try:
            return super().execute_model(scheduler_output, *args, **kwargs)
        finally:
            self._end_step()
            self._log_progress()

    @torch.inference_mode()
    def flush_compaction(self) -> None:
        """Compact what the last step's plan named and exchange the rows of those requests."""
        if self.compactor is not None and (directives := self.compactor.flush()):
            self._exchange_rows(directives)

    def request_reports(self) -> list[dict[str, int | str]]:
        """One report per live request, and per request of the last few that finished."""
        self.flush_compaction()
        return [*self.finished_reports, *map(self._report, self._live_ids())]

    @abstractmethod
    def _follow_physical_positions(self) -> None:
        """Exchange the class of the block tables, which are made anew with each cache."""

    @abstractmethod
    def _exchange_rows(self, directives: list[EvictionDirective]) -> None:
        """Give requests their new blocks, except those that left since."""

    @abstractmethod
    def _live_ids(self) -> list[str]:
        """The requests of which this runner keeps a state."""

    @abstractmethod
    def _lengths(self, req_id: str) -> tuple[int, int, int]:
        """Prompt tokens, output tokens and blocks held of a live request."""

    def _end_step(self) -> None:
        self.query_ring.unwatch()

    def _admit_and_forget(self, scheduler_output: SchedulerOutput) -> None:
        live = set(self._live_ids()) if scheduler_output.finished_req_ids else set()
        for req_id in scheduler_output.finished_req_ids:
            if req_id in live:
                self.finished_reports.append(self._report(req_id))
            self.compactor.forget(req_id)
        # V2 gets resumed requests as new ones.
        for new_request in scheduler_output.scheduled_new_reqs:
            self.compactor.readmit(new_request.req_id)
        for req_id in scheduler_output.scheduled_cached_reqs.resumed_req_ids:
            self.compactor.readmit(req_id)

    def _allocate_pool(self, num_layers: int, num_heads: int, head_size: int) -> QueryRing:
        slots = self.compression.observation_slots
        ring_len = self.compression.window + self.vllm_config.max_concurrent_batches
        try:
            return QueryRing(
                num_slots=slots,
                num_layers=num_layers,
                ring_len=ring_len,
                num_heads=num_heads,
                head_size=head_size,
                max_num_tokens=self.max_num_tokens,
                dtype=self.dtype,
                device=self.device,
            )
        except torch.OutOfMemoryError as error:
            size = slots * num_layers * ring_len * num_heads * head_size * self.dtype.itemsize
            raise ValueError(
                f"--kv-observation-slots {slots} needs {size / 2**20:.0f} MiB on {self.device}, "
                "which does not hold that beside the model; lower it"
            ) from error

    def _report(self, req_id: str) -> dict[str, int | str]:
        prompt_tokens, output_tokens, blocks_held = self._lengths(req_id)
        logical_len = prompt_tokens + output_tokens
        num_evicted = self.compactor.num_evicted(req_id)
        return {
            "req_id": req_id,
            "prompt_tokens": prompt_tokens,
            "output_tokens": output_tokens,
            "logical_len": logical_len,
            "physical_len": logical_len - num_evicted,
            "compactions": self.compactor.num_compactions(req_id),
            "evicted_tokens": num_evicted,
            "blocks_held": blocks_held,
            "block_size": self.cache_config.block_size,
        }

    def _attention_layers(self) -> dict[str, Attention]:
        context = self.compilation_config.static_forward_context
        return {name: layer for name, layer in context.items() if isinstance(layer, Attention)}

    def _log_progress(self) -> None:
        """One INFO line per logging interval while steps run."""
        now = time.monotonic()
        if self.compactor is None or now - self._logged_at < envs.VLLM_LOG_STATS_INTERVAL:
            return
        self._logged_at = now
        stats = self.compactor.stats()
        reports = list(map(self._report, self._live_ids()))
        logger.info(
            "KV compression: %d compactions so far, %d tokens evicted, %d blocks freed, "
            "%d deferred; %d requests hold %d of %d tokens",
            stats["compactions"],
            stats["evicted_tokens"],
            stats["freed_blocks"],
            stats["deferred"],
            len(reports),
            sum(report["physical_len"] for report in reports),
            sum(report["logical_len"] for report in reports),
        )
