"""What the model runners with compression have in common.

Everything vLLM computes stays logical except what attention sees: slots and sequence lengths. How
those become physical differs between vLLM's two runners: runner_v1.py and runner_v2.py. When a
flush runs, who records queries and what is reported does not, and stands here. Next: flush.py
for the flush, attention_hook.py for the queries.
"""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection
from typing import Any

import torch
from vllm import envs
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    iter_layer_specs,
)

from rkv_vllm.cache_owners import owners_of_readers
from rkv_vllm.fit.overrides import check_overrides, overrides
from rkv_vllm.layer_budgets import METHOD, budgets_of_layers
from rkv_vllm.log import init_logger
from rkv_vllm.methods import get_method
from rkv_vllm.methods.base import Method
from rkv_vllm.options import CONFIG_KEY, ServerOptions
from rkv_vllm.scheduling.directive import STEP_PLAN_ATTRIBUTE, EvictionDirective, StepPlan
from rkv_vllm.scheduling.host_room import host_room, ring_len
from rkv_vllm.scheduling.spec import CompressedAttentionSpec, compressed_spec
from rkv_vllm.worker.attention_group import attend_to_physical_lengths
from rkv_vllm.worker.attention_hook import observe_queries, query_size
from rkv_vllm.worker.flush import SCRATCH_BYTES, Compactor
from rkv_vllm.worker.group import CompressedGroup
from rkv_vllm.worker.host_cache import HostCache
from rkv_vllm.worker.latent_set import make_latent_sets
from rkv_vllm.worker.layer_set import LayerSet, make_layer_sets
from rkv_vllm.worker.lengths import GroupRows
from rkv_vllm.worker.query_ring import RingMemory
from rkv_vllm.worker.shared_caches import share_caches

logger = init_logger(__name__)

_FINISHED_REPORTS = 256

# Layers beside the compressed ones; linear attention and short convolutions keep a state as well.
_KEPT_SPECS = (SlidingWindowSpec, ChunkedLocalAttentionSpec, MambaSpec)


def compression_runner(mixin: type["CompressionRunner"], base: type) -> type["CompressionRunner"]:
    """The subclass of one of vLLM's model runners that records queries and compacts its cache.

    Args:
        mixin: what compression adds to runners of that kind.
        base: a model runner of vLLM.

    Raises:
        ValueError: a vLLM function is not what ours was written against.
    """
    check_overrides()
    return type(f"Compression{base.__name__}", (mixin, base), {"__module__": mixin.__module__})


