"""A real vLLM scheduler and block pool, with a worker that knows where every token's cell lies.

The simulated worker executes SchedulerOutputs late, as asynchronous scheduling does, on a memory of
tags instead of tensors: a cell holds the name of the token state that was written to it. After
every forward each request must read back exactly the states it expects, in every KV-cache group, so
an overwritten survivor, a freed block that is still read, a stale count or a polluted prefix cache
shows up at once. No model, no tensors.
"""

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    KVCacheTensor,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from rkv_vllm.options import ServerOptions, prefix_len
from rkv_vllm.scheduling.directive import (
    STEP_PLAN_ATTRIBUTE,
    EvictionDirective,
    StepPlan,
    SwapDirective,
)
from rkv_vllm.scheduling.scheduler import make_scheduler
from rkv_vllm.scheduling.spec import CompressedAttentionSpec
from tests.leftovers import assert_nothing_is_left, container_sizes

BLOCK_SIZE = 4
MAX_MODEL_LEN = 256
# Tokens of the largest blocks; cells of a block are numbered up to there.
MAX_BLOCK_SIZE = 2 * BLOCK_SIZE
# Of one block of one layer, key and value of one head.
PAGE_BYTES = BLOCK_SIZE * 2 * 32 * 4
SLIDING_WINDOW = 6
CHUNK = 8
# Ends a request by itself; sampled where a test says so (`SimulatedEngine.stop_after`).
STOP_TOKEN = 999


@dataclass(frozen=True)
class Group:
    """One KV-cache group of a simulated model.

    Attributes:
        kind: "full" is compressed; "sliding" reads the last tokens, "chunked" those from the last
            multiple of `CHUNK` on; "state" has one block for all.
        layer_budget: what a full group keeps where the server keeps its budget.
        block_size: tokens of a block; smaller heads fit more tokens into equally many bytes.
    """

    kind: str = "full"
    layer_budget: int | None = None
    block_size: int = BLOCK_SIZE

    @property
    def spec(self) -> KVCacheSpec:
        head_size = 32 * BLOCK_SIZE // self.block_size
        size = {"block_size": self.block_size, "num_kv_heads": 1, "head_size": head_size}
        if self.kind == "full":
            return CompressedAttentionSpec(
                **size, dtype=torch.float32, layer_budget=self.layer_budget
            )
        if self.kind == "sliding":
            return SlidingWindowSpec(**size, dtype=torch.float32, sliding_window=SLIDING_WINDOW)
        if self.kind == "chunked":
            return ChunkedLocalAttentionSpec(
                **size, dtype=torch.float32, attention_chunk_size=CHUNK
            )
        return MambaSpec(block_size=MAX_MODEL_LEN, shapes=((8, 32),), dtypes=(torch.float32,))


@dataclass(frozen=True)
class Setting:
    """What one simulated engine is made of; lengths in tokens."""

    budget: int = 8
    buffer: int = 4
    window: int = 2
    seats: int = 64
    num_blocks: int = 1000
    max_num_batched_tokens: int = 64
    max_num_seqs: int = 16
    prefix_caching: bool = True
    steps_ahead: int = 0
    drafts: int = 0
    # Slots behind those of a step that a draft model writes.
    lookahead: int = 0
    protect: str | int = "none"
    groups: tuple[Group, ...] = (Group(),)
    policy: str = "fcfs"
    host_blocks: int = 0
    method: str = "rkv"
    compress_prompt: bool = False
    prompt_chunk: int = 2048
    when: str = "always"
    # False: vLLM's --no-scheduler-reserve-full-isl; requests crowd in, and are preempted.
    reserves_prompts: bool = True
    # vLLM's own scheduler and spec.
    stock: bool = False

    @property
    def config(self) -> ServerOptions:
        return ServerOptions(
            method=self.method,
            budget=self.budget,
            buffer=self.buffer,
            window=self.window,
            protect=self.protect,
            seats=self.seats,
            swap_space=self.host_blocks * PAGE_BYTES / 2**30,
            compress_prompt=self.compress_prompt,
            prompt_chunk=self.prompt_chunk,
            when=self.when,
        )

    @property
    def ring_len(self) -> int:
        return self.window + (self.steps_ahead + 1) * (self.drafts + 1)

    def budget_of(self, group_id: int, budget: int) -> int:
        """Tokens that a request with this budget keeps in a group."""
        layer_budget = self.groups[group_id].layer_budget
        if layer_budget is None:
            return budget
        share = (layer_budget - self.window) / (self.budget - self.window)
        return self.window + max(1, round((budget - self.window) * share))


def _stock_spec(group: Group) -> KVCacheSpec:
    """What vLLM itself has for these layers."""
    if group.kind != "full":
        return group.spec
    return FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=1, head_size=32, dtype=torch.float32
    )


