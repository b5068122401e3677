"""Carries out the scheduler's directives on the cache: score, select, compact.

Shared by all model runners. Knows the groups, the memory a flush may take and the counters; knows
neither vLLM's batch nor its rows: a runner calls `flush` before anything of the next step and
updates its own rows with what comes back. Next: group.py for what is compacted, runner.py for when.
"""

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from vllm.utils.math_utils import cdiv

from rkv_vllm.kernels.batch import ALL_FINITE, Eviction, EvictionBatch
from rkv_vllm.log import init_logger
from rkv_vllm.methods.base import Heads, Method, check_scores
from rkv_vllm.scheduling.directive import EvictionDirective, StepPlan
from rkv_vllm.worker.checks import FiniteChecks, JudgedLayers
from rkv_vllm.worker.group import CompressedGroup
from rkv_vllm.worker.layer_set import LayerSet

logger = init_logger(__name__)

# Temporaries of one call. With the 28 bytes that Triton's kernels keep of a token, head and layer:
# 28 requests of 1152 tokens or one of 32K of a 32-layer model with 8 heads; longer ones go through
# in chunks of layers.
SCRATCH_BYTES = 224 << 20

# vLLM never hands it to a request.
_NULL_BLOCK = 0

_OWN_METHODS = "rkv_vllm.methods."


@dataclass(slots=True)
class CompactionStats:
    """What this worker has done since it started, over all groups.

    Attributes:
        compactions: directives carried out.
        evicted_tokens: tokens evicted, per layer and head.
        freed_blocks: blocks that requests hold less of right after their compactions.
        deferred: compactions that had to wait for a seat or for blocks.
        requests_compacted: requests compacted at least once.
        skipped: directives of requests that left before they were carried out.
        swapped_out: preempted requests whose cache was copied to host memory.
        swapped_in: those that were copied back.
        recomputed: preempted requests that lost a compacted cache although there is a swap space.
        non_finite: compactions with NaN or infinite scores, of this rank's heads.
    """

    compactions: int = 0
    evicted_tokens: int = 0
    freed_blocks: int = 0
    deferred: int = 0
    requests_compacted: int = 0
    skipped: int = 0
    swapped_out: int = 0
    swapped_in: int = 0
    recomputed: int = 0
    non_finite: int = 0


class Choice(NamedTuple):
    """What was chosen in some layers of some requests; the cache has not moved yet.

    Attributes:
        directives: the requests, all of one group.
        heads: the cache of these layers.
        batch: the requests as the method saw them.
        scores: float32 [requests, these layers * KV heads, most candidates], the method's.
        keep: int32 [requests, these layers * KV heads, largest budget], physical positions.
        layers: names of the layers.
    """

    directives: list[EvictionDirective]
    heads: Heads
    batch: EvictionBatch
    scores: Tensor
    keep: Tensor
    layers: tuple[str, ...]


class ChoiceObserver(Protocol):
    """Looks on while requests are compacted."""

    def chosen(self, choice: Choice) -> None:
        """Take note of a choice before the survivors move; must not write to any tensor of it."""


