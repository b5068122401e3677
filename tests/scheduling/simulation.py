"""A real vLLM scheduler and block pool, with a worker that knows where every token's cell lies.

The simulated worker executes SchedulerOutputs late, as asynchronous scheduling does, on a memory of
tags instead of tensors: a cell holds the name of the token state that was written to it. After
every forward each request must read back exactly the states it expects, so an overwritten survivor,
a freed block that is still read, a stale count or a polluted prefix cache shows up at once. No
model, no tensors.
"""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from rkv_vllm.config import KVCompressionConfig
from rkv_vllm.scheduling.directive import STEP_PLAN_ATTRIBUTE, EvictionDirective, StepPlan
from rkv_vllm.scheduling.scheduler import CompressionAsyncScheduler, make_scheduler
from rkv_vllm.scheduling.spec import CompressedAttentionSpec

BLOCK_SIZE = 4
MAX_MODEL_LEN = 256


@dataclass(frozen=True)
class Setting:
    """What one simulated engine is made of; lengths in tokens."""

    budget: int = 8
    buffer: int = 4
    window: int = 2
    slots: int = 64
    num_blocks: int = 1000
    max_num_batched_tokens: int = 64
    max_num_seqs: int = 16
    prefix_caching: bool = True
    steps_ahead: int = 0
    drafts: int = 0

    @property
    def config(self) -> KVCompressionConfig:
        return KVCompressionConfig(
            budget=self.budget,
            buffer=self.buffer,
            window=self.window,
            pool=1,
            observation_slots=self.slots,
        )

    @property
    def ring_len(self) -> int:
        return self.window + (self.steps_ahead + 1) * (self.drafts + 1)


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
    ).create_engine_config()
    config.additional_config["kv_compression"] = setting.config.to_dict()
    # The CPU platform switches it off; the scheduler classes do not mind.
    config.scheduler_config.async_scheduling = setting.steps_ahead > 0
    config.cache_config.num_gpu_blocks = setting.num_blocks
    return config


@dataclass
class WorkerRequest:
    """A worker's mirror of one request."""

    tokens: list[int]
    block_ids: list[int]
    num_computed: int
    admission: int
    num_evicted: int = 0
    states: list[Hashable] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)

    def reject(self, num_rejected: int) -> None:
        """Forget the last drafts: their cells stay, nobody reads them again."""
        self.num_computed -= num_rejected
        del self.states[len(self.states) - num_rejected :]