def _speculation(drafts: int) -> dict[str, int | str] | None:
    if not drafts:
        return None
    return {"method": "ngram", "prompt_lookup_max": 3, "num_speculative_tokens": drafts}


@cache
def _simulated_config(steps_ahead: int, lookahead: int) -> type[VllmConfig]:
    """VllmConfig with numbers that this platform, or a drafter without a cache, does not have."""
    own = {
        "max_concurrent_batches": property(lambda _: steps_ahead + 1),
        "num_lookahead_tokens": property(lambda _: lookahead),
    }
    return type("SimulatedConfig", (VllmConfig,), own)


@cache
def _engine_config(model: Path, setting: Setting):
    """VllmConfig for a setting, once; nothing in it changes while an engine runs."""
    config = EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=setting.max_num_batched_tokens,
        max_num_seqs=setting.max_num_seqs,
        enable_prefix_caching=setting.prefix_caching,
        enforce_eager=True,
        dtype="float32",
        scheduling_policy=setting.policy,
        scheduler_reserve_full_isl=setting.reserves_prompts,
        speculative_config=_speculation(setting.drafts),
    ).create_engine_config()
    if not setting.stock:
        config.additional_config["kv_compression"] = setting.config.to_dict()
    # The CPU platform switches it off; the scheduler classes do not mind.
    config.scheduler_config.async_scheduling = setting.steps_ahead > 0
    config.__class__ = _simulated_config(setting.steps_ahead, setting.lookahead)
    config.cache_config.num_gpu_blocks = setting.num_blocks
    return config


@dataclass
class WorkerRequest:
    """A worker's mirror of one request.

    Attributes:
        block_ids: the row of each group.
        states: of each group, what its cells hold in order.
        num_evicted: of each group.
    """

    tokens: list[int]
    block_ids: list[list[int]]
    num_computed: int
    admission: int
    num_evicted: list[int]
    states: list[list[Hashable]]
    drafts: list[int] = field(default_factory=list)
    prefill_len: int = 0
    # Logical length that the last compaction judged.
    compacted_at: int = 0

    def reject(self, num_rejected: int) -> None:
        """Forget the last drafts: their cells stay, nobody reads them again."""
        self.num_computed -= num_rejected
        for states in self.states:
            del states[len(states) - num_rejected :]


def plan_of(output: SchedulerOutput) -> StepPlan:
    """Compression's share of a step; vLLM's own scheduler has none."""
    return getattr(output, STEP_PLAN_ATTRIBUTE, None) or StepPlan()


