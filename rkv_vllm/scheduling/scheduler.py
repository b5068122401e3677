"""Where vLLM's scheduler calls the planners: after each step is scheduled, and when blocks go.

Knows vLLM's Scheduler and decides nothing itself. Next: planner.py (when), admission.py (how many),
then worker/flush.py, which receives the StepPlan.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import SchedulerInterface
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request, RequestStatus

from rkv_vllm.fit import refusals
from rkv_vllm.fit.overrides import calls, overrides
from rkv_vllm.limits import Limits
from rkv_vllm.log import init_logger
from rkv_vllm.options import CONFIG_KEY, ServerOptions, find_method
from rkv_vllm.policy import EveryBuffer, Terms
from rkv_vllm.request_options import (
    RequestOptionError,
    RequestOptions,
    keeps_prompt,
    read_request_options,
    wants_report,
)
from rkv_vllm.scheduling.admission import Admission, Track
from rkv_vllm.scheduling.armed import ArmedRequests
from rkv_vllm.scheduling.booking import ScheduledRequest
from rkv_vllm.scheduling.books import GroupBooks
from rkv_vllm.scheduling.compressed_prefixes import CompressedPrefixes
from rkv_vllm.scheduling.demand import Demand
from rkv_vllm.scheduling.directive import STEP_PLAN_ATTRIBUTE, EvictionDirective, StepPlan
from rkv_vllm.scheduling.floors import FloorAdmission
from rkv_vllm.scheduling.host_room import host_room
from rkv_vllm.scheduling.kept_group import KeptGroup
from rkv_vllm.scheduling.loop_watch import LoopWatch
from rkv_vllm.scheduling.planner import GroupPlanner, Seats
from rkv_vllm.scheduling.pool_size import PoolSize
from rkv_vllm.scheduling.pressed_group import PressedGroup
from rkv_vllm.scheduling.pressure import UnderPressure
from rkv_vllm.scheduling.prompt_rule import PromptRule
from rkv_vllm.scheduling.prompts import PromptCompactor
from rkv_vllm.scheduling.publishing import publish_no_more
from rkv_vllm.scheduling.request_reports import RequestReports
from rkv_vllm.scheduling.step_stats import StepStats
from rkv_vllm.scheduling.swap import SwapSpace

logger = init_logger(__name__)


@dataclass(slots=True, eq=False)
class _Known:
    """What holds for a request that vLLM knows.

    Attributes:
        options: what it asked for, else the server's; None: its cache is kept whole.
        terms: the same in each compressed group.
        seed: see `ScheduledRequest`; made when first asked for.
    """

    options: RequestOptions | None
    terms: Sequence[Terms] | None
    seed: int | None = None


class CompressionSchedulerMixin:
    """Attaches a StepPlan to every SchedulerOutput; to be mixed into a vLLM scheduler."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # Once more than when the config was made: a process whose VLLM_PLUGINS leaves this package
        # out has not checked it.
        refusals.check(self.vllm_config)
        self._server = ServerOptions.from_dict(self.vllm_config.additional_config[CONFIG_KEY])
        self._policy = EveryBuffer(self._server.window)
        self._managers = self.kv_cache_manager.coordinator.single_type_managers
        self._kept = [
            KeptGroup(manager, self.vllm_config)
            for manager in self._managers
            if not isinstance(manager, GroupBooks)
        ]
        self._limits = Limits.of(self.vllm_config)
        self._pressure: UnderPressure | None = None
        seats = self._seats()
        self._tracks = self._make_tracks(seats)
        rule = self._make_prompt_rule(seats)
        self._prompts = self._prefixes = None
        if rule is None:
            # vLLM asks for every running request in every step.
            self._reserve_prefill_lookahead = super()._reserve_prefill_lookahead
        else:
            self._prompts = PromptCompactor(
                rule, self._tracks, self.requests, self._terms_of, self._decodes
            )
            self._prefixes = self._make_compressed_prefixes(rule)
        self._known: dict[str, _Known] = {}
        # Requests whose prefill has not ended; an ordered set.
        self._prefilling: dict[str, None] = {}
        self._loop_watch = LoopWatch()
        self._step_stats = StepStats()
        # Of the last step; the workers skip those of requests that leave before the next one.
        self._booked: list[EvictionDirective] = []
        self._reports = RequestReports(self._evicted_now)
        server_terms = self._terms(read_request_options(None, self._server), prompt_len=0)
        self._pool_size = PoolSize(self._server, self._tracks, self._kept, self._limits)
        self._pool_size.check_floor(server_terms)
        if self._prompts is not None:
            self._pool_size.check_bound(server_terms)
        self._admission = self._make_admission(server_terms)
        self._tracks[0].books.required_at_admission = self._required_at_admission
        for track in self._tracks:
            track.books.resumed_len = self._resumed_len
        self._swap = self._make_swap_space()
        logger.info("KV cache compression is on: %s", self._server.to_dict())
        if self._server.when != "pressure":
            logger.info("KV cache compression: %s", self._pool_size.describe(server_terms))

    def _seats(self) -> Seats:
        method = find_method(self._server.method)
        needs_queries = method.need(self._server.method_options).queries
        return Seats(self._server.seats if needs_queries else 0, self._server.window)

    def _make_tracks(self, seats: Seats) -> list[Track]:
        books = [manager for manager in self._managers if isinstance(manager, GroupBooks)]
        if not books:
            names = [type(manager).__name__ for manager in self._managers]
            raise ValueError(
                "KV cache compression needs a KV-cache group of full attention, got "
                f"{names}; serve this model without --kv-compression"
            )
        if self._server.when == "pressure":
            armed = ArmedRequests(seats)
            groups = [PressedGroup(b.kv_cache_group_id, b, armed) for b in books]
            demand = Demand(books, self._kept, self._limits)
            survivors = self._server.budget + self._limits.in_flight
            most_copies = sum(cdiv(survivors, b.block_size) + 1 for b in books)
            self._pressure = UnderPressure(
                groups,
                armed,
                demand,
                self._num_free_blocks,
                seats,
                self._rank,
                most_copies,
            )
            return [Track(b, group) for b, group in zip(books, groups, strict=True)]
        return [
            Track(
                b,
                GroupPlanner(b.kv_cache_group_id, b, self._policy, seats, self._limits.max_advance),
            )
            for b in books
        ]

    def _make_swap_space(self) -> SwapSpace | None:
        if not self._server.swap_space:
            return None
        needs_queries = self._seats().count > 0
        room = host_room(self._server, self.vllm_config, self.kv_cache_config, needs_queries)
        return SwapSpace(self._tracks, self._managers, room, self.num_spec_tokens > 0)

    def _make_prompt_rule(self, seats: Seats) -> PromptRule | None:
        if not self._server.compress_prompt:
            return None
        num_extra = self._server.prompt_seats(self.max_num_scheduled_tokens)
        return PromptRule(self._server.prompt_chunk, seats, num_extra)

    def _make_compressed_prefixes(self, rule: PromptRule) -> CompressedPrefixes | None:
        pool = self.kv_cache_manager.block_pool
        if (
            not self.kv_cache_manager.enable_caching
            or pool.enable_kv_cache_events
            or self._kept
            or not find_method(self._server.method).depends_on_prefix_only
        ):
            return None
        return CompressedPrefixes(
            self._tracks, pool, rule, self.hash_block_size, self._options_of_prefix
        )

    def _options_of_prefix(self, request: Request) -> str:
        """What of a request shapes its compressed prompt, beside tokens and terms."""
        own = self._known_of(request).options.method_options or self._server.method_options
        return repr((self._server.method, self._server.window, own))

    def _publish_prefixes(self) -> None:
        """Compactions that the workers carry out with this step serve others from the next on."""
        for req_id in self._prompts.booked:
            directives = [each for each in self._booked if each.req_id == req_id]
            if directives:
                request = self.requests[req_id]
                self._prefixes.publish(request, self._terms_of(request), directives)

    def _make_admission(self, server_terms: Sequence[Terms]) -> Admission | FloorAdmission:
        if self._pressure is None:
            return Admission(
                self._tracks,
                self._kept,
                lambda: self.running,
                self._asked_beside,
                self._policy,
                self._limits,
                self._terms_of,
                server_terms,
            )
        return FloorAdmission(
            [track.books for track in self._tracks],
            self._kept,
            lambda: self.running,
            self._asked_beside,
            self._pressure.demand,
            self._pressure.horizon,
            self._limits,
            self._terms_of,
            server_terms,
        )

    @overrides("vllm.v1.core.sched.scheduler:Scheduler.add_request")
    def add_request(self, request: Request) -> None:
        """Take a request in, with the lengths that hold for it."""
        # The further inputs of a session come under the id of the first.
        if request.request_id not in self.requests:
            self._known[request.request_id] = self._read(request)
            if request.sampling_params is not None and wants_report(
                request.sampling_params.extra_args
            ):
                self._reports.begin(request)
        super().add_request(request)

    def _known_of(self, request: Request) -> _Known:
        """What holds for a request, also for one that was put into vLLM's queues by hand."""
        known = self._known.get(request.request_id)
        if known is None:
            known = self._known[request.request_id] = self._read(request)
        return known

    def _read(self, request: Request) -> _Known:
        """What holds for a request; the server's lengths where the pool could never hold it.

        vLLM's Python front ends have refused those (frontend/request_check.py).
        """
        options = self._read_options(request)
        terms = None
        if options is not None:
            if keeps_prompt(request.sampling_params):
                options = options._replace(compress_prompt=False)
            terms = self._terms(options, request.num_prompt_tokens)
        if self._prompts is None or request.sampling_params is None or request.resumable:
            return _Known(options, terms)
        if not self._pool_size.holds(terms, self._limits.final_len(request)):
            logger.warning(
                "request %s is run with the server's lengths: the pool could never hold it with "
                "its own",
                request.request_id,
            )
            options = read_request_options(None, self._server)
            terms = self._terms(options, request.num_prompt_tokens)
        return _Known(options, terms)

    def _read_options(self, request: Request) -> RequestOptions | None:
        # A pooling request decodes nothing; a resumable (streaming-input) session rewrites its
        # computed tokens between inputs.
        if request.sampling_params is None or request.resumable:
            return None
        try:
            return read_request_options(
                request.sampling_params.extra_args, self._server, request.num_prompt_tokens
            )
        except RequestOptionError as error:
            # Not by a front end of vLLM's Python servers, which would have refused it. Raising
            # would end the engine for everybody.
            logger.warning(
                "request %s is run with the server's lengths: %s", request.request_id, error
            )
            return read_request_options(None, self._server)

    @overrides(
        "vllm.v1.core.sched.scheduler:Scheduler._update_after_schedule",
        "vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_after_schedule",
    )
    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        # Every allocation of the step is done here, so blocks given back now cannot be handed
        # out before the workers have read them (they flush first thing in the next step).
        super()._update_after_schedule(scheduler_output)
        plan = StepPlan()
        if self._swap is not None:
            self._swap.step(scheduler_output.num_scheduled_tokens, self.requests, plan)
        if self._prefixes is not None:
            self._prefixes.step(scheduler_output.num_scheduled_tokens, plan)
            self._publish_prefixes()
        self._begin_decoding(scheduler_output)

        def lookup(req_id: str) -> ScheduledRequest | None:
            return self._scheduled(req_id, scheduler_output)

        seats_of_prompts = self._compact_prompts(scheduler_output, plan)
        if self._pressure is None:
            for track in self._tracks:
                track.planner.plan_step(lookup, plan)
        else:
            prefilling = [self.requests[req_id] for req_id in self._prefilling]
            wanted = self._admission.take_wanted()
            self._pressure.plan_step(self.running, prefilling, wanted, lookup, plan)
        for watched in plan.watched.values():
            watched.update(seats_of_prompts)
        for track in self._tracks:
            track.books.reclaim()
        for directive in plan.directives:
            if directive.num_evicted_before == 0:
                publish_no_more(self._managers, directive.req_id)
            self._admission.note_compaction(self.requests[directive.req_id], directive)
        # Those of the step before: the workers carry them out first thing in this one.
        for directive in self._booked:
            output = self.requests[directive.req_id].output_token_ids
            is_new = self._loop_watch.note_compaction(directive.req_id, output)
            self._step_stats.looping_requests += is_new
        if self._reports:
            self._reports.note_compactions(self._booked)
        if self.log_stats:
            self._step_stats.add_compactions(self._booked)
            self._step_stats.add_waits(plan)
        self._booked = plan.directives
        self._admission.restart_bounds()
        setattr(scheduler_output, STEP_PLAN_ATTRIBUTE, plan)

    def _begin_decoding(self, scheduler_output: SchedulerOutput) -> None:
        """Hand requests whose prefill ends with this step to the planners."""
        for new in scheduler_output.scheduled_new_reqs:
            self._prefilling[new.req_id] = None
        for req_id in scheduler_output.scheduled_cached_reqs.resumed_req_ids:
            self._prefilling[req_id] = None
        for req_id in list(self._prefilling):
            request = self.requests[req_id]
            if request.is_prefill_chunk or req_id not in scheduler_output.num_scheduled_tokens:
                continue
            del self._prefilling[req_id]
            terms = self._terms_of(request)
            # One that was swapped in decodes already.
            if terms is not None and not self._tracks[0].planner.decodes(req_id):
                # The first step that reaches the end of the prefill ends exactly there, but for
                # drafts that vLLM pads the last token with.
                prefill_len = min(request.num_computed_tokens, request.num_tokens)
                for own, track in zip(terms, self._tracks, strict=True):
                    track.planner.begin(req_id, own, prefill_len)

    @overrides("vllm.v1.core.sched.scheduler:Scheduler._reserve_prefill_lookahead")
    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """Let no prefill step run over a boundary, or into the window before it."""
        num_new_tokens = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, num_new_tokens
        )
        is_decoding = (
            request.status == RequestStatus.RUNNING and request.request_id not in self._prefilling
        )
        if is_decoding:
            return num_new_tokens
        return self._prompts.cap(request, num_computed_tokens, num_new_tokens)

    @overrides("vllm.v1.core.sched.scheduler:Scheduler._get_local_prefix_cache_hit")
    @calls(
        "vllm.v1.core.kv_cache_manager:KVCacheManager.truncate_computed_blocks",
        "vllm.v1.core.kv_cache_manager:KVCacheManager.prefix_cache_lookup_enabled",
        "vllm.v1.core.kv_cache_manager:KVCacheManager.create_kv_cache_blocks",
    )
    def _get_local_prefix_cache_hit(
        self, request: Request, max_cache_hit_length: int | None = None
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        """What a request need not compute: what it was swapped out with, else a cached prefix.

        Args:
            request: that is to be scheduled for the first time, or again.
            max_cache_hit_length: most tokens of a hit; vLLM 0.32 knows none, 0.33 gives one where
                it returns the experts of each token.
        """
        num_computed = None if self._swap is None else self._swap.ask(request.request_id)
        if num_computed is not None:
            return self.kv_cache_manager.empty_kv_cache_blocks, num_computed, 0, False
        if self._prefixes is not None and self.kv_cache_manager.prefix_cache_lookup_enabled(
            request
        ):
            found = self._prefixes.longest(request, self._terms_of(request))
            if found is not None:
                rows, num_tokens = found
                return (
                    self.kv_cache_manager.create_kv_cache_blocks(tuple(rows)),
                    num_tokens,
                    0,
                    False,
                )
        limit = () if max_cache_hit_length is None else (max_cache_hit_length,)
        hit = super()._get_local_prefix_cache_hit(request, *limit)
        if self._prompts is None or not hit[1]:
            return hit
        blocks, num_tokens = hit[:2]
        longest = self._prompts.longest_hit(request, blocks.blocks, num_tokens, self.block_size)
        if longest == num_tokens:
            return hit
        # The blocks of other kinds of layers serve one length only.
        if not longest or self._kept:
            return self.kv_cache_manager.empty_kv_cache_blocks, 0, 0, False
        blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, longest)
        return blocks, longest, 0, False

    def _compact_prompts(self, scheduler_output: SchedulerOutput, plan: StepPlan) -> dict[str, int]:
        """Compact prompts that reach a boundary; returns the seats that record their queries."""
        if self._prompts is None:
            return {}

        def describe(req_id: str) -> ScheduledRequest | None:
            return self._describe(req_id, scheduler_output)

        return self._prompts.compact(self._prefilling, describe, plan)

    def _scheduled(self, req_id: str, scheduler_output: SchedulerOutput) -> ScheduledRequest | None:
        """A decoding request; None if the step does not compute it, or its prefill goes on."""
        if self.requests[req_id].is_prefill_chunk:
            return None
        return self._describe(req_id, scheduler_output)

    def _describe(self, req_id: str, scheduler_output: SchedulerOutput) -> ScheduledRequest | None:
        num_scheduled = scheduler_output.num_scheduled_tokens.get(req_id)
        if num_scheduled is None:
            return None
        request = self.requests[req_id]
        num_in_flight = request.num_in_flight_tokens
        if self._swap is not None:
            num_in_flight = self._swap.num_in_flight(request)
        return ScheduledRequest(
            req_id,
            request.num_computed_tokens,
            num_scheduled,
            num_in_flight,
            request.num_prompt_tokens,
            self._seed(request),
            self._known_of(request).options.method_options,
        )

    def _seed(self, request: Request) -> int:
        """64 bits that the same prompt with the same sampling seed gets in every run."""
        known = self._known_of(request)
        if known.seed is None:
            said = repr((request.prompt_token_ids, request.sampling_params.seed)).encode()
            known.seed = int.from_bytes(blake2b(said, digest_size=8).digest(), "little")
        return known.seed

    @overrides("vllm.v1.core.sched.scheduler:Scheduler._free_request_blocks")
    def _free_request_blocks(self, request: Request) -> None:
        req_id = request.request_id
        if request.is_finished():
            self._reports.end(req_id)
        self._admission.note_end(request)
        self._prefilling.pop(req_id, None)
        if self._swap is None or not self._swap.leave(request):
            self._booked = [each for each in self._booked if each.req_id != req_id]
        if request.is_finished():
            self._known.pop(req_id, None)
            is_new = self._loop_watch.note_end(req_id, request.output_token_ids)
            self._step_stats.looping_requests += is_new
        super()._free_request_blocks(request)
        for track in self._tracks:
            track.planner.forget(req_id)

    @overrides("vllm.v1.core.sched.scheduler:Scheduler.update_from_output")
    def update_from_output(self, *args, **kwargs) -> dict[int, EngineCoreOutputs]:
        """Hand on what a step made of the requests, with the reports that some asked for."""
        by_client = super().update_from_output(*args, **kwargs)
        if self._reports:
            for of_client in by_client.values():
                self._reports.attach(of_client.outputs)
        return by_client

    def _evicted_now(self, req_id: str) -> list[int]:
        """Tokens that a request's cache lacks in each group; what is booked is still there."""
        booked = [each for each in self._booked if each.req_id == req_id]
        return [
            track.books.num_evicted.get(req_id, 0)
            - sum(b.num_evict for b in booked if b.group_id == track.books.kv_cache_group_id)
            for track in self._tracks
        ]

    @overrides("vllm.v1.core.sched.scheduler:Scheduler.reset_prefix_cache")
    def reset_prefix_cache(self, *args, **kwargs) -> bool:
        """Reset the prefix cache, and with it what is swapped out: its weights may be gone."""
        if self._swap is None:
            return super().reset_prefix_cache(*args, **kwargs)
        with self._swap.closed():
            is_reset = super().reset_prefix_cache(*args, **kwargs)
        if is_reset:
            self._swap.drop_all()
        return is_reset

    @overrides("vllm.v1.core.sched.scheduler:Scheduler.make_stats")
    def make_stats(self, *args, **kwargs) -> SchedulerStats | None:
        """The statistics that vLLM makes of a step, with ours; None when nobody asked for any."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            step, self._step_stats = self._step_stats, StepStats()
            step.logical_tokens = sum(request.num_computed_tokens for request in self.running)
            evicted = sum(track.books.total_evicted for track in self._tracks)
            step.physical_tokens = step.logical_tokens - evicted // len(self._tracks)
            step.seats_in_use = sum(track.planner.num_seats_in_use for track in self._tracks)
            if self._swap is not None:
                self._swap.report(step)
            step.attach_to(stats)
        return stats

    def _decodes(self, req_id: str) -> bool:
        """Whether a request has begun to decode since it was admitted first or anew.

        One that was swapped out with drafts computes its newest tokens again when it comes back,
        which makes no prompt of them.
        """
        if self._tracks[0].planner.decodes(req_id):
            return True
        return self._swap is not None and self._swap.decodes(req_id)

    def _terms_of(self, request: Request) -> Sequence[Terms] | None:
        """What holds for a request in each compressed group; None if its cache is kept whole."""
        return self._known_of(request).terms

    def _terms(self, options: RequestOptions, prompt_len: int) -> list[Terms]:
        prefix_len = options.prefix_len(prompt_len)
        chunk = self._server.prompt_chunk if options.compress_prompt else 0
        return [
            Terms(self._group_budget(options.budget, track), options.buffer, prefix_len, chunk)
            for track in self._tracks
        ]

    def _group_budget(self, budget: int, track: Track) -> int:
        """A request's share: what it has above the window is spread as the server's is."""
        of_group = track.books.kv_cache_spec.layer_budget
        if of_group is None:
            return budget
        window = self._server.window
        share = (of_group - window) / (self._server.budget - window)
        return window + max(1, round((budget - window) * share))

    @calls("vllm.v1.core.block_pool:BlockPool.get_num_free_blocks")
    def _num_free_blocks(self) -> int:
        return self.kv_cache_manager.block_pool.get_num_free_blocks()

    def _required_at_admission(self, req_id: str, num_blocks: int) -> int:
        newcomer = self.requests[req_id]
        return self._admission.required(
            newcomer, num_blocks, self._not_displaced(newcomer), self._num_free_blocks()
        )

    def _asked_beside(self, newcomer: Request) -> int:
        """Most blocks that vLLM asks for a newcomer beside those that our gate requires."""
        # Twice where a prompt's compaction takes private copies.
        own = sum(2 * cdiv(newcomer.num_tokens, t.books.block_size) for t in self._tracks[1:])
        kept = sum(group.most_ever for group in self._kept)
        return own + kept + self.kv_cache_manager.watermark_blocks

    def _resumed_len(self, req_id: str) -> int:
        """Tokens of a preempted request that must fit before it is resumed, else 0.

        Without its gate on whole prompts vLLM would resume it for a chunk, preempt it again, and so
        on until those that run are compacted: whoever was preempted passes our gate.
        """
        request = self.requests[req_id]
        is_asked = self.scheduler_reserve_full_isl or not request.num_preemptions
        return 0 if is_asked else request.num_tokens

    def _rank(self, request: Request) -> int:
        """Whom pressure hits first: those that vLLM would preempt first."""
        return request.priority if self.policy == SchedulingPolicy.PRIORITY else 0

    def _not_displaced(self, newcomer: Request) -> Sequence[Request]:
        """Running requests that vLLM would not preempt to make room for the newcomer."""
        if self.policy != SchedulingPolicy.PRIORITY:
            return self.running
        rank = (newcomer.priority, newcomer.arrival_time)
        return [r for r in self.running if (r.priority, r.arrival_time) <= rank]


class CompressionScheduler(CompressionSchedulerMixin, Scheduler):
    """vLLM's scheduler with KV cache compression."""


class CompressionAsyncScheduler(CompressionSchedulerMixin, AsyncScheduler):
    """vLLM's asynchronous scheduler with KV cache compression."""


def make_scheduler(**kwargs) -> SchedulerInterface:
    """Build the scheduler that vLLM's configuration asks for (`scheduler_cls` of the engine)."""
    if kwargs["vllm_config"].scheduler_config.async_scheduling:
        return CompressionAsyncScheduler(**kwargs)
    return CompressionScheduler(**kwargs)