class CompressionRunner(ABC):
    """A vLLM model runner that records queries and compacts the cache; to be mixed in first."""

    compactor: Compactor | None

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # None while there is no cache: vLLM profiles with dummy batches first.
        self.compactor = None
        # By KV-cache group; empty while there is no cache.
        self.rows: dict[int, GroupRows] = {}
        self.compression = ServerOptions.from_dict(self.vllm_config.additional_config[CONFIG_KEY])
        self._method = get_method(self.compression.method)
        self._ring_memory: RingMemory | None = None
        self._host_cache: HostCache | None = None
        self.finished_reports: deque[dict[str, int | str]] = deque(maxlen=_FINISHED_REPORTS)
        self._logged_at = time.monotonic()

    @overrides(
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner.get_kv_cache_spec",
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.get_kv_cache_spec",
    )
    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Ask for our block manager for the layers that can be compressed.

        Raises:
            ValueError: a layer of a kind that is not known, or none that can be compressed.
        """
        specs = super().get_kv_cache_spec()
        for name, spec in specs.items():
            if not _is_compressed(spec) and type(spec) not in _KEPT_SPECS:
                raise ValueError(
                    f"KV cache compression knows layers of full attention, and leaves those with "
                    f"a window, chunks or a state as they are, got layer {name} with {spec}; serve "
                    "this model without --kv-compression"
                )
        compressed = [name for name, spec in specs.items() if _is_compressed(spec)]
        # A pipeline stage may have layers of other kinds only.
        if not compressed and self.parallel_config.pipeline_parallel_size == 1:
            raise ValueError(
                f"KV cache compression found no layer of full attention among {list(specs)}; serve "
                "this model without --kv-compression"
            )
        has_others = len(compressed) < len(specs)
        context = self.compilation_config.static_forward_context
        # Layers of a draft model stand beside the target's, with the budget of the server.
        drafting = [name for name in compressed if context[name].is_draft_layer]
        targets = [name for name in compressed if not context[name].is_draft_layer]
        budgets = self._layer_budgets(targets, has_others)
        budgets |= dict.fromkeys(drafting, self.compression.budget)
        for name, budget in budgets.items():
            layer_budget = None if budget == self.compression.budget else budget
            specs[name] = compressed_spec(specs[name], layer_budget)
        return specs

    def _layer_budgets(self, names: list[str], has_others: bool) -> dict[str, int]:
        """What each compressed layer of this rank keeps.

        Args:
            names: the layers, in the model's order.
            has_others: whether there are layers that are not compressed.

        Raises:
            ValueError: unequal budgets where a rank cannot tell which layers it has.
        """
        num_stages = self.parallel_config.pipeline_parallel_size
        num_layers = len(names)
        if num_stages > 1:
            num_layers = self.model_config.get_total_num_hidden_layers()
        options = self.compression
        if options.layer_budgets == METHOD:
            budgets = self._method.layer_budgets(options.method_options, options.budget, num_layers)
        else:
            budgets = budgets_of_layers(
                options.layer_budgets,
                self.model_config.model,
                num_layers,
                options.budget,
                options.window,
            )
        if len(budgets) != num_layers or min(budgets) <= self.compression.window:
            raise ValueError(
                f"{self._method.__name__}.layer_budgets: got {list(budgets)}, wanted {num_layers} "
                f"numbers of tokens above --kv-window {self.compression.window}; raise --kv-budget"
            )
        if len(set(budgets)) == 1:
            return dict.fromkeys(names, budgets[0])
        if num_stages == 1:
            return dict(zip(names, budgets, strict=True))
        if has_others:
            raise ValueError(
                f"{self._method.__name__} gives layers unequal budgets: got "
                f"--pipeline-parallel-size {num_stages}, wanted 1 for a model that has layers of "
                "other kinds as well; use tensor parallelism"
            )
        return {name: budgets[extract_layer_index(name)] for name in names}

    @overrides(
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner.load_model",
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.load_model",
    )
    def load_model(self, *args, **kwargs) -> None:
        """Load the model, let layers share caches, and make the compressed ones record queries.

        The query ring is allocated here, where vLLM's memory profiling counts it.

        Raises:
            ValueError: the attention backend is not what ours was written against.
        """
        super().load_model(*args, **kwargs)
        # vLLM imports an attention backend when a model asks for it.
        check_overrides()
        share_caches(self._compressed_layers(), self._owners_of_readers())
        layers = self._compressed_layers()
        if self._method.need(self.compression.method_options).queries:
            self._ring_memory = self._allocate_rings(layers)
            for layer in layers.values():
                observe_queries(layer)

    def _owners_of_readers(self) -> dict[int, int]:
        model = self.model_config
        return owners_of_readers(
            self.compression.share_layers, model.model, model.get_total_num_hidden_layers()
        )

    @overrides(
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner.profile_run",
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.profile_run",
    )
    @torch.inference_mode()
    def profile_run(self, *args, **kwargs) -> None:
        """Profile a forward, and the temporaries of a flush, which come in its place."""
        super().profile_run(*args, **kwargs)
        torch.empty(SCRATCH_BYTES, dtype=torch.uint8, device=self.device)

    @overrides(
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner.initialize_kv_cache",
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.initialize_kv_cache",
    )
    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, is_profiling: bool = False, *args, **kwargs
    ) -> None:
        """Allocate the cache, then view it and make slots and lengths follow physical positions."""
        # Views would keep an older cache alive beside the new one.
        self.compactor = self._host_cache = None
        super().initialize_kv_cache(kv_cache_config, is_profiling, *args, **kwargs)
        block_sizes = {
            group_id: group.kv_cache_spec.block_size
            for group_id, group in enumerate(self.kv_cache_config.kv_cache_groups)
            if _is_compressed(next(iter(iter_layer_specs(group.kv_cache_spec))))
        }
        self.rows = {
            group_id: GroupRows(self.max_num_reqs, self.max_num_tokens, self._ring_len, self.device)
            for group_id in block_sizes
        }
        for group_id, rows in self.rows.items():
            attend_to_physical_lengths(self.attn_groups[group_id], rows)
        self._follow_physical_positions()
        if self._ring_memory is not None:
            self._ring_memory.take_back()
        groups = {
            group_id: CompressedGroup(
                group_id, block_size, self._view_layers(group_id, block_size), self._make_method
            )
            for group_id, block_size in block_sizes.items()
        }
        # Profiling has a small cache on which vLLM measures captured graphs, and throws away.
        if not is_profiling:
            self.compactor = Compactor(groups, self.compression.window)
            self._host_cache = self._make_host_cache(groups)

    def _make_host_cache(self, groups: dict[int, CompressedGroup]) -> HostCache | None:
        # Nothing is swapped beside layers of other kinds.
        if not self.compression.swap_space or len(groups) < len(
            self.kv_cache_config.kv_cache_groups
        ):
            return None
        records_queries = self._ring_memory is not None
        room = host_room(self.compression, self.vllm_config, self.kv_cache_config, records_queries)
        return HostCache(groups, room, self.device)

    def _view_layers(self, group_id: int, block_size: int) -> list[LayerSet]:
        layers, rows = self._compressed_layers(group_id), self.rows[group_id]
        memory, window = self._ring_memory, self.compression.window
        if self.model_config.use_mla:
            return make_latent_sets(layers, block_size, rows, memory, window)
        tp_size = self.parallel_config.tensor_parallel_size
        # Ranks beyond the number of KV heads hold copies.
        copies = max(1, tp_size // self.model_config.get_total_num_kv_heads())
        kv_shard = get_tp_group().rank_in_group // copies
        return make_layer_sets(layers, block_size, rows, memory, kv_shard, window)

    def _make_method(self, layer_set: LayerSet, options: Any | None) -> Method:
        own = self.compression.method_options if options is None else options
        return self._method(own, layer_set.model, layer_set.ops)

    # A flush writes to caches that vLLM may have allocated in inference mode.
    @overrides(
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner.execute_model",
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model",
    )
    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput, *args, **kwargs):
        """Flush what the last step left, then run this step."""
        # Outputs that do not come from our scheduler (warm-up, dummy batches) carry no plan.
        plan: StepPlan | None = getattr(scheduler_output, STEP_PLAN_ATTRIBUTE, None)
        saved = () if plan is None else {directive.req_id for directive in plan.saved}
        left = set(scheduler_output.preempted_req_ids or ()).difference(saved)
        self.flush_compaction({*scheduler_output.finished_req_ids, *left})
        if saved:
            self._host_cache.save(plan.saved)
        self._admit_and_forget(scheduler_output, is_warm_up=plan is None)
        if plan is not None:
            self.compactor.begin_step(plan)
            if plan.restored:
                self._host_cache.restore(plan.restored)
        self._watched = {} if plan is None else plan.watched
        try:
            return super().execute_model(scheduler_output, *args, **kwargs)
        finally:
            self._end_step()
            self._log_progress()

    @torch.inference_mode()
    def flush_compaction(self, gone: Collection[str] = ()) -> None:
        """Compact what the last step's plan named and exchange the rows of those requests.

        Args:
            gone: requests that finished or were preempted since.
        """
        if self.compactor is not None and (directives := self.compactor.flush(gone)):
            self._exchange_rows(directives)

    def forget_windows(self) -> None:
        """Forget the recorded queries: a deep sleep has discarded the memory of the model."""
        for rows in self.rows.values():
            rows.end_step()
        if self._ring_memory is not None:
            self._ring_memory.elements.zero_()

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
        """Prompt tokens, output tokens and blocks held in compressed groups of a live request."""

    def _end_step(self) -> None:
        for rows in self.rows.values():
            rows.end_step()

    def _admit_and_forget(self, scheduler_output: SchedulerOutput, is_warm_up: bool) -> None:
        live = set(self._live_ids()) if scheduler_output.finished_req_ids else set()
        for req_id in scheduler_output.finished_req_ids:
            if req_id in live and not is_warm_up:
                self.finished_reports.append(self._report(req_id))
            self.compactor.forget(req_id)
        # V2 gets resumed requests as new ones.
        for new_request in scheduler_output.scheduled_new_reqs:
            self.compactor.readmit(new_request.req_id)
        for req_id in scheduler_output.scheduled_cached_reqs.resumed_req_ids:
            self.compactor.readmit(req_id)

    @property
    def _ring_len(self) -> int:
        return ring_len(self.vllm_config, self.compression.window)

    def _allocate_rings(self, layers: dict[str, Attention]) -> RingMemory:
        options = self.compression
        seats = options.seats + options.prompt_seats(self.max_num_tokens)
        ring_len = self._ring_len
        position_size = sum(layer.num_heads * query_size(layer) for layer in layers.values())
        try:
            return RingMemory(seats, ring_len, position_size, self.dtype, self.device)
        except torch.OutOfMemoryError as error:
            size = seats * ring_len * position_size * self.dtype.itemsize
            raise ValueError(
                f"--kv-seats {options.seats} needs {size / 2**20:.0f} MiB on {self.device}, "
                "which does not hold that beside the model; lower it"
            ) from error

    def _report(self, req_id: str) -> dict[str, int | str]:
        """Lengths of one request; of several groups the longest cache, and the sum of blocks."""
        prompt_tokens, output_tokens, blocks_held = self._lengths(req_id)
        logical_len = prompt_tokens + output_tokens
        num_evicted = min(g.num_evicted(req_id) for g in self.compactor.groups.values())
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

    def _compressed_layers(self, group_id: int | None = None) -> dict[str, Attention]:
        """The layers that own a compressed cache, in the model's order, of one group or of all."""
        names = {name for name, spec in self.get_kv_cache_spec().items() if _is_compressed(spec)}
        if group_id is not None:
            names &= set(self.kv_cache_config.kv_cache_groups[group_id].layer_names)
        context = self.compilation_config.static_forward_context
        return {name: layer for name, layer in context.items() if name in names}

    def _log_progress(self) -> None:
        """One INFO line per logging interval while steps run."""
        now = time.monotonic()
        if self.compactor is None or now - self._logged_at < envs.VLLM_LOG_STATS_INTERVAL:
            return
        # All ranks count the same; an earlier pipeline stage learns a token with the next step.
        if not (get_tp_group().is_first_rank and get_pp_group().is_last_rank):
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


def _is_compressed(spec: KVCacheSpec) -> bool:
    if isinstance(spec, CompressedAttentionSpec):
        return True
    if type(spec) is MLAAttentionSpec:
        return True
    return (
        type(spec) is FullAttentionSpec
        and spec.sliding_window is None
        and spec.attention_chunk_size is None
    )