class SimulatedWorker:
    """Executes steps on cells of tags, with the flush where DESIGN puts it."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.cells: dict[int, Hashable] = {}
        self.ring: dict[tuple[int, int, int], Hashable] = {}
        self.requests: dict[str, WorkerRequest] = {}
        self.pending: list[EvictionDirective] = []
        self.carried_out: list[EvictionDirective] = []
        self.skipped = 0
        # Evicted tokens by request and group of those that this step starts behind a compressed
        # prefix; survivors by group, tokens before them, prefix and budget.
        self.adopted: dict[str, dict[int, int]] = {}
        self.compressed: dict[tuple, list[Hashable]] = {}
        self.num_adopted = 0
        self.kept_of: Callable[[str, int], tuple[int, int]] | None = None
        self.watched_steps = 0
        self.admissions = 0
        self.resumes = 0
        # Host blocks: the cells of a block, or all that was recorded in a seat.
        self.host: dict[int, list[Hashable]] = {}
        # What a saved request must find again, by request.
        self.expected: dict[str, WorkerRequest] = {}
        self.swapped_in = 0
        self.carried_out_before_a_save = 0

    @property
    def compactions(self) -> int:
        return len(self.carried_out)

    def execute(self, output: SchedulerOutput) -> None:
        plan = plan_of(output)
        saved = {directive.req_id for directive in plan.saved}
        preempted = (output.preempted_req_ids or set()) - saved
        self.carried_out_before_a_save += sum(d.req_id in saved for d in self.pending)
        self.flush(output.finished_req_ids | preempted)
        for directive in plan.saved:
            self._save(directive)
        self.pending = list(plan.directives)
        self.adopted = {}
        for req_id, group_id, num_evicted in plan.adopted:
            self.adopted.setdefault(req_id, {})[group_id] = num_evicted
        self.num_adopted += len(self.adopted)
        for directive in plan.restored:
            self._restore(directive)
        self.swapped_in += len({directive.req_id for directive in plan.restored})
        self._update_requests(output, {directive.req_id for directive in plan.restored})
        self.watched_steps += sum(map(len, plan.watched.values()))
        for watched in plan.watched.values():
            assert len(set(watched.values())) == len(watched), "two requests in one seat"
        for req_id, num_tokens in output.num_scheduled_tokens.items():
            num_drafts = len(output.scheduled_spec_decode_tokens.get(req_id, ()))
            self.requests[req_id].drafts = [1000 + i for i in range(num_drafts)]
            self._write(req_id, num_tokens, plan.watched)
        for req_id, num_tokens in output.num_scheduled_tokens.items():
            self._attend(req_id, num_tokens)

    def draft(self, req_id: str) -> None:
        """Write what a draft model leaves behind the tokens that were accepted."""
        request = self.requests[req_id]
        for position in range(request.num_computed, request.num_computed + self.setting.lookahead):
            for group_id, row in enumerate(request.block_ids):
                physical = position - request.num_evicted[group_id]
                if position < MAX_MODEL_LEN:
                    self.cells[self.slot(row, physical)] = ("drafted", req_id, position)

    def flush(self, left: set[str] = frozenset()) -> None:
        """Carry out what the last step left, except for requests that have gone since."""
        for directive in self.pending:
            if directive.req_id in left:
                self.skipped += 1
            else:
                self._compact(directive)
        self.pending = []

    def slot(self, block_ids: list[int], physical: int, block_size: int = BLOCK_SIZE) -> int:
        assert physical >= 0, "negative physical position"
        block_id = block_ids[physical // block_size]
        assert block_id != 0, "the null block is inside a row"
        return block_id * MAX_BLOCK_SIZE + physical % block_size

    def _update_requests(self, output: SchedulerOutput, restored: set[str]) -> None:
        for req_id in output.finished_req_ids:
            self.requests.pop(req_id, None)
            self.expected.pop(req_id, None)
        for new in output.scheduled_new_reqs:
            self._admit(new.req_id, new.block_ids, new.num_computed_tokens, new.prompt_token_ids)
        cached = output.scheduled_cached_reqs
        for i, req_id in enumerate(cached.req_ids):
            request = self.requests[req_id]
            new_ids = cached.new_block_ids[i] or [[] for _ in self.setting.groups]
            if req_id in cached.resumed_req_ids:
                tokens = cached.all_token_ids.get(req_id, request.tokens)
                self.resumes += 1
                if req_id in restored:
                    self._readmit(req_id, new_ids, cached.num_computed_tokens[i], tokens)
                    continue
                self.expected.pop(req_id, None)
                self._admit(req_id, new_ids, cached.num_computed_tokens[i], tokens)
            else:
                for row, fresh in zip(request.block_ids, new_ids, strict=True):
                    row.extend(fresh)
                # Steps ahead of the outputs, the scheduler takes all drafts for accepted.
                assert request.num_computed <= cached.num_computed_tokens[i]
                assert self.setting.drafts or request.num_computed == cached.num_computed_tokens[i]

    def _admit(self, req_id: str, block_ids, num_computed: int, tokens) -> None:
        self.admissions += 1
        num_groups = len(self.setting.groups)
        request = WorkerRequest(
            tokens=list(tokens),
            block_ids=[list(row) for row in block_ids],
            num_computed=num_computed,
            admission=self.admissions,
            num_evicted=[0] * num_groups,
            states=[[] for _ in range(num_groups)],
        )
        self.requests[req_id] = request
        request.prefill_len = len(tokens)
        for group_id, num_evicted in self.adopted.get(req_id, {}).items():
            key = group_id, tuple(tokens[:num_computed]), self.kept_of(req_id, group_id)
            request.states[group_id] = list(self.compressed[key])
            request.num_evicted[group_id] = num_evicted
            assert len(request.states[group_id]) == num_computed - num_evicted
        if req_id in self.adopted:
            assert len(self.adopted[req_id]) == num_groups
            return
        for position in range(num_computed):
            for states in request.states:
                states.append(self._state(req_id, request, position))

    def _save(self, directive: SwapDirective) -> None:
        request = self.requests[directive.req_id]
        group_id = directive.group_id
        assert request.num_evicted[group_id] == directive.num_evicted
        num_blocks = len(directive.block_ids)
        assert directive.block_ids == request.block_ids[group_id][:num_blocks]
        for block_id, host_id in zip(directive.block_ids, directive.host_block_ids, strict=True):
            first = block_id * MAX_BLOCK_SIZE
            self.host[host_id] = [self.cells.get(first + i) for i in range(BLOCK_SIZE)]
        if directive.seat >= 0:
            recorded = [
                self.ring.get((group_id, directive.seat, i)) for i in range(self.setting.ring_len)
            ]
            for host_id in directive.host_window_ids:
                self.host[host_id] = recorded
            assert directive.host_window_ids
        self.expected[directive.req_id] = request

    def _restore(self, directive: SwapDirective) -> None:
        assert self.expected[directive.req_id].num_evicted[directive.group_id] == (
            directive.num_evicted
        )
        for block_id, host_id in zip(directive.block_ids, directive.host_block_ids, strict=True):
            for i, cell in enumerate(self.host[host_id]):
                self.cells[block_id * MAX_BLOCK_SIZE + i] = cell
        if directive.seat >= 0:
            for i, recorded in enumerate(self.host[directive.host_window_ids[-1]]):
                self.ring[directive.group_id, directive.seat, i] = recorded

    def _readmit(self, req_id: str, block_ids, num_computed: int, tokens) -> None:
        """A request comes back with the cells that it left; drafts may have been rejected."""
        request = self.expected.pop(req_id)
        assert request.compacted_at <= num_computed <= request.num_computed
        assert self.setting.drafts or num_computed == request.num_computed
        request.tokens = list(tokens)
        request.num_computed = num_computed
        request.block_ids = [list(row) for row in block_ids]
        for group_id, states in enumerate(request.states):
            del states[num_computed - request.num_evicted[group_id] :]
        self.requests[req_id] = request

    def _state(self, req_id: str, request: WorkerRequest, position: int) -> Hashable:
        """Names what a forward writes: a function of the token prefix while nothing was evicted."""
        token = [*request.tokens, *request.drafts][position]
        if any(request.num_evicted) and position < request.prefill_len:
            kept = [self.kept_of(req_id, group_id) for group_id in range(len(request.states))]
            return ("compressed", tuple(request.tokens[: position + 1]), *kept)
        if any(request.num_evicted):
            return ("after eviction", req_id, request.admission, position, token)
        return ("prefix", tuple([*request.tokens, *request.drafts][: position + 1]))

    def _write(self, req_id: str, num_tokens: int, watched: dict[int, dict[str, int]]) -> None:
        request = self.requests[req_id]
        for position in range(request.num_computed, request.num_computed + num_tokens):
            state = self._state(req_id, request, position)
            for group_id, group in enumerate(self.setting.groups):
                states = request.states[group_id]
                physical = position - request.num_evicted[group_id]
                assert physical == len(states), "the physical length disagrees with the states"
                row = request.block_ids[group_id]
                # A state model folds every token into its one block.
                cell = 0 if group.kind == "state" else physical
                self.cells[self.slot(row, cell, group.block_size)] = state
                states.append(state)
                seat = watched.get(group_id, {}).get(req_id)
                if seat is not None:
                    key = (group_id, seat, position % self.setting.ring_len)
                    token = [*request.tokens, *request.drafts][position]
                    self.ring[key] = (req_id, request.admission, position, token)
        request.num_computed += num_tokens

    def _attend(self, req_id: str, num_tokens: int) -> None:
        request = self.requests[req_id]
        for group_id, group in enumerate(self.setting.groups):
            row, states = request.block_ids[group_id], request.states[group_id]
            if group.kind == "state":
                assert self.cells[self.slot(row, 0)] == states[-1], f"{req_id} lost its state"
                continue
            # The first token of the step sees the window that ends with it, or its chunk so far.
            first = len(states) - num_tokens
            oldest = {"sliding": first - SLIDING_WINDOW + 1, "chunked": first // CHUNK * CHUNK}
            for physical in range(max(0, oldest.get(group.kind, 0)), len(states)):
                read = self.cells[self.slot(row, physical, group.block_size)]
                expected = states[physical]
                assert read == expected, f"{req_id} reads {read} at {physical}, not {expected}"
            needed = -(-len(states) // group.block_size)
            # Rejected drafts may leave a block behind that the next tokens will fill.
            drafted = self.setting.drafts * (self.setting.steps_ahead + 1) + self.setting.lookahead
            spare = -(-drafted // group.block_size)
            assert needed <= len(row) <= needed + spare

    def _compact(self, directive: EvictionDirective) -> None:
        self.carried_out.append(directive)
        old_ids, new_ids = directive.old_block_ids, directive.new_block_ids
        # Behind a rejection that the scheduler had not seen lie cells that nobody has written.
        cells = [
            self.cells.get(self.slot(old_ids, physical)) for physical in range(directive.total_len)
        ]
        keep = [*range(directive.prefix_len), *self._select(directive)]
        survivors = [cells[i] for i in keep] + cells[directive.settled_len :]
        num_untouched = directive.prefix_len // BLOCK_SIZE
        assert new_ids[:num_untouched] == old_ids[:num_untouched], "the prefix moves"
        for physical in range(num_untouched * BLOCK_SIZE, len(survivors)):
            self.cells[self.slot(new_ids, physical)] = survivors[physical]
        request = self.requests.get(directive.req_id)
        if request is None:
            return
        states = request.states[directive.group_id]
        length = len(states)
        assert length == len(cells) or self.setting.drafts
        assert states == cells[:length], "the cells changed before the flush"
        if directive.seat >= 0:
            self._check_window(directive, request)
        assert request.num_evicted[directive.group_id] == directive.num_evicted_before
        assert request.block_ids[directive.group_id] == old_ids
        request.states[directive.group_id] = survivors[: length - directive.num_evict]
        request.num_evicted[directive.group_id] += directive.num_evict
        request.compacted_at = directive.settled_logical_len
        if directive.settled_logical_len < request.prefill_len:
            self._note_prefix(directive, request)
        request.block_ids[directive.group_id] = list(new_ids)

    def _note_prefix(self, directive: EvictionDirective, request: WorkerRequest) -> None:
        prefix = tuple(request.tokens[: directive.settled_logical_len])
        key = directive.group_id, prefix, (directive.prefix_len, directive.budget)
        survivors = request.states[directive.group_id][: directive.prefix_len + directive.budget]
        assert self.compressed.setdefault(key, survivors) == survivors

    def _select(self, directive: EvictionDirective) -> list[int]:
        """Any choice of the right size that keeps the window; a function of the directive."""
        window_start = directive.settled_len - self.setting.window
        candidates = range(directive.prefix_len, window_start)
        request = self.requests.get(directive.req_id)
        if request is not None and directive.settled_logical_len < request.prefill_len:
            prefix = tuple(request.tokens[: directive.settled_logical_len])
            random = Random(repr((prefix, directive.prefix_len, directive.budget)))
        else:
            random = Random(repr((directive.req_id, directive.settled_logical_len)))
        kept = sorted(random.sample(candidates, directive.budget - self.setting.window))
        return [*kept, *range(window_start, directive.settled_len)]

    def _check_window(self, directive: EvictionDirective, request: WorkerRequest) -> None:
        end = directive.settled_logical_len
        for position in range(end - self.setting.window, end):
            key = (directive.group_id, directive.seat, position % self.setting.ring_len)
            recorded = self.ring.get(key)
            expected = (
                directive.req_id,
                request.admission,
                position,
                request.tokens[position],
            )
            assert recorded == expected, f"the window holds {recorded}, not {expected}"


class SimulatedEngine:
    """EngineCore's loop over the real scheduler and the simulated worker, with an audit."""

    def __init__(self, model: Path, setting: Setting, seed: int = 0) -> None:
        self.setting = setting
        self.vllm_config = _engine_config(model, setting)
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        kv_cache_config = KVCacheConfig(
            num_blocks=setting.num_blocks,
            kv_cache_tensors=[KVCacheTensor(PAGE_BYTES * setting.num_blocks, [], 0, PAGE_BYTES)],
            kv_cache_groups=[
                KVCacheGroupSpec(
                    [f"layer {i}"], _stock_spec(group) if setting.stock else group.spec
                )
                for i, group in enumerate(setting.groups)
            ],
        )
        stock = AsyncScheduler if setting.steps_ahead else Scheduler
        self.scheduler = (stock if setting.stock else make_scheduler)(
            vllm_config=self.vllm_config,
            kv_cache_config=kv_cache_config,
            structured_output_manager=StructuredOutputManager(self.vllm_config),
            # The least common multiple of the groups' block sizes, as vLLM's engine takes it.
            block_size=max(group.spec.block_size for group in setting.groups),
            hash_block_size=BLOCK_SIZE,
            log_stats=True,
        )
        assert isinstance(self.scheduler, AsyncScheduler) == (setting.steps_ahead > 0)
        tracks = getattr(self.scheduler, "_tracks", ())
        self.tracks = {t.books.kv_cache_group_id: t for t in tracks}
        self.managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.worker = SimulatedWorker(setting)
        self.worker.kept_of = lambda req_id, group_id: (
            self.prefix_lens[req_id],
            setting.budget_of(group_id, self.budgets[req_id]),
        )
        self.queue: deque[SchedulerOutput] = deque()
        self.random = Random(seed)
        self.outputs: dict[str, list[int]] = {}
        self.finished: set[str] = set()
        self.prefill_lens: dict[tuple[str, int], int] = {}
        # What each request asked for, else what holds for all.
        self.is_off: dict[str, bool] = {}
        self.budgets: dict[str, int] = {}
        self.buffers: dict[str, int] = {}
        self.prefix_lens: dict[str, int] = {}
        self.compresses_prompt: dict[str, bool] = {}
        self.stop_after: int | None = None
        self.max_running = 0
        self.num_deferred = 0
        self.num_recomputed = 0
        self.swapped_in: set[str] = set()
        self.num_rejected = 0
        self.prompt_compactions = 0
        self.directives: list[EvictionDirective] = []
        self.sizes_at_start = container_sizes(self.scheduler)
        self.last_output: SchedulerOutput | None = None
        self.last_plan: StepPlan | None = None
        # Set by tests that take blocks away from the pool themselves.
        self.allow_foreign_blocks = False

    @property
    def num_seats_in_use(self) -> int:
        return sum(track.planner.num_seats_in_use for track in self.tracks.values())

    def num_evicted(self, req_id: str) -> int:
        """Tokens evicted from a request, over all groups."""
        return sum(track.books.num_evicted.get(req_id, 0) for track in self.tracks.values())

    def was_swapped_in(self, req_id: str) -> bool:
        """Whether a request came back from host memory at least once."""
        return req_id in self.swapped_in

    def assert_nothing_is_left(self) -> None:
        """No state of requests that are gone."""
        assert self.num_seats_in_use == 0
        assert_nothing_is_left(self.sizes_at_start, self.scheduler)
        if not self.setting.stock and (swap := self.scheduler._swap):
            assert swap.bytes_in_use == 0

    def add(
        self,
        req_id: str,
        prompt: list[int],
        max_tokens: int,
        extra_args: dict[str, int | str] | None = None,
        priority: int = 0,
    ) -> None:
        params = SamplingParams(
            max_tokens=max_tokens,
            ignore_eos=True,
            temperature=0,
            extra_args=extra_args,
            stop_token_ids=[STOP_TOKEN],
        )
        own = extra_args or {}
        self.is_off[req_id] = own.get("kv_compression") == "off"
        self.budgets[req_id] = own.get("kv_budget", self.setting.budget)
        self.buffers[req_id] = own.get("kv_buffer", self.setting.buffer)
        protect = own.get("kv_protect", self.setting.protect)
        self.prefix_lens[req_id] = prefix_len(protect, len(prompt))
        self.compresses_prompt[req_id] = not self.is_off[req_id] and own.get(
            "kv_compress_prompt", self.setting.compress_prompt
        )
        params.update_from_generation_config({}, 0)
        request = Request(req_id, prompt, params, None, priority=priority, block_hasher=self.hasher)
        self.outputs[req_id] = []
        self.scheduler.add_request(request)

    def take_for_granted(self, req_id: str) -> None:
        """Audit a request by the server's lengths, whatever it asked for."""
        self.is_off[req_id] = False
        self.budgets[req_id], self.buffers[req_id] = self.setting.budget, self.setting.buffer
        self.prefix_lens[req_id] = prefix_len(self.setting.protect, 0)
        self.compresses_prompt[req_id] = self.setting.compress_prompt

    def directives_of(self, req_id: str) -> list[EvictionDirective]:
        return [directive for directive in self.directives if directive.req_id == req_id]

    def abort(self, req_id: str) -> None:
        self.scheduler.finish_requests(req_id, RequestStatus.FINISHED_ABORTED)
        self.finished.add(req_id)
        self.audit()

    def preempt_all(self) -> None:
        """Preempt everything that runs; vLLM allows it only when nothing is in flight."""
        self.drain()
        self.scheduler.reset_prefix_cache(reset_running_requests=True)
        self.audit()

    def preempt(self, req_id: str) -> None:
        """Preempt one running request, as vLLM does when the pool is short."""
        request = self.scheduler.requests[req_id]
        self.scheduler.running.remove(request)
        self.scheduler._preempt_request(request, 0.0)
        self.audit()

    def step(self) -> None:
        """Schedule one step and execute the one that is `steps_ahead` older."""
        self.evicted_before = {
            (req_id, group_id): num_evicted
            for group_id, track in self.tracks.items()
            for req_id, num_evicted in track.books.num_evicted.items()
        }
        output = self.scheduler.schedule()
        self.last_output, self.last_plan = output, plan_of(output)
        self.num_deferred += self.last_plan.num_deferred
        self.num_recomputed += self.last_plan.num_recomputed
        self.swapped_in.update(directive.req_id for directive in self.last_plan.restored)
        self._note_prefill_lens(output)
        self._check_plan(output)
        self._check_physical_lengths()
        self.audit()
        self.max_running = max(self.max_running, len(self.scheduler.running))
        self.queue.append(output)
        if len(self.queue) > self.setting.steps_ahead:
            self._process(self.queue.popleft())

    def drain(self) -> None:
        while self.queue:
            self._process(self.queue.popleft())

    def run(self, max_steps: int = 5000) -> None:
        """Step until every request is finished and the workers know."""
        for _ in range(max_steps):
            if not self.scheduler.has_requests():
                self.drain()
                return
            self.step()
        raise AssertionError(f"requests are still unfinished after {max_steps} steps")

    def _process(self, output: SchedulerOutput) -> None:
        for directive in plan_of(output).directives:
            self.directives.append(directive)
        self.worker.execute(output)
        sampled = [self._sample(req_id) for req_id in output.num_scheduled_tokens]
        req_ids = list(output.num_scheduled_tokens)
        result = ModelRunnerOutput(
            req_ids=req_ids,
            req_id_to_index={req_id: i for i, req_id in enumerate(req_ids)},
            sampled_token_ids=sampled,
        )
        engine_outputs = self.scheduler.update_from_output(output, result)
        if self.setting.drafts and not self.setting.steps_ahead:
            self._propose(req_ids)
        for outputs in engine_outputs.values():
            for item in outputs.outputs:
                self.outputs[item.request_id].extend(item.new_token_ids)
                if item.finish_reason is not None:
                    self.finished.add(item.request_id)
        self.audit()

    def _sample(self, req_id: str) -> list[int]:
        """Accepted drafts and one more token when the step reached the end, else none."""
        request = self.worker.requests[req_id]
        if request.num_computed < len(request.tokens):
            return []
        num_accepted = self.random.randint(0, len(request.drafts))
        rejected = len(request.drafts) - num_accepted
        request.reject(rejected)
        self.num_rejected += rejected
        is_last = self.stop_after is not None and len(self.outputs[req_id]) + 1 >= self.stop_after
        if self.setting.lookahead:
            self.worker.draft(req_id)
        last = STOP_TOKEN if is_last else self.random.randrange(100)
        sampled = [*request.drafts[:num_accepted], last]
        request.tokens.extend(sampled)
        request.drafts = []
        return sampled

    def _propose(self, req_ids: list[str]) -> None:
        """Drafts for the next step; ahead of the outputs the scheduler makes them up itself."""
        drafts = [[7] * self.random.randint(0, self.setting.drafts) for _ in req_ids]
        self.scheduler.update_draft_token_ids(DraftTokenIds(req_ids, drafts))

    def _note_prefill_lens(self, output: SchedulerOutput) -> None:
        for directive in self.last_plan.restored:
            req_id = directive.req_id
            num_preemptions = self.scheduler.requests[req_id].num_preemptions
            before = self.prefill_lens.get((req_id, num_preemptions - 1))
            if before is not None:
                self.prefill_lens[req_id, num_preemptions] = before
        for req_id in output.num_scheduled_tokens:
            request = self.scheduler.requests[req_id]
            if not request.is_prefill_chunk:
                key = (req_id, request.num_preemptions)
                self.prefill_lens.setdefault(key, request.num_computed_tokens)

    def _first_boundary(self, request: Request) -> int | None:
        """SPEC section 6: where the prefill is compacted first, None for never."""
        req_id, chunk = request.request_id, self.setting.prompt_chunk
        if not self.compresses_prompt[req_id]:
            return None
        budgets = [
            self.setting.budget_of(group_id, self.budgets[req_id]) for group_id in self.tracks
        ]
        kept = self.prefix_lens[req_id] + min(budgets)
        if request.num_tokens <= kept + chunk:
            return None
        return (kept // chunk + 1) * chunk

    def _due_prompts(self, output: SchedulerOutput) -> set[tuple[str, int]]:
        """Requests and groups whose prompt has to be compacted right after this step."""
        due = set()
        for req_id in output.num_scheduled_tokens:
            request = self.scheduler.requests[req_id]
            first, end = self._first_boundary(request), request.num_computed_tokens
            if first is None or not request.is_prefill_chunk:
                continue
            if end >= first and end % self.setting.prompt_chunk == 0:
                for group_id in self.tracks:
                    before = self.evicted_before.get((req_id, group_id), 0)
                    budget = self.setting.budget_of(group_id, self.budgets[req_id])
                    if end - before > self.prefix_lens[req_id] + budget:
                        due.add((req_id, group_id))
        return due

    def _check_plan(self, output: SchedulerOutput) -> None:
        """SPEC sections 3 and 6, properties 1 and 2, recomputed from vLLM's own counters."""
        due_prompts = self._due_prompts(output)
        for directive in plan_of(output).directives:
            req_id, prefix_len = directive.req_id, directive.prefix_len
            request = self.scheduler.requests[req_id]
            budget = self.setting.budget_of(directive.group_id, self.budgets[req_id])
            assert not self.is_off[req_id], "compacted against its will"
            is_prompt = (req_id, directive.group_id) in due_prompts
            due_prompts.discard((req_id, directive.group_id))
            self.prompt_compactions += is_prompt
            assert request.is_prefill_chunk == is_prompt, "compacted in the middle of a prefill"
            assert prefix_len == self.prefix_lens[req_id]
            assert directive.settled_len - prefix_len - directive.num_evict == budget
            settled = request.num_computed_tokens
            if is_prompt:
                assert directive.settled_logical_len == settled
            else:
                if self.setting.when == "always":
                    assert directive.settled_len - prefix_len >= budget + self.buffers[req_id]
                settled -= request.num_in_flight_tokens
                # One that was swapped in settles as late as if it had never left.
                slack = self.setting.steps_ahead * self.was_swapped_in(req_id)
                assert settled - slack <= directive.settled_logical_len <= settled
            kept = directive.total_len - directive.num_evict
            assert len(directive.new_block_ids) == -(-kept // BLOCK_SIZE)
            held = self.managers[directive.group_id].req_to_blocks[req_id]
            assert [block.block_id for block in held] == directive.new_block_ids
            for block in held[prefix_len // BLOCK_SIZE :]:
                assert block.ref_cnt == 1, "a compaction writes a shared block"
                assert block.block_hash is None, "a compaction writes a findable block"
        assert not due_prompts, "a prompt is not compacted at its boundary"
        assert self._num_emptied_but_kept() == 0

    def _num_emptied_but_kept(self) -> int:
        books = [track.books for track in self.tracks.values()]
        return sum(len(b._emptied) + len(b._set_aside) + len(b._moving) for b in books)

    def audit(self) -> None:
        """Every block is owned as often as rows hold it, and free otherwise."""
        owners: dict[int, int] = {}
        for group, manager in zip(self.setting.groups, self.managers, strict=True):
            for req_id, blocks in manager.req_to_blocks.items():
                ids = [block.block_id for block in blocks]
                if group.kind == "full":
                    assert 0 not in ids, f"{req_id} holds the null block"
                ids = [block_id for block_id in ids if block_id]
                assert len(set(ids)) == len(ids), f"{req_id} holds a block twice"
                for block_id in ids:
                    owners[block_id] = owners.get(block_id, 0) + 1
        for block in self.pool.blocks[1:]:
            owned = owners.get(block.block_id, 0)
            foreign = self.allow_foreign_blocks and not owned
            assert foreign or block.ref_cnt == owned, f"block {block} is leaked"
        if not self.allow_foreign_blocks:
            assert self.pool.get_num_free_blocks() == self.setting.num_blocks - 1 - len(owners)
        if not self.setting.stock and self.scheduler._swap is not None:
            self._audit_host()
        for track in self.tracks.values():
            books = track.books
            assert books.total_evicted == sum(books.num_evicted.values())
            for req_id in books.num_evicted:
                row = books.req_to_blocks[req_id]
                assert row, f"{req_id} was compacted but holds nothing"
                behind = row[self.prefix_lens[req_id] // BLOCK_SIZE :]
                published = [block.block_id for block in behind if block.block_hash is not None]
                # Survivors of a prompt may be found; `_check_plan` sees that none is written.
                assert self.compresses_prompt[req_id] or not published, (
                    f"{req_id} publishes blocks {published} after an eviction"
                )

    def _audit_host(self) -> None:
        """Every host block is free, or belongs to one request that waits for its return."""
        swap = self.scheduler._swap
        held = list(swap._free)
        for req_id, absent in swap._absent.items():
            assert self.scheduler.requests[req_id].status == RequestStatus.PREEMPTED
            for part in absent.parts:
                held += [*part.host_block_ids, *part.host_window_ids]
        assert sorted(held) == list(range(self.setting.host_blocks)), "host blocks are leaked"

    def _check_physical_lengths(self) -> None:
        """SPEC 4.1; a request that had to wait may be longer, so waiting ones are left out."""
        if self.setting.when == "pressure":
            return
        for request in self.scheduler.running:
            req_id = request.request_id
            for group_id, track in self.tracks.items():
                progress = track.planner._progress.get(req_id)
                physical = request.num_computed_tokens - track.books.num_evicted.get(req_id, 0)
                budget = self.setting.budget_of(group_id, self.budgets[req_id])
                longest = self.prefix_lens[req_id] + budget + self.setting.prompt_chunk
                if self._first_boundary(request) is not None and request.is_prefill_chunk:
                    held = len(track.books.req_to_blocks[req_id])
                    most = -(-(longest + self.setting.lookahead) // BLOCK_SIZE)
                    assert held <= most, f"{req_id} outgrows its bound"
                if progress is None or progress.waits:
                    continue
                prefill_len = self.prefill_lens[req_id, request.num_preemptions]
                if self.compresses_prompt[req_id]:
                    prefill_len = min(prefill_len, longest)
                # Accepted drafts settle together, so the step before may end that far behind.
                bound = max(prefill_len, self.prefix_lens[req_id] + budget)
                bound += self.buffers[req_id] + self.setting.drafts
                slack = self.setting.steps_ahead * self.was_swapped_in(req_id)
                # It may have to sit out a step that others fill, its outputs processed.
                in_flight = max(request.num_in_flight_tokens, 1 + self.setting.steps_ahead)
                assert physical <= bound + in_flight + slack, req_id