class SimulatedWorker:
    """Executes steps on cells of tags, with the flush where DESIGN puts it."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.cells: dict[int, Hashable] = {}
        self.ring: dict[tuple[int, int], Hashable] = {}
        self.requests: dict[str, WorkerRequest] = {}
        self.pending: list[EvictionDirective] = []
        self.compactions = 0
        self.admissions = 0
        self.resumes = 0

    def execute(self, output: SchedulerOutput) -> None:
        self.flush()
        plan: StepPlan = getattr(output, STEP_PLAN_ATTRIBUTE)
        self.pending = list(plan.directives)
        self._update_requests(output)
        for req_id, num_tokens in output.num_scheduled_tokens.items():
            num_drafts = len(output.scheduled_spec_decode_tokens.get(req_id, ()))
            self.requests[req_id].drafts = [1000 + i for i in range(num_drafts)]
            self._write(req_id, num_tokens, plan.watched.get(req_id))
        for req_id in output.num_scheduled_tokens:
            self._attend(req_id)

    def flush(self) -> None:
        for directive in self.pending:
            self._compact(directive)
        self.pending = []

    def slot(self, block_ids: list[int], physical: int) -> int:
        assert physical >= 0, "negative physical position"
        block_id = block_ids[physical // BLOCK_SIZE]
        assert block_id != 0, "the null block is inside a row"
        return block_id * BLOCK_SIZE + physical % BLOCK_SIZE

    def _update_requests(self, output: SchedulerOutput) -> None:
        for req_id in output.finished_req_ids:
            self.requests.pop(req_id, None)
        for new in output.scheduled_new_reqs:
            self._admit(new.req_id, new.block_ids[0], new.num_computed_tokens, new.prompt_token_ids)
        cached = output.scheduled_cached_reqs
        for i, req_id in enumerate(cached.req_ids):
            request = self.requests[req_id]
            new_ids = cached.new_block_ids[i][0] if cached.new_block_ids[i] else []
            if req_id in cached.resumed_req_ids:
                tokens = cached.all_token_ids.get(req_id, request.tokens)
                self.resumes += 1
                self._admit(req_id, new_ids, cached.num_computed_tokens[i], tokens)
            else:
                request.block_ids = request.block_ids + new_ids
                # Steps ahead of the outputs, the scheduler takes all drafts for accepted.
                assert request.num_computed <= cached.num_computed_tokens[i]
                assert self.setting.drafts or request.num_computed == cached.num_computed_tokens[i]

    def _admit(self, req_id: str, block_ids: list[int], num_computed: int, tokens) -> None:
        self.admissions += 1
        request = WorkerRequest(list(tokens), list(block_ids), num_computed, self.admissions)
        self.requests[req_id] = request
        for position in range(num_computed):
            request.states.append(self._state(req_id, request, position))

    def _state(self, req_id: str, request: WorkerRequest, position: int) -> Hashable:
        """Names what a forward writes: a function of the token prefix while nothing was evicted."""
        if request.num_evicted:
            return ("after eviction", req_id, request.admission, position)
        return ("prefix", tuple([*request.tokens, *request.drafts][: position + 1]))

    def _write(self, req_id: str, num_tokens: int, slot: int | None) -> None:
        request = self.requests[req_id]
        for position in range(request.num_computed, request.num_computed + num_tokens):
            state = self._state(req_id, request, position)
            physical = position - request.num_evicted
            assert physical == len(request.states), "the physical length disagrees with the states"
            self.cells[self.slot(request.block_ids, physical)] = state
            request.states.append(state)
            if slot is not None:
                key = (slot, position % self.setting.ring_len)
                self.ring[key] = (req_id, request.admission, position)
        request.num_computed += num_tokens

    def _attend(self, req_id: str) -> None:
        request = self.requests[req_id]
        for physical, state in enumerate(request.states):
            read = self.cells[self.slot(request.block_ids, physical)]
            assert read == state, f"{req_id} reads {read} at {physical}, not {state}"
        needed = -(-len(request.states) // BLOCK_SIZE)
        # Rejected drafts may leave a block behind that the next tokens will fill.
        spare = -(-self.setting.drafts * (self.setting.steps_ahead + 1) // BLOCK_SIZE)
        assert needed <= len(request.block_ids) <= needed + spare

    def _compact(self, directive: EvictionDirective) -> None:
        self.compactions += 1
        # Behind a rejection that the scheduler had not seen lie cells that nobody has written.
        cells = [
            self.cells.get(self.slot(directive.old_block_ids, physical))
            for physical in range(directive.total_len)
        ]
        keep = self._select(directive)
        survivors = [cells[i] for i in keep] + cells[directive.settled_len :]
        for physical, state in enumerate(survivors):
            self.cells[self.slot(directive.new_block_ids, physical)] = state
        request = self.requests.get(directive.req_id)
        if request is None:
            return
        length = len(request.states)
        assert length == len(cells) or self.setting.drafts
        assert request.states == cells[:length], "the cells changed before the flush"
        self._check_window(directive, request)
        assert request.num_evicted == directive.num_evicted_before
        assert request.block_ids == directive.old_block_ids
        request.states = survivors[: length - directive.num_evict]
        request.num_evicted += directive.num_evict
        request.block_ids = list(directive.new_block_ids)

    def _select(self, directive: EvictionDirective) -> list[int]:
        """Any choice of the right size that keeps the window; a function of the directive."""
        budget = directive.settled_len - directive.num_evict
        candidates = range(directive.settled_len - self.setting.window)
        random = Random(repr((directive.req_id, directive.settled_logical_len)))
        kept = sorted(random.sample(candidates, budget - self.setting.window))
        return [*kept, *range(directive.settled_len - self.setting.window, directive.settled_len)]

    def _check_window(self, directive: EvictionDirective, request: WorkerRequest) -> None:
        end = directive.settled_logical_len
        for position in range(end - self.setting.window, end):
            recorded = self.ring.get((directive.slot, position % self.setting.ring_len))
            expected = (directive.req_id, request.admission, position)
            assert recorded == expected, f"the window holds {recorded}, not {expected}"


class SimulatedEngine:
    """EngineCore's loop over the real scheduler and the simulated worker, with an audit."""

    def __init__(self, model: Path, setting: Setting, seed: int = 0) -> None:
        self.setting = setting
        self.vllm_config = _engine_config(model, setting)
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        spec = CompressedAttentionSpec(
            block_size=BLOCK_SIZE, num_kv_heads=1, head_size=32, dtype=torch.float32
        )
        kv_cache_config = KVCacheConfig(
            num_blocks=setting.num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        )
        self.scheduler = make_scheduler(
            vllm_config=self.vllm_config,
            kv_cache_config=kv_cache_config,
            structured_output_manager=StructuredOutputManager(self.vllm_config),
            block_size=BLOCK_SIZE,
            log_stats=True,
        )
        assert isinstance(self.scheduler, CompressionAsyncScheduler) == (setting.steps_ahead > 0)
        # The option itself is refused; the counters it moves are the scheduler's own.
        self.scheduler.num_spec_tokens = setting.drafts
        self.manager = self.scheduler._block_manager
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.worker = SimulatedWorker(setting)
        self.queue: deque[SchedulerOutput] = deque()
        self.random = Random(seed)
        self.outputs: dict[str, list[int]] = {}
        self.finished: set[str] = set()
        self.prefill_lens: dict[tuple[str, int], int] = {}
        # What each request asked for, else what holds for all.
        self.is_off: dict[str, bool] = {}
        self.budgets: dict[str, int] = {}
        self.buffers: dict[str, int] = {}
        self.max_running = 0
        self.num_deferred = 0
        self.num_rejected = 0
        self.directives: list[EvictionDirective] = []
        self.last_output: SchedulerOutput | None = None
        # Set by tests that take blocks away from the pool themselves.
        self.allow_foreign_blocks = False

    def add(
        self,
        req_id: str,
        prompt: list[int],
        max_tokens: int,
        extra_args: dict[str, int | str] | None = None,
    ) -> None:
        params = SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, temperature=0, extra_args=extra_args
        )
        own = extra_args or {}
        self.is_off[req_id] = own.get("kv_compression") == "off"
        self.budgets[req_id] = own.get("kv_budget", self.setting.budget)
        self.buffers[req_id] = own.get("kv_buffer", self.setting.buffer)
        params.update_from_generation_config({}, 0)
        request = Request(req_id, prompt, params, None, block_hasher=self.hasher)
        self.outputs[req_id] = []
        self.scheduler.add_request(request)

    def abort(self, req_id: str) -> None:
        self.scheduler.finish_requests(req_id, RequestStatus.FINISHED_ABORTED)
        self.finished.add(req_id)
        self.audit()

    def preempt_all(self) -> None:
        """Preempt everything that runs; vLLM allows it only when nothing is in flight."""
        self.drain()
        self.scheduler.reset_prefix_cache(reset_running_requests=True)
        self.audit()

    def step(self) -> None:
        """Schedule one step and execute the one that is `steps_ahead` older."""
        output = self.scheduler.schedule()
        self.last_output = output
        self.num_deferred += getattr(output, STEP_PLAN_ATTRIBUTE).num_deferred
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
        for directive in getattr(output, STEP_PLAN_ATTRIBUTE).directives:
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
        sampled = [*request.drafts[:num_accepted], self.random.randrange(100)]
        request.tokens.extend(sampled)
        request.drafts = []
        return sampled

    def _propose(self, req_ids: list[str]) -> None:
        """Drafts for the next step; ahead of the outputs the scheduler makes them up itself."""
        drafts = [[7] * self.random.randint(0, self.setting.drafts) for _ in req_ids]
        self.scheduler.update_draft_token_ids(DraftTokenIds(req_ids, drafts))

    def _note_prefill_lens(self, output: SchedulerOutput) -> None:
        for req_id in output.num_scheduled_tokens:
            request = self.scheduler.requests[req_id]
            if not request.is_prefill_chunk:
                key = (req_id, request.num_preemptions)
                self.prefill_lens.setdefault(key, request.num_computed_tokens)

    def _check_plan(self, output: SchedulerOutput) -> None:
        """SPEC section 3 and properties 1 and 2, recomputed from vLLM's own counters."""
        plan: StepPlan = getattr(output, STEP_PLAN_ATTRIBUTE)
        for directive in plan.directives:
            request = self.scheduler.requests[directive.req_id]
            budget = self.budgets[directive.req_id]
            assert not self.is_off[directive.req_id], "compacted against its will"
            assert not request.is_prefill_chunk, "compacted in the middle of a prefill"
            assert directive.settled_len - directive.num_evict == budget
            assert directive.settled_len >= budget + self.buffers[directive.req_id]
            settled = request.num_computed_tokens - request.num_in_flight_tokens
            assert directive.settled_logical_len == settled
            kept = directive.total_len - directive.num_evict
            assert len(directive.new_block_ids) == -(-kept // BLOCK_SIZE)
            row = [block.block_id for block in self.manager.req_to_blocks[directive.req_id]]
            assert row == directive.new_block_ids
            for block_id in row:
                block = self.pool.blocks[block_id]
                assert block.ref_cnt == 1, "a compaction writes a shared block"
                assert block.block_hash is None, "a compaction writes a findable block"

    def audit(self) -> None:
        """Every block is owned as often as rows hold it, and free otherwise."""
        owners: dict[int, int] = {}
        for req_id, blocks in self.manager.req_to_blocks.items():
            ids = [block.block_id for block in blocks]
            assert 0 not in ids, f"{req_id} holds the null block"
            assert len(set(ids)) == len(ids), f"{req_id} holds a block twice"
            for block_id in ids:
                owners[block_id] = owners.get(block_id, 0) + 1
        for block in self.pool.blocks[1:]:
            owned = owners.get(block.block_id, 0)
            foreign = self.allow_foreign_blocks and not owned
            assert foreign or block.ref_cnt == owned, f"block {block} is leaked"
        if not self.allow_foreign_blocks:
            assert self.pool.get_num_free_blocks() == self.setting.num_blocks - 1 - len(owners)
        for req_id in self.manager._num_evicted:
            row = self.manager.req_to_blocks[req_id]
            assert row, f"{req_id} was compacted but holds nothing"
            published = [block.block_id for block in row if block.block_hash is not None]
            assert not published, f"{req_id} publishes blocks {published} after an eviction"

    def _check_physical_lengths(self) -> None:
        """SPEC 4.1; a request that had to wait may be longer, so waiting ones are left out."""
        for request in self.scheduler.running:
            progress = self.scheduler._planner._progress.get(request.request_id)
            if progress is None or progress.deferred:
                continue
            physical = request.num_computed_tokens - self.manager.num_evicted(request.request_id)
            prefill_len = self.prefill_lens[request.request_id, request.num_preemptions]
            # Accepted drafts settle together, so the step before may end that far behind the mark.
            bound = max(prefill_len, self.budgets[request.request_id])
            bound += self.buffers[request.request_id] + self.setting.drafts
            assert physical <= bound + request.num_in_flight_tokens, request.request_id
