"""Watches every block of an engine: who owns it, what is written where, what lies in the others.

Each step is given, when it is scheduled, the rows that its forward must use: worked out from the
scheduler's books and lengths alone. Every worker then compares what its first layer really writes,
slot by slot, and may fill all blocks that nobody holds with NaN, so that whoever reads one of them
says so. Runs in the process of the test and in those of ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request
from vllm.v1.worker.worker_base import WorkerWrapperBase

from rkv_vllm.scheduling.directive import STEP_PLAN_ATTRIBUTE
from tests.engine import Engine, running_engine

STEP_ATTRIBUTE = "audited"
NULL_BLOCK = 0
# Written into the null block, which nobody may write or read.
SENTINEL = 12345.0
# In new blocks until they are written. Not NaN: vLLM's kernel for CPUs multiplies what lies behind
# a request's last token by zero.
UNWRITTEN = 1e4


@dataclass
class StepBlocks:
    """What a forward must do with the blocks of the first group.

    Attributes:
        slots: that it writes, sorted.
        nobodys: blocks that hold nothing anybody will read again.
    """

    slots: list[int] = field(default_factory=list)
    nobodys: set[int] = field(default_factory=set)


@dataclass
class Watch:
    """What one worker saw.

    Attributes:
        steps: forwards compared.
        slots: slots compared.
        in_null_block: slots of them in block 0.
        poisoned: blocks filled with NaN, those that were never used included.
    """

    steps: int = 0
    slots: int = 0
    in_null_block: int = 0
    poisoned: int = 0


class BlockAudit:
    """The scheduler's side: works out the rows of each step and checks the ownership of blocks.

    Attributes:
        engine: audited.
        resumed_at: output tokens at which each preempted request began again, by the id that the
            test gave.
        freed: blocks that each preemption gave back.
        idle_steps: that scheduled no token while none was in flight and somebody waited.
    """

    def __init__(self, engine: Engine, poison: bool = False) -> None:
        self.engine = engine
        self.resumed_at: dict[str, list[int]] = {}
        self.freed: list[int] = []
        self.idle_steps = 0
        self._num_preemptions: dict[str, int] = {}
        self._watch_scheduler(engine.scheduler)
        engine.llm.collective_rpc(watch_blocks, args=(poison,))

    def _watch_scheduler(self, scheduler: Scheduler) -> None:
        schedule, preempt = scheduler.schedule, scheduler._preempt_request

        def noting(*args: Any, **kwargs: Any) -> SchedulerOutput:
            in_flight = sum(request.num_in_flight_tokens for request in scheduler.running)
            output = schedule(*args, **kwargs)
            setattr(output, STEP_ATTRIBUTE, self._blocks_of(output))
            waits = scheduler.has_unfinished_requests()
            self.idle_steps += waits and not in_flight and not output.total_num_scheduled_tokens
            for req_id in output.num_scheduled_tokens:
                self._note_resume(scheduler.requests[req_id])
            return output

        def preempting(request: Request, *args: Any, **kwargs: Any) -> None:
            before = self.engine.pool.get_num_free_blocks()
            preempt(request, *args, **kwargs)
            self.freed.append(self.engine.pool.get_num_free_blocks() - before)

        scheduler.schedule, scheduler._preempt_request = noting, preempting

    def _note_resume(self, request: Request) -> None:
        before = self._num_preemptions.get(request.request_id, 0)
        if request.num_preemptions > before:
            self._num_preemptions[request.request_id] = request.num_preemptions
            name = request.request_id.rsplit("-", 1)[0]
            self.resumed_at.setdefault(name, []).append(request.num_output_tokens)

    def watches(self) -> list[Watch]:
        """What each worker saw."""
        return self.engine.llm.collective_rpc(watch_of)

    def assert_nothing_is_left(self) -> None:
        """No block, seat, count or gauge of requests that are gone."""
        self.engine.assert_pool_is_empty()
        scheduler = self.engine.scheduler
        assert not scheduler._known
        assert not scheduler._prefilling
        for track in scheduler._tracks:
            assert track.planner.num_seats_in_use == 0
            assert track.books.total_evicted == 0
            assert not track.books.num_evicted
        stats = scheduler.make_stats()
        assert stats.num_running_reqs == stats.num_waiting_reqs == 0
        assert stats.kv_cache_usage == 0

    def _blocks_of(self, output: SchedulerOutput) -> StepBlocks:
        scheduler = self.engine.scheduler
        plan = getattr(output, STEP_PLAN_ATTRIBUTE)
        books = scheduler._tracks[0].books
        group_id = books.kv_cache_group_id
        booked = {d.req_id: d for d in plan.directives if d.group_id == group_id}
        rows = {r: [b.block_id for b in row] for r, row in books.req_to_blocks.items()}
        self._check_owners(rows)
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        step = StepBlocks()
        held = {block_id for row in rows.values() for block_id in row}
        for req_id, num_tokens in output.num_scheduled_tokens.items():
            directive, row = booked.get(req_id), rows[req_id]
            num_evicted = books.num_evicted.get(req_id, 0)
            if directive is not None:
                # It is carried out behind this forward, which still uses the old row.
                row = directive.old_block_ids
                num_evicted -= directive.num_evict
                held.update(row)
            first = computed[req_id] - num_evicted
            for physical in range(first, first + num_tokens):
                block_id = row[physical // books.block_size]
                step.slots.append(block_id * books.block_size + physical % books.block_size)
        step.slots.sort()
        step.nobodys = {
            block.block_id
            for block in self.engine.pool.blocks[1:]
            if block.block_id not in held and block.block_hash is None
        }
        return step

    def _check_owners(self, rows: dict[str, list[int]]) -> None:
        owners: dict[int, int] = {}
        for req_id, row in rows.items():
            assert NULL_BLOCK not in row, f"{req_id} holds the null block"
            assert len(set(row)) == len(row), f"{req_id} holds a block twice"
            for block_id in row:
                owners[block_id] = owners.get(block_id, 0) + 1
        pool = self.engine.pool
        for block in pool.blocks[1:]:
            assert block.ref_cnt == owners.get(block.block_id, 0), f"{block} is leaked"
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1 - len(owners)
        if not self.engine.llm.llm_engine.vllm_config.cache_config.enable_prefix_caching:
            assert all(count == 1 for count in owners.values()), "a block has two owners"


def watch_blocks(worker: WorkerWrapperBase, poison: bool) -> None:
    """Compare and poison from now on; runs in every worker."""
    runner = worker.worker.model_runner
    layers = list(runner._compressed_layers().values())
    runner.watch = watch = Watch()
    for layer in layers:
        layer.kv_cache[NULL_BLOCK] = SENTINEL
    step, poisoned = StepBlocks(), set()
    execute, begin_step = runner.execute_model, runner.compactor.begin_step
    # Not a method of the layer: it is asked for through the implementation.
    first, write = layers[0].impl, layers[0].impl.do_kv_cache_update

    def executing(output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        nonlocal step
        step = getattr(output, STEP_ATTRIBUTE)
        result = execute(output, *args, **kwargs)
        for layer in layers:
            assert (layer.kv_cache[NULL_BLOCK] == SENTINEL).all(), "the null block was written"
        return result

    def beginning(*args: Any, **kwargs: Any) -> None:
        # What the last step left is carried out and saved by now.
        nonlocal poisoned
        if poison:
            for layer in layers:
                layer.kv_cache[list(poisoned - step.nobodys)] = UNWRITTEN
                layer.kv_cache[list(step.nobodys - poisoned)] = float("nan")
            watch.poisoned += len(step.nobodys - poisoned)
            poisoned = step.nobodys
        begin_step(*args, **kwargs)

    def writing(layer: Any, key: Any, value: Any, kv_cache: Any, slots: torch.Tensor) -> None:
        written = sorted(slots[slots >= 0].tolist())
        assert written == step.slots, f"writes slots {written}, not {step.slots}"
        block_size = runner.cache_config.block_size
        watch.in_null_block += sum(slot // block_size == NULL_BLOCK for slot in written)
        watch.slots += len(written)
        watch.steps += 1
        write(layer, key, value, kv_cache, slots)

    runner.execute_model = executing
    runner.compactor.begin_step = beginning
    first.do_kv_cache_update = writing


def watch_of(worker: WorkerWrapperBase) -> Watch:
    """What a worker saw; runs in it."""
    return worker.worker.model_runner.watch


@contextmanager
def blocks_of_16() -> Iterator[None]:
    """Let vLLM make blocks of 16 tokens on a CPU: its kernel can, its backend declares 32."""
    declared = CPUAttentionBackend.__dict__["get_supported_kernel_block_sizes"]
    CPUAttentionBackend.get_supported_kernel_block_sizes = staticmethod(
        lambda kv_cache_spec=None: [MultipleOf(16)]
    )
    try:
        yield
    finally:
        CPUAttentionBackend.get_supported_kernel_block_sizes = declared


@contextmanager
def audited_engine(
    model: Path, num_blocks: int, *, poison: bool = False, **options: Any
) -> Iterator[tuple[Engine, BlockAudit]]:
    """An engine of blocks of 16 whose every step is audited; in the end all was given back.

    Args:
        model: folder of a model.
        num_blocks: of the pool, the null block included.
        poison: whether blocks that nobody holds are NaN.
        options: as for `running_engine`.
    """
    # Eager: the replay of a graph would pass by what watches a layer.
    options = {"block_size": 16, "disable_log_stats": False, "enforce_eager": True, **options}
    with blocks_of_16(), running_engine(model, num_blocks, **options) as engine:
        audit = BlockAudit(engine, poison)
        yield engine, audit
        audit.assert_nothing_is_left()
        for watch in audit.watches():
            assert watch.slots > 0
            assert watch.in_null_block == 0
            assert bool(watch.poisoned) == poison