class Compactor:
    """Evicts and compacts the requests that the scheduler names.

    Args:
        groups: the compressed groups, by index in vLLM's configuration.
        window: newest settled tokens, which every compaction keeps.

    Attributes:
        groups: see above.
        pending: directives that wait for the next flush.
        observer: is shown every choice; None outside `rkv-vllm trace`.
    """

    observer: ChoiceObserver | None = None

    def __init__(self, groups: dict[int, CompressedGroup], window: int) -> None:
        self.groups = groups
        self.pending: list[EvictionDirective] = []
        self._window = window
        self._compactions: dict[str, int] = {}
        self._stats = CompactionStats()
        self._checks = FiniteChecks()
        names = {layer_set.ops.name for group in groups.values() for layer_set in group.layer_sets}
        logger.info("Compaction kernels: %s", ", ".join(sorted(names)))

    def warm_up(self) -> None:
        """Compile what a flush launches, on the null block.

        Call it once, before the first request: compiling takes seconds.
        """
        for group in self.groups.values():
            if any(layer_set.ops.name == "triton" for layer_set in group.layer_sets):
                self._warm_up(group)
        self._checks.drop()

    def _warm_up(self, group: CompressedGroup) -> None:
        for layer_set in group.layer_sets:
            # What lies there may be zeros or NaN, which a method need not expect.
            for states in layer_set.stored:
                states.fill_with_noise(_NULL_BLOCK)
        try:
            self._evict(group, [self._warm_up_directive(group)])
        except Exception:
            if type(group.methods(None)[0]).__module__.startswith(_OWN_METHODS):
                raise
            # Whatever a method of others raises on a few random tokens: serving may go well.
            logger.warning("Warm-up of KV-cache group %d failed", group.group_id, exc_info=True)

    def _warm_up_directive(self, group: CompressedGroup) -> EvictionDirective:
        settled_len = self._window + 2
        row = [_NULL_BLOCK] * cdiv(settled_len, group.block_size)
        return EvictionDirective(
            req_id="warm-up",
            group_id=group.group_id,
            num_evicted_before=0,
            prefix_len=0,
            settled_len=settled_len,
            total_len=settled_len,
            num_evict=1,
            seat=0 if group.records_queries else -1,
            prompt_len=0,
            seed=0,
            method_options=None,
            old_block_ids=row,
            new_block_ids=row,
        )

    def num_compactions(self, req_id: str) -> int:
        """Compactions of a live request, those before a preemption included."""
        return self._compactions.get(req_id, 0)

    def stats(self) -> dict[str, int]:
        """The counters as plain integers; waits for the device."""
        self._checks.examine(wait=True)
        self._stats.non_finite = self._checks.num_found
        return asdict(self._stats)

    def readmit(self, req_id: str) -> None:
        """The request starts from zero: physical = logical."""
        for group in self.groups.values():
            group.forget(req_id)

    def forget(self, req_id: str) -> None:
        """The request is gone."""
        self.readmit(req_id)
        self._compactions.pop(req_id, None)

    def begin_step(self, plan: StepPlan) -> None:
        """Take over the plan of a step that is about to run; its directives wait for `flush`.

        Call it once the step's requests are admitted: those that are swapped in are so long.
        """
        self.pending = plan.directives
        self._stats.deferred += plan.num_deferred
        self._stats.swapped_out += len({directive.req_id for directive in plan.saved})
        self._stats.swapped_in += len({directive.req_id for directive in plan.restored})
        self._stats.recomputed += plan.num_recomputed
        for directive in plan.restored:
            self.groups[directive.group_id].adopt(directive.req_id, directive.num_evicted)
        for req_id, group_id, num_evicted in plan.adopted:
            self.groups[group_id].adopt(req_id, num_evicted)

    def flush(self, gone: Collection[str] = ()) -> list[EvictionDirective]:
        """Carry out what the last step left, before anything of the next one.

        Args:
            gone: requests that finished or were preempted since; their blocks are not theirs.

        Returns:
            The directives carried out; the runner exchanges the rows of those requests.
        """
        self._checks.examine()
        directives = [directive for directive in self.pending if directive.req_id not in gone]
        self._stats.skipped += len(self.pending) - len(directives)
        self.pending = []
        for wave in self._waves(directives):
            scored_together: dict[tuple[int, Any], list[EvictionDirective]] = {}
            for directive in wave:
                key = directive.group_id, directive.method_options
                scored_together.setdefault(key, []).append(directive)
            for (group_id, _), alike in scored_together.items():
                self._evict(self.groups[group_id], alike)
        for directive in directives:
            self._count(directive)
        return directives

    def _waves(self, directives: list[EvictionDirective]) -> Iterator[list[EvictionDirective]]:
        """Cut the directives, in order, where one touches blocks that an earlier one still needs.

        The scheduler books one compaction after the other, so a block that the first gives back may
        be a fresh one of the next, of another group even. A wave's requests are compacted at the
        same time. Blocks full of protected tokens, which many may share, are not touched.
        """
        wave: list[EvictionDirective] = []
        read: set[int] = set()
        written: set[int] = set()
        for directive in directives:
            untouched = directive.prefix_len // self.groups[directive.group_id].block_size
            old_block_ids = directive.old_block_ids[untouched:]
            new_block_ids = directive.new_block_ids[untouched:]
            if not read.isdisjoint(new_block_ids) or not written.isdisjoint(old_block_ids):
                yield wave
                wave, read, written = [], set(), set()
            wave.append(directive)
            read.update(old_block_ids)
            written.update(new_block_ids)
        if wave:
            yield wave

    def _evict(self, group: CompressedGroup, directives: list[EvictionDirective]) -> None:
        """Compact requests of one group and equal options, of which none writes another's cache."""
        if not group.layer_sets:
            return
        device = group.layer_sets[0].keys.device
        batch = EvictionBatch.of(list(map(_eviction, directives)), self._window, device)
        calls = [
            _Call(layer_set, method, requests, layers)
            for layer_set, method in zip(
                group.layer_sets, group.methods(directives[0].method_options), strict=True
            )
            for requests, layers in _chunks(batch, layer_set)
        ]
        if len(calls) == 1:
            flags, parts = batch.non_finite[None], [batch]
        else:
            # Heads are counted from the first of a call's layers, so its flags are its own.
            flags = torch.full(
                (len(calls), len(directives)), ALL_FINITE, dtype=torch.int32, device=device
            )
            parts = [
                batch.part(call.requests, call_flags[call.requests])
                for call, call_flags in zip(calls, flags, strict=True)
            ]
        for call, part in zip(calls, parts, strict=True):
            self._compact(call, part, directives[call.requests])
        judged = [JudgedLayers(call.layer_names, call.layer_set.keys.num_heads) for call in calls]
        self._checks.start(flags, judged, [directive.req_id for directive in directives])

    def _compact(
        self, call: "_Call", batch: EvictionBatch, directives: list[EvictionDirective]
    ) -> None:
        """Compact some layers of some requests."""
        layer_set, layers = call.layer_set, call.layers
        heads, batch = layer_set.heads(layers, batch)
        scores = call.method.score(heads, batch)
        check_scores(call.method, scores, heads, batch)
        keep = layer_set.ops.select(scores, batch)
        if self.observer is not None:
            choice = Choice(directives, heads, batch, scores, keep, call.layer_names)
            self.observer.chosen(choice)
        layer_set.compact(heads, batch, keep)

    def _count(self, directive: EvictionDirective) -> None:
        self.groups[directive.group_id].note(directive)
        req_id = directive.req_id
        self._stats.requests_compacted += req_id not in self._compactions
        self._compactions[req_id] = self.num_compactions(req_id) + 1
        self._stats.compactions += 1
        self._stats.evicted_tokens += directive.num_evict
        self._stats.freed_blocks += directive.num_freed_blocks


