"""vLLM's V1 model runner with compaction: where lengths become physical, and when a flush runs.

Everything vLLM computes stays logical except two things that attention sees: the slot mapping
(block_table_v1.py) and `seq_lens`. Rows move inside V1's batch, so all state is keyed by request.
Next: compactor.py for the flush, attention_hook.py for the queries.
"""

import time
from collections import deque

import numpy as np
import torch
from vllm import envs
from vllm.model_executor.layers.attention import Attention
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec, replace_as
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from rkv_vllm.config import CONFIG_KEY, KVCompressionConfig
from rkv_vllm.log import init_logger
from rkv_vllm.scheduling.directive import STEP_PLAN_ATTRIBUTE, EvictionDirective, StepPlan
from rkv_vllm.scheduling.spec import CompressedAttentionSpec
from rkv_vllm.worker.attention_hook import observe_queries
from rkv_vllm.worker.block_table_v1 import PhysicalBlockTable
from rkv_vllm.worker.cache_views import cpu_attn_views
from rkv_vllm.worker.compactor import Compactor
from rkv_vllm.worker.observation import ObservationPool

logger = init_logger(__name__)

_FINISHED_REPORTS = 256


class CompressionCPURunner(CPUModelRunner):
    """CPUModelRunner that records queries and compacts the cache.

    Instances are made by exchanging the class of a constructed CPUModelRunner (cpu_worker.py).
    """

    compactor: Compactor
    observation_pool: ObservationPool

    def init_compression(self) -> None:
        """Set up what `__init__` would, had vLLM constructed this class."""
        self.compression = KVCompressionConfig.from_dict(
            self.vllm_config.additional_config[CONFIG_KEY]
        )
        self.finished_reports: deque[dict[str, int | str]] = deque(maxlen=_FINISHED_REPORTS)
        self._logged_at = time.monotonic()

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
        if self.shared_kv_cache_layers:
            raise ValueError(
                "KV cache compression does not support layers that share another layer's cache, "
                f"got {self.shared_kv_cache_layers}; serve this model without --kv-compression"
            )
        return {name: replace_as(spec, CompressedAttentionSpec) for name, spec in specs.items()}

    def load_model(self, load_dummy_weights: bool = False) -> None:
        """Load the model, then make its attention layers record queries.

        The observation pool is allocated here, where vLLM's memory profiling counts it.
        """
        super().load_model(load_dummy_weights)
        layers = self._attention_layers()
        shapes = {(layer.num_heads, layer.head_size) for layer in layers.values()}
        if len(shapes) != 1:
            raise ValueError(
                "KV cache compression expected the same (query heads, head size) in all layers, "
                f"got {sorted(shapes)}; serve this model without --kv-compression"
            )
        num_heads, head_size = shapes.pop()
        self.observation_pool = ObservationPool(
            num_slots=self.compression.observation_slots,
            num_layers=len(layers),
            ring_len=self.compression.window + self.vllm_config.max_concurrent_batches,
            num_heads=num_heads,
            head_size=head_size,
            dtype=self.dtype,
            device=self.device,
        )
        for layer_idx, layer in enumerate(layers.values()):
            observe_queries(layer, layer_idx, self.observation_pool)

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, *args, **kwargs) -> None:
        """Allocate the cache, then view it and make slots follow physical positions."""
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        self.input_batch.block_table.__class__ = PhysicalBlockTable
        views = cpu_attn_views(self._attention_layers())
        self.compactor = Compactor(self.compression, views, self.observation_pool)

    def execute_model(self, scheduler_output: SchedulerOutput, *args, **kwargs):
        """Flush what the last step left, then run this step."""
        self.flush_compaction()
        # Outputs that do not come from our scheduler (warm-up) carry no plan.
        plan = getattr(scheduler_output, STEP_PLAN_ATTRIBUTE, None) or StepPlan()
        self._admit_and_forget(scheduler_output)
        self.compactor.begin_step(plan)
        self._watched = plan.watched
        try:
            return super().execute_model(scheduler_output, *args, **kwargs)
        finally:
            self.observation_pool.unwatch()
            self._log_progress()

    def flush_compaction(self) -> None:
        """Compact what the last step's plan named and exchange the rows of those requests."""
        for directive in self.compactor.flush():
            self._exchange_row(directive)

    def request_reports(self) -> list[dict[str, int | str]]:
        """One report per live request, and per request of the last few that finished."""
        self.flush_compaction()
        live = [self._report(req_id) for req_id in self.requests]
        return [*self.finished_reports, *live]

    def _prepare_inputs(self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray):
        num_reqs = self.input_batch.num_reqs
        evicted = [self.compactor.num_evicted(req_id) for req_id in self.input_batch.req_ids]
        block_table = self.input_batch.block_table
        block_table.num_evicted = torch.tensor(evicted) if any(evicted) else None
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        if block_table.num_evicted is not None:
            # Read by attention only: positions, sampling and prefill masks are made already.
            num_evicted = block_table.num_evicted.to(torch.int32)
            self.seq_lens[:num_reqs] -= num_evicted
            self.optimistic_seq_lens_cpu[:num_reqs] -= num_evicted
        self._watch_rows(num_scheduled_tokens)
        return prepared

    def _watch_rows(self, num_scheduled_tokens: np.ndarray) -> None:
        rows = []
        for req_id, slot in self._watched.items():
            row = self.input_batch.req_id_to_index[req_id]
            first_token = int(self.query_start_loc.np[row])
            first_position = int(self.input_batch.num_computed_tokens_cpu[row])
            rows.append((slot, first_token, int(num_scheduled_tokens[row]), first_position))
        self.observation_pool.watch(rows)

    def _exchange_row(self, directive: EvictionDirective) -> None:
        """Give the request its new blocks, unless it left since."""
        state = self.requests.get(directive.req_id)
        if state is None:
            return
        state.block_ids = (list(directive.new_block_ids),)
        row = self.input_batch.req_id_to_index.get(directive.req_id)
        if row is not None:
            self.input_batch.block_table.add_row(state.block_ids, row)

    def _admit_and_forget(self, scheduler_output: SchedulerOutput) -> None:
        for req_id in scheduler_output.finished_req_ids:
            if req_id in self.requests:
                self.finished_reports.append(self._report(req_id))
            self.compactor.forget(req_id)
        for new_request in scheduler_output.scheduled_new_reqs:
            self.compactor.forget(new_request.req_id)
        for req_id in scheduler_output.scheduled_cached_reqs.resumed_req_ids:
            self.compactor.readmit(req_id)

    def _report(self, req_id: str) -> dict[str, int | str]:
        state = self.requests[req_id]
        num_evicted = self.compactor.num_evicted(req_id)
        return {
            "req_id": req_id,
            "prompt_tokens": state.num_prompt_tokens,
            "output_tokens": len(state.output_token_ids),
            "logical_len": state.num_tokens,
            "physical_len": state.num_tokens - num_evicted,
            "compactions": self.compactor.num_compactions(req_id),
            "evicted_tokens": num_evicted,
            "blocks_held": len(state.block_ids[0]),
            "block_size": self.cache_config.block_size,
        }

    def _attention_layers(self) -> dict[str, Attention]:
        context = self.compilation_config.static_forward_context
        return {name: layer for name, layer in context.items() if isinstance(layer, Attention)}

    def _log_progress(self) -> None:
        """One INFO line per logging interval while steps run."""
        now = time.monotonic()
        if now - self._logged_at < envs.VLLM_LOG_STATS_INTERVAL:
            return
        self._logged_at = now
        stats = self.compactor.stats()
        logical = sum(self.requests[req_id].num_tokens for req_id in self.input_batch.req_ids)
        evicted = sum(self.compactor.num_evicted(req_id) for req_id in self.input_batch.req_ids)
        logger.info(
            "KV compression: %d compactions so far, %d tokens evicted, %d blocks freed, "
            "%d deferred; running requests hold %d of %d tokens",
            stats["compactions"],
            stats["evicted_tokens"],
            stats["freed_blocks"],
            stats["deferred"],
            logical - evicted,
            logical,
        )
