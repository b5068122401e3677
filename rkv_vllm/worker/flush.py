"""Carries out the scheduler's directives on the cache: score, select, compact.

Shared by all model runners. Knows the method, the observation pool, the cache views and the
counters; knows neither vLLM's batch nor its rows: a runner calls `flush` before anything of the
next step and updates its own rows with what comes back. Next: runner.py.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple, Protocol

import torch

from rkv_vllm.config import KVCompressionConfig
from rkv_vllm.kernels.compact import compact
from rkv_vllm.kernels.dispatch import backend
from rkv_vllm.kernels.eviction import ALL_FINITE, Eviction, EvictionBatch
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.log import init_logger
from rkv_vllm.methods import get_method
from rkv_vllm.methods.base import CompressionMethod, NonFiniteScoreError
from rkv_vllm.scheduling.directive import EvictionDirective, StepPlan
from rkv_vllm.worker.layer_set import LayerSet

logger = init_logger(__name__)

# Elements of keys in one call where torch may need a dense copy: 64 Mi, so 256 MiB in float32. A
# 32-layer model with 8 heads of 128 is compacted at once up to 2K tokens; above that each chunk of
# layers still holds enough heads for all threads.
_MAX_DENSE_ELEMENTS = 64 << 20

# Tokens, times heads, times layers, in one call of kernels that copy nothing: they keep about 28
# bytes of each, so 224 MiB of the memory that vLLM leaves free. That is 28 requests of 1152 tokens
# or one of 32K of a 32-layer model with 8 heads; longer ones go through in chunks of layers.
_MAX_SCORED_TOKENS = 8 << 20

# vLLM never hands it to a request.
_NULL_BLOCK = 0


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


class Choice(NamedTuple):
    """What a method chose in some layers of some requests; the cache has not moved yet.

    Attributes:
        directives: the requests.
        first_layer: index of the first of these layers among all compressed ones.
        keys: the cache of these layers.
        batch: the requests as the method saw them.
        queries: [slots, these layers, ring_len, query heads, head_size], the observed queries.
        keep: int32 [requests, these layers * KV heads, largest budget], physical positions.
    """

    directives: list[EvictionDirective]
    first_layer: int
    keys: PagedStates
    batch: EvictionBatch
    queries: torch.Tensor
    keep: torch.Tensor


class ChoiceObserver(Protocol):
    """Looks on while requests are compacted."""

    def chosen(self, choice: Choice, method: CompressionMethod) -> None:
        """Take note of a choice before the survivors move; must not write to any tensor of it."""


class Compactor:
    """Evicts and compacts the requests that the scheduler names.

    Attributes:
        observer: is shown every choice; None outside `rkv-vllm trace`.
    """

    observer: ChoiceObserver | None = None

    def __init__(self, config: KVCompressionConfig, layer_set: LayerSet) -> None:
        self._config = config
        self._method = get_method(config.method).from_config(config)
        self._views = layer_set
        self._pending: list[EvictionDirective] = []
        self._num_evicted: dict[str, int] = {}
        self._compactions: dict[str, int] = {}
        self._stats = CompactionStats()
        self._checks: deque[_Check] = deque()
        logger.info("Compaction kernels: %s", backend(layer_set.keys))

    def warm_up(self) -> None:
        """Compile what a flush launches, on the null block; without Triton there is nothing to do.

        Call it once, before the first request: compiling takes seconds.
        """
        if backend(self._views.keys) != "triton":
            return
        settled_len = self._config.window + 2
        row = [_NULL_BLOCK] * -(-settled_len // self._views.keys.block_size)
        self._carry_out([EvictionDirective("warm-up", 0, settled_len, settled_len, 1, 0, row, row)])
        # The null block may hold anything, NaN included.
        self._checks.clear()

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
            RuntimeError: a score is NaN or infinite; names the request and the layer. On a GPU it
                is one of an earlier flush: nothing here waits for the device.
        """
        self._raise_if_non_finite()
        pending, self._pending = self._pending, []
        for wave in _waves(pending):
            self._carry_out(wave)
        for directive in pending:
            self._count(directive)
        return pending

    def _carry_out(self, directives: list[EvictionDirective]) -> None:
        """Compact requests of which none writes what another one reads."""
        batch = EvictionBatch.of(
            [_eviction(directive) for directive in directives],
            self._config.window,
            self._views.keys.device,
        )
        for requests in self._groups(batch):
            group = batch.part(requests)
            step = self._num_layers_at_once(group)
            for first in range(0, self._views.keys.num_layers, step):
                self._compact(group, slice(first, first + step), directives[requests])

    def _compact(
        self, batch: EvictionBatch, layers: slice, directives: list[EvictionDirective]
    ) -> None:
        """Compact some layers of some requests."""
        keys, values = self._views.keys.layers(layers), self._views.values.layers(layers)
        if layers.start and keys.device.type != "cpu":
            # Heads are counted from the first of these layers, so the flags are theirs alone.
            batch = batch.part(slice(None), torch.full_like(batch.non_finite, ALL_FINITE))
        queries = self._views.ring.queries[:, layers]
        try:
            keep = self._method.keep_paged(keys, values, batch, queries)
        except NonFiniteScoreError as error:
            raise self._non_finite(directives[error.request], layers, error.head) from error
        if self.observer is not None:
            choice = Choice(directives, layers.start, keys, batch, queries, keep)
            self.observer.chosen(choice, self._method)
        for states in (keys, values):
            compact(states, batch, keep)
        if keys.device.type != "cpu":
            self._checks.append(_Check.start(batch.non_finite, directives, layers))

    def _groups(self, batch: EvictionBatch) -> Iterator[slice]:
        """Neighbours whose temporaries fit into memory together, at least one request each."""
        keys = self._views.keys
        limit = self._max_tokens() // (keys.num_layers * keys.num_heads)
        first, longest = 0, 0
        for i, eviction in enumerate(batch.evictions):
            longest = max(longest, eviction.total_len)
            if i > first and longest * (i + 1 - first) > limit:
                yield slice(first, i)
                first, longest = i, eviction.total_len
        yield slice(first, batch.num_requests)

    def _num_layers_at_once(self, batch: EvictionBatch) -> int:
        tokens = batch.num_requests * max(e.total_len for e in batch.evictions)
        return max(1, self._max_tokens() // (tokens * self._views.keys.num_heads))

    def _max_tokens(self) -> int:
        """Tokens, times heads, times layers, that one call may take."""
        copies = type(self._method).keep_paged is CompressionMethod.keep_paged
        if copies or backend(self._views.keys) != "triton":
            return _MAX_DENSE_ELEMENTS // self._views.keys.head_size
        return _MAX_SCORED_TOKENS

    def _raise_if_non_finite(self) -> None:
        """Examine the flags of earlier flushes that have arrived; waits for none."""
        while self._checks and self._checks[0].is_done():
            check = self._checks.popleft()
            for directive, head in zip(check.directives, check.flags.tolist(), strict=True):
                if head != ALL_FINITE:
                    raise self._non_finite(directive, check.layers, head)

    def _non_finite(self, directive: EvictionDirective, layers: slice, head: int) -> RuntimeError:
        num_heads = self._views.keys.num_heads
        layer = self._views.names[layers.start + head // num_heads]
        return RuntimeError(
            f"{self._config.method}: score of request {directive.req_id} in layer {layer}, "
            f"KV head {head % num_heads}, is not finite; the model's keys or queries overflow in "
            "this dtype"
        )

    def _count(self, directive: EvictionDirective) -> None:
        req_id = directive.req_id
        self._num_evicted[req_id] = directive.num_evicted_before + directive.num_evict
        self._stats.requests_compacted += req_id not in self._compactions
        self._compactions[req_id] = self.num_compactions(req_id) + 1
        self._stats.compactions += 1
        self._stats.evicted_tokens += directive.num_evict
        self._stats.freed_blocks += directive.num_freed_blocks


class _Check(NamedTuple):
    """Flags on their way from the device.

    Attributes:
        flags: int32 [requests], pinned; valid once `is_done`.
        is_done: whether the copy has arrived.
        directives: the requests.
        layers: the layers that the flags speak of.
    """

    flags: torch.Tensor
    is_done: Callable[[], bool]
    directives: list[EvictionDirective]
    layers: slice

    @classmethod
    def start(
        cls, non_finite: torch.Tensor, directives: list[EvictionDirective], layers: slice
    ) -> "_Check":
        """Queue the copy on the current stream, behind the kernels that write the flags."""
        flags = torch.empty(non_finite.shape, dtype=non_finite.dtype, pin_memory=True)
        flags.copy_(non_finite, non_blocking=True)
        event = torch.Event(non_finite.device)
        event.record()
        return cls(flags, event.query, directives, layers)


def _eviction(directive: EvictionDirective) -> Eviction:
    return Eviction(
        old_block_ids=directive.old_block_ids,
        new_block_ids=directive.new_block_ids,
        settled_len=directive.settled_len,
        total_len=directive.total_len,
        budget=directive.budget,
        slot=directive.slot,
        window_end=directive.settled_logical_len,
    )


def _waves(directives: list[EvictionDirective]) -> Iterator[list[EvictionDirective]]:
    """Cut the directives, in order, wherever one touches blocks that an earlier one still needs.

    The scheduler books one compaction after the other, so a block that the first gives back may be
    a fresh one of the next. The requests of a wave are compacted at the same time.
    """
    wave: list[EvictionDirective] = []
    read: set[int] = set()
    written: set[int] = set()
    for directive in directives:
        if not read.isdisjoint(directive.new_block_ids) or not written.isdisjoint(
            directive.old_block_ids
        ):
            yield wave
            wave, read, written = [], set(), set()
        wave.append(directive)
        read.update(directive.old_block_ids)
        written.update(directive.new_block_ids)
    if wave:
        yield wave
