"""What one engine step did, on its way from the scheduler to the API server that hears of it.

Knows the StepPlan and the one field of vLLM's `SchedulerStats` that carries it; knows nothing of
Prometheus. Next: stat_logger.py.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from vllm.v1.metrics.stats import SchedulerStats

from rkv_vllm.scheduling.directive import EvictionDirective, StepPlan

_PREFIX = "kv_compression "

# Why a preempted request that was compacted computes its text again, where there is a swap space.
FALLBACKS = ("space", "groups", "prompt_logprobs", "reset")


@dataclass
class StepStats:
    """Booked since the last message, and the state after it.

    Attributes:
        evicted_tokens: tokens that each compaction evicts, per layer and head; each class of layers
            with a budget of its own has its own compactions.
        reasons: compactions by reason (`REASONS`).
        pressure_steps: steps in which the pool ran short, with `--kv-when pressure`.
        freed_blocks: blocks that the compacted requests hold less of.
        deferred_for_seat: compactions that began to wait for a seat or for its window.
        deferred_for_blocks: compactions that began to wait for a copy of a shared block.
        looping_requests: compacted requests that were found in a loop for the first time.
        swapped_out: preempted requests whose compacted cache was copied to host memory.
        swapped_in: those that were copied back.
        recomputed: preempted requests that lost a compacted cache although there is a swap space,
            by reason (`FALLBACKS`).
        swap_bytes: host memory that belongs to swapped requests, over all ranks.
        logical_tokens: tokens that the running requests have computed.
        physical_tokens: tokens of these that their caches hold.
        seats_in_use: seats of the query ring that belong to a request.
    """

    evicted_tokens: list[int] = field(default_factory=list)
    freed_blocks: int = 0
    deferred_for_seat: int = 0
    deferred_for_blocks: int = 0
    looping_requests: int = 0
    logical_tokens: int = 0
    physical_tokens: int = 0
    seats_in_use: int = 0
    swapped_out: int = 0
    swapped_in: int = 0
    recomputed: dict[str, int] = field(default_factory=dict)
    swap_bytes: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    pressure_steps: int = 0

    def add_waits(self, plan: StepPlan) -> None:
        """Count the compactions that begin to wait in a step, and whether the pool ran short."""
        self.pressure_steps += plan.under_pressure
        self.deferred_for_seat += plan.num_waiting_for_seat
        self.deferred_for_blocks += plan.num_waiting_for_blocks

    def add_compactions(self, directives: Iterable[EvictionDirective]) -> None:
        """Count compactions that the workers carry out."""
        for directive in directives:
            self.evicted_tokens.append(directive.num_evict)
            self.reasons[directive.reason] = self.reasons.get(directive.reason, 0) + 1
            self.freed_blocks += directive.num_freed_blocks

    def attach_to(self, stats: SchedulerStats) -> None:
        """Write this message into vLLM's own, where `take_from` finds it.

        vLLM encodes the declared fields only. Of these, the counts of KV fetches by stage are the
        one with free keys, and stages with a count of zero are ignored by all of vLLM's loggers: so
        the numbers stand in the key.
        """
        stats.num_kv_fetch_reqs_by_stage[_PREFIX + json.dumps(vars(self))] = 0

    @classmethod
    def take_from(cls, stats: SchedulerStats) -> "StepStats | None":
        """Remove and return the message; None when there is none."""
        stages = stats.num_kv_fetch_reqs_by_stage
        for stage in stages:
            if stage.startswith(_PREFIX):
                del stages[stage]
                return cls(**json.loads(stage.removeprefix(_PREFIX)))
        return None