class _Call(NamedTuple):
    """Layers and requests that are compacted at once.

    Attributes:
        layer_set: whose layers.
        method: of that layer set.
        requests: which of a batch.
        layers: which of the layer set.
    """

    layer_set: LayerSet
    method: Method
    requests: slice
    layers: slice

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The layers by name."""
        return self.layer_set.model.layers[self.layers]


def _chunks(batch: EvictionBatch, layer_set: LayerSet) -> Iterator[tuple[slice, slice]]:
    """Cut requests and layers where the temporaries of one call would not fit into memory.

    Yields:
        Neighbouring requests, at least one, and neighbouring layers, at least one.
    """
    num_layers, num_heads = layer_set.keys.num_layers, layer_set.keys.num_heads
    per_token = layer_set.ops.scratch_bytes_per_token * num_heads
    limit = SCRATCH_BYTES // per_token
    more = layer_set.scratch_bytes_per_request // per_token
    lengths = [eviction.total_len + more for eviction in batch.evictions]
    first = 0
    while first < len(lengths):
        end, longest = first + 1, lengths[first]
        while end < len(lengths) and (
            max(longest, lengths[end]) * (end + 1 - first) * num_layers <= limit
        ):
            longest = max(longest, lengths[end])
            end += 1
        step = max(1, limit // (longest * (end - first)))
        for layer in range(0, num_layers, step):
            yield slice(first, end), slice(layer, min(layer + step, num_layers))
        first = end


def _eviction(directive: EvictionDirective) -> Eviction:
    return Eviction(
        old_block_ids=directive.old_block_ids,
        new_block_ids=directive.new_block_ids,
        settled_len=directive.settled_len,
        total_len=directive.total_len,
        budget=directive.budget,
        prefix_len=directive.prefix_len,
        seat=directive.seat,
        window_end=directive.settled_logical_len,
        prompt_len=directive.prompt_len,
        seed=directive.seed,
    )
