"""Where vLLM's scheduler calls the planner: after each step is scheduled, and when blocks go.

Knows vLLM's Scheduler. Adds no decision of its own except how many requests to admit. Next:
worker/flush.py, which receives the StepPlan.
"""

import math

from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import SchedulerInterface
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request

from rkv_vllm.config import CONFIG_KEY, KVCompressionConfig
from rkv_vllm.fit import refusals
from rkv_vllm.fit.overrides import overrides
from rkv_vllm.log import init_logger
from rkv_vllm.request_options import RequestOptionError, RequestOptions, read_request_options
from rkv_vllm.scheduling.books import GroupBooks
from rkv_vllm.scheduling.directive import STEP_PLAN_ATTRIBUTE
from rkv_vllm.scheduling.planner import CompressionPlanner, ScheduledRequest
from rkv_vllm.scheduling.step_stats import StepStats

logger = init_logger(__name__)

# Weight of the latest finished request in the share of those that were compacted: about the last
# ten count, so that admission follows a change of workload within seconds.
_SHARE_STEP = 0.1


class CompressionSchedulerMixin:
    """Attaches a StepPlan to every SchedulerOutput; to be mixed into a vLLM scheduler."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # The only check when VLLM_PLUGINS leaves our plugin out and the classes came by name.
        refusals.check(self.vllm_config)
        self._compression = KVCompressionConfig.from_dict(
            self.vllm_config.additional_config[CONFIG_KEY]
        )
        self._block_manager = self._find_block_manager()
        self._block_manager.admission_reserve = self._admission_reserve
        self._planner = CompressionPlanner(self._compression, self._block_manager)
        # Of every request that vLLM knows; None: its cache is kept whole.
        self._options: dict[str, RequestOptions | None] = {}
        self._max_in_flight = self.vllm_config.max_concurrent_batches
        # Until requests have finished, all are expected to be long.
        self._share_compacted = 1.0
        self._forget_growth()
        self._step_stats = StepStats()
        # Tokens that the running requests' caches are shorter than their texts.
        self._num_evicted = 0
        logger.info("KV cache compression is on: %s", self._compression.to_dict())

    def _find_block_manager(self) -> GroupBooks:
        managers = self.kv_cache_manager.coordinator.single_type_managers
        if len(managers) == 1 and isinstance(managers[0], GroupBooks):
            return managers[0]
        names = [type(manager).__name__ for manager in managers]
        raise ValueError(
            f"KV cache compression needs one KV-cache group of full attention, got {names}; "
            "serve this model without --kv-compression"
        )

    @overrides("vllm.v1.core.sched.scheduler:Scheduler.add_request")
    def add_request(self, request: Request) -> None:
        """Take a request in, with the lengths that hold for it."""
        # The further inputs of a session come under the id of the first.
        if request.request_id not in self.requests:
            self._options[request.request_id] = self._read_options(request)
        super().add_request(request)

    def _read_options(self, request: Request) -> RequestOptions | None:
        if request.sampling_params is None:
            # A pooling request decodes nothing.
            return None
        try:
            return read_request_options(request.sampling_params.extra_args, self._compression)
        except RequestOptionError as error:
            # Not by a front end of vLLM's Python servers, which would have refused it. Raising
            # would end the engine for everybody.
            logger.warning(
                "request %s is run with the server's lengths: %s", request.request_id, error
            )
            return read_request_options(None, self._compression)

    def _forget_growth(self) -> None:
        self._num_weighed = 0
        self._weighed_growth = 0.0

    @overrides(
        "vllm.v1.core.sched.scheduler:Scheduler._update_after_schedule",
        "vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_after_schedule",
    )
    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        # Every allocation of the step is done here, so blocks given back now cannot be handed
        # out before the workers have read them (they flush first thing in the next step).
        super()._update_after_schedule(scheduler_output)
        self._forget_growth()
        plan = self._planner.plan_step(self._scheduled_requests(scheduler_output))
        self._num_evicted += sum(directive.num_evict for directive in plan.directives)
        if self.log_stats:
            self._step_stats.add(plan)
        pool = self.kv_cache_manager.block_pool
        plan.num_free_blocks = pool.get_num_free_blocks()
        plan.num_total_blocks = pool.num_gpu_blocks - 1
        setattr(scheduler_output, STEP_PLAN_ATTRIBUTE, plan)

    @overrides("vllm.v1.core.sched.scheduler:Scheduler._free_request_blocks")
    def _free_request_blocks(self, request: Request) -> None:
        if request.is_finished():
            if self._is_bounded(request):
                was_compacted = self._block_manager.num_evicted(request.request_id) > 0
                self._share_compacted += _SHARE_STEP * (was_compacted - self._share_compacted)
            del self._options[request.request_id]
        self._num_evicted -= self._block_manager.num_evicted(request.request_id)
        super()._free_request_blocks(request)
        self._planner.forget(request.request_id)

    @overrides("vllm.v1.core.sched.scheduler:Scheduler.make_stats")
    def make_stats(self, *args, **kwargs) -> SchedulerStats | None:
        """The statistics that vLLM makes of a step, with ours; None when nobody asked for any."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            step, self._step_stats = self._step_stats, StepStats()
            step.logical_tokens = sum(request.num_computed_tokens for request in self.running)
            step.physical_tokens = step.logical_tokens - self._num_evicted
            step.seats_in_use = self._planner.num_seats_in_use
            step.attach_to(stats)
        return stats

    def _scheduled_requests(self, scheduler_output: SchedulerOutput) -> list[ScheduledRequest]:
        scheduled = []
        for req_id, num_scheduled in scheduler_output.num_scheduled_tokens.items():
            request = self.requests[req_id]
            options = self._options_of(request)
            if options is not None:
                scheduled.append(
                    ScheduledRequest(
                        req_id,
                        request.num_computed_tokens,
                        num_scheduled,
                        request.num_in_flight_tokens,
                        request.is_prefill_chunk,
                        options,
                    )
                )
        return scheduled

    def _options_of(self, request: Request) -> RequestOptions | None:
        """Budget and buffer of a request; None if its cache is kept whole.

        A resumable (streaming-input) session rewrites its computed tokens between inputs.
        """
        return None if request.resumable else self._options[request.request_id]

    def _admission_reserve(self, new_request_id: str) -> int:
        """Blocks to keep back for growth when `new_request_id` asks to be admitted.

        A compacted request stops growing at a known length, so requests can be admitted up to
        the number that never has to be preempted. A request that was not compacted yet may end
        before it gets there: it counts by the share of finished requests that did. Requests too
        short to be compacted, and those that keep their whole cache, are not reserved for: vLLM's
        own optimism applies to them, and they may have to be preempted. An idle
        engine reserves nothing, so whatever vLLM would admit there is admitted.
        """
        if not self.running:
            return 0
        newcomer = self.requests[new_request_id]
        growth = self._share_compacted * self._growth(
            newcomer, cdiv(newcomer.num_tokens, self.block_size)
        )
        return math.ceil(growth + self._running_growth())

    def _running_growth(self) -> float:
        """Blocks that the running requests are expected to grow into.

        Within a step requests only join, so each is weighed once per step: otherwise a thousand
        requests that are admitted together would weigh each other half a million times.
        """
        for request in self.running[self._num_weighed :]:
            held = len(self._block_manager.req_to_blocks[request.request_id])
            weight = 1.0
            if self._block_manager.num_evicted(request.request_id) == 0:
                weight = self._share_compacted
            self._weighed_growth += weight * self._growth(request, held)
        self._num_weighed = len(self.running)
        return self._weighed_growth

    def _growth(self, request: Request, held: int) -> int:
        """Blocks a request may need beyond the `held` ones; 0 if compaction does not bound it."""
        if not self._is_bounded(request):
            return 0
        req_id = request.request_id
        growth = max(cdiv(self._peak_len(request), self.block_size) - held, 0)
        if self._block_manager.num_evicted(req_id) == 0:
            survivors = self._options[req_id].budget + self._max_in_flight
            growth += self._block_manager.num_shared_blocks(req_id, survivors)
        return growth

    def _is_bounded(self, request: Request) -> bool:
        """Whether compaction keeps this request shorter than its full length."""
        if self._options_of(request) is None:
            return False
        if self._block_manager.num_evicted(request.request_id) > 0:
            return True
        return self._due_at(request) + self._max_in_flight < self._final_len(request)

    def _due_at(self, request: Request) -> int:
        options = self._options[request.request_id]
        return self._planner.due_at(request.request_id, request.num_tokens, options)

    def _peak_len(self, request: Request) -> int:
        """Most physical tokens the request holds before its next compaction or its end."""
        peak = min(self._due_at(request) + self._max_in_flight, self._final_len(request))
        return peak - self._block_manager.num_evicted(request.request_id)

    def _final_len(self, request: Request) -> int:
        """Most logical tokens that the request can reach."""
        return min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)


class CompressionScheduler(CompressionSchedulerMixin, Scheduler):
    """vLLM's scheduler with KV cache compression."""


class CompressionAsyncScheduler(CompressionSchedulerMixin, AsyncScheduler):
    """vLLM's asynchronous scheduler with KV cache compression."""


def make_scheduler(**kwargs) -> SchedulerInterface:
    """Build the scheduler that vLLM's configuration asks for (`scheduler_cls` of the engine)."""
    if kwargs["vllm_config"].scheduler_config.async_scheduling:
        return CompressionAsyncScheduler(**kwargs)
    return CompressionScheduler(**kwargs)
