"""Carries out the scheduler's directives on the cache: score, select, compact.

Shared by all model runners. Knows the method, the observation pool, the cache views and the
counters; knows neither vLLM's batch nor its rows: a runner calls `flush` before anything of the
next step and updates its own rows with what comes back. Next: runner_v1.py.
"""

from dataclasses import asdict, dataclass

import torch

from rkv_vllm.config import KVCompressionConfig
from rkv_vllm.kernels import native
from rkv_vllm.kernels.compact import compact
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.log import init_logger
from rkv_vllm.methods import get_method
from rkv_vllm.methods.base import NonFiniteScoreError
from rkv_vllm.scheduling.directive import EvictionDirective, StepPlan
from rkv_vllm.worker.cache_views import CacheViews
from rkv_vllm.worker.observation import ObservationPool

logger = init_logger(__name__)

# Elements of keys in one chunk of layers: 64 Mi, so 256 MiB in float32 where torch needs a dense
# copy. A 32-layer model with 8 heads of 128 is compacted at once up to 2K tokens; above that each
# chunk still holds enough heads for all threads.
_MAX_DENSE_ELEMENTS = 64 << 20


@dataclass(slots=True)
class CompactionStats:
    """What this worker has done since it started.

    Attributes:
        compactions: directives carried out.
        evicted_tokens: tokens evicted, per layer and head.
        freed_blocks: blocks that requests hold less of right after their compactions.
        deferred: compactions that had to wait for a slot or for blocks.
        requests_compacted: requests compacted at least once.
        free_blocks: blocks in the pool's free queue after the last scheduled step.
        total_blocks: blocks of the pool.
    """

    compactions: int = 0
    evicted_tokens: int = 0
    freed_blocks: int = 0
    deferred: int = 0
    requests_compacted: int = 0
    free_blocks: int = 0
    total_blocks: int = 0


class Compactor:
    """Evicts and compacts the requests that the scheduler names."""

    def __init__(
        self, config: KVCompressionConfig, views: CacheViews, pool: ObservationPool
    ) -> None:
        self._config = config
        self._method = get_method(config.method).from_config(config)
        self._views = views
        self._pool = pool
        self._pending: list[EvictionDirective] = []
        self._num_evicted: dict[str, int] = {}
        self._compactions: dict[str, int] = {}
        self._stats = CompactionStats()
        if not native.is_available(views.keys):
            logger.warning(
                "The C++ kernels are not built or do not take this cache: compaction runs in "
                "torch, which is slower; reinstall rkv-vllm where a C++ compiler is found"
            )

    def num_evicted(self, req_id: str) -> int:
        """Tokens this request's cache is shorter than its text."""
        return self._num_evicted.get(req_id, 0)

    def num_compactions(self, req_id: str) -> int:
        """Compactions of a live request, those before a preemption included."""
        return self._compactions.get(req_id, 0)

    def stats(self) -> dict[str, int]:
        """The counters as plain integers."""
        return asdict(self._stats)

    def readmit(self, req_id: str) -> None:
        """The request starts from zero: physical = logical."""
        self._num_evicted.pop(req_id, None)

    def forget(self, req_id: str) -> None:
        """The request is gone."""
        self._num_evicted.pop(req_id, None)
        self._compactions.pop(req_id, None)

    def begin_step(self, plan: StepPlan) -> None:
        """Take over the plan of a step that is about to run; its directives wait for `flush`."""
        self._pending = plan.directives
        self._stats.deferred += plan.num_deferred
        self._stats.free_blocks = plan.num_free_blocks
        self._stats.total_blocks = plan.num_total_blocks

    def flush(self) -> list[EvictionDirective]:
        """Carry out what the last step left, before anything of the next one.

        Returns:
            The directives carried out; the runner exchanges the rows of those requests.

        Raises:
            RuntimeError: a score is NaN or infinite; names the request and the layer.
        """
        pending, self._pending = self._pending, []
        for directive in pending:
            self._compact(directive)
            self._count(directive)
        return pending

    def _compact(self, directive: EvictionDirective) -> None:
        all_keys, all_values = self._views.keys, self._views.values
        old = torch.tensor(directive.old_block_ids)
        new = torch.tensor(directive.new_block_ids)
        per_layer = all_keys.num_heads * all_keys.head_size * directive.total_len
        step = max(1, _MAX_DENSE_ELEMENTS // per_layer)
        for first in range(0, all_keys.num_layers, step):
            layers = slice(first, min(first + step, all_keys.num_layers))
            keys, values = all_keys.layers(layers), all_values.layers(layers)
            keep = self._select(directive, old, keys, values, layers)
            for states in (keys, values):
                compact(states, old, new, keep, directive.settled_len, directive.total_len)

    def _select(
        self,
        directive: EvictionDirective,
        block_ids: torch.Tensor,
        keys: PagedStates,
        values: PagedStates,
        layers: slice,
    ) -> torch.Tensor:
        """The kept positions, int64 [num_layers * num_kv_heads, budget]."""
        queries = self._pool.window(
            directive.slot, directive.settled_logical_len, self._config.window, layers
        )
        try:
            keep = self._method.keep_paged(
                keys,
                values,
                block_ids,
                directive.settled_len,
                queries.flatten(0, 1),
                self._config.budget,
            )
        except NonFiniteScoreError as error:
            layer = self._views.layer_names[layers.start + error.head // keys.num_heads]
            raise RuntimeError(
                f"{self._config.method}: score of request {directive.req_id} in layer {layer}, "
                f"KV head {error.head % keys.num_heads}, is not finite; the model's keys or "
                "queries overflow in this dtype"
            ) from error
        expected = (keys.num_layers * keys.num_heads, self._config.budget)
        if keep.shape != expected:
            raise RuntimeError(
                f"{self._config.method}: keep_indices returned {tuple(keep.shape)}, "
                f"expected {expected}"
            )
        return keep

    def _count(self, directive: EvictionDirective) -> None:
        req_id = directive.req_id
        self._num_evicted[req_id] = directive.num_evicted_before + directive.num_evict
        self._stats.requests_compacted += req_id not in self._compactions
        self._compactions[req_id] = self.num_compactions(req_id) + 1
        self._stats.compactions += 1
        self._stats.evicted_tokens += directive.num_evict
        self._stats.freed_blocks += directive.num_freed_blocks
