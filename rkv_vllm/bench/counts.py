"""What the scheduler of an engine in this process does, counted step by step while a load runs.

Knows vLLM's scheduler, no benchmark. Next: latencies.py.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM

PROGRESS_SECONDS = 1.0


def forget_prompts(llm: "LLM") -> None:
    """Empty the prefix cache; with asynchronous scheduling a last step may hold blocks.

    Raises:
        RuntimeError: blocks are held although no request is left.
    """
    for _ in range(5):
        if llm.reset_prefix_cache():
            return
        llm.llm_engine.step()
    raise RuntimeError("the prefix cache cannot be emptied: an earlier load left blocks behind")


class SchedulerCounts:
    """Counts what the scheduler of an engine in this process does, one load at a time."""

    def __init__(self, llm: "LLM") -> None:
        self._llm = llm
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self._pool = scheduler.kv_cache_manager.block_pool
        self._num_drafts = scheduler.num_spec_tokens
        self._schedule, self._preempt = scheduler.schedule, scheduler._preempt_request
        scheduler.schedule, scheduler._preempt_request = self._count_step, self._count_preemption
        self._add, self._update = scheduler.add_request, scheduler.update_from_output
        scheduler.add_request, scheduler.update_from_output = self._note_arrival, self._note_tokens

    @contextmanager
    def of_load(self, pool_blocks: int | None, show: Callable[[int], None]) -> Iterator[None]:
        """Count what happens in this block.

        Args:
            pool_blocks: the pool that the load gets; the others are taken out of the engine's for
                as long. None leaves it all.
            show: takes the tokens scheduled so far, about once per second.
        """
        self._steps = self._running = self._running_peak = self._preempted = self._held_peak = 0
        self._drafting_steps = self._accepted = 0
        self._times: dict[str, list[float]] = {}
        self._show, self._shown_at = show, time.monotonic()
        self._usable = self._pool.num_gpu_blocks - 1
        taken = []
        forget_prompts(self._llm)
        if pool_blocks is not None and pool_blocks < self._usable:
            taken = self._pool.get_new_blocks(self._usable - pool_blocks)
            self._usable = pool_blocks
        yield
        self._pool.free_blocks(taken)

    @property
    def times(self) -> list[list[float]]:
        """Of the last load, request by request: when it arrived, then of each token; in seconds."""
        return list(self._times.values())

    def numbers(self) -> dict[str, float]:
        """Of the last load; with speculative decoding also how far a step takes a request."""
        drafts = {}
        if self._num_drafts:
            length = 1 + self._accepted / max(self._drafting_steps, 1)
            drafts = {"drafts": self._num_drafts, "acceptance_length": length}
        return {
            **drafts,
            "running_mean": self._running / max(self._steps, 1),
            "running_peak": self._running_peak,
            "preemptions": self._preempted,
            "peak_blocks": self._held_peak,
            "engines": 1,
            "pool_blocks": self._usable,
        }

    def _count_step(self, *args: Any, **kwargs: Any) -> Any:
        output = self._schedule(*args, **kwargs)
        running = len(output.num_scheduled_tokens)
        self._steps += running > 0
        self._running += running
        self._running_peak = max(self._running_peak, running)
        free = self._pool.get_num_free_blocks()
        self._held_peak = max(self._held_peak, self._usable - free)
        if time.monotonic() > self._shown_at + PROGRESS_SECONDS:
            self._shown_at = time.monotonic()
            self._show(self._running)
        return output

    def _note_arrival(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        self._times[request.request_id] = [time.perf_counter()]
        return self._add(request, *args, **kwargs)

    def _note_tokens(self, scheduled: Any, computed: Any) -> Any:
        by_client = self._update(scheduled, computed)
        sampled = dict(zip(computed.req_ids, computed.sampled_token_ids, strict=False))
        for req_id in scheduled.scheduled_spec_decode_tokens:
            # None of a request that was preempted or aborted meanwhile.
            if tokens := sampled.get(req_id):
                self._drafting_steps += 1
                self._accepted += len(tokens) - 1
        now = time.perf_counter()
        for outputs in by_client.values():
            for output in outputs.outputs:
                self._times[output.request_id] += [now] * len(output.new_token_ids)
        return by_client

    def _count_preemption(self, *args: Any, **kwargs: Any) -> Any:
        self._preempted += 1
        return self._preempt(*args, **kwargs)
