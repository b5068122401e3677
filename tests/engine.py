"""A vLLM engine in this process that tests can step, look into and throw away."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.platforms import current_platform
from vllm.v1.core.sched.scheduler import Scheduler

import rkv_vllm
from tests.leftovers import assert_nothing_is_left, container_sizes
from tests.models import kv_cache_bytes
from tests.worker.rows import assert_rows_agree

BLOCK_SIZE = 32
# What engines on a GPU get as well: several share it, and all of a step is one captured graph.
GPU_OPTIONS: dict[str, Any] = {
    "gpu_memory_utilization": 0.05,
    "async_scheduling": False,
    "enforce_eager": False,
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL"},
}


@dataclass
class Output:
    """What one request said."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False


class Engine:
    """An offline LLM, driven step by step."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.block_size = llm.llm_engine.vllm_config.cache_config.block_size
        self.outputs: dict[str, Output] = {}
        self.max_running = 0
        self.running_per_step: list[int] = []
        self.num_computed_tokens = 0
        self.cached_tokens: dict[str, int] = {}
        self.preempted_at: dict[str, list[int]] = {}
        self.compacted_rows_checked = 0
        self._count_preemptions()
        self._count_computed_tokens()
        self._sizes_at_start = container_sizes(*self._roots)

    @property
    def _roots(self) -> tuple[object, ...]:
        """Where state of requests is kept; other processes' is out of reach."""
        if not self._is_one_process:
            return (self.scheduler,)
        return self.scheduler, self.model_runner

    @property
    def scheduler(self) -> Scheduler:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def model_runner(self):
        executor = self.llm.llm_engine.engine_core.engine_core.model_executor
        return executor.driver_worker.worker.model_runner

    @property
    def _is_one_process(self) -> bool:
        return self.llm.llm_engine.vllm_config.parallel_config.world_size == 1

    @property
    def pool(self):
        return self.scheduler.kv_cache_manager.block_pool

    def add(self, req_id: str, prompt_ids: list[int], max_tokens: int, **params: Any) -> None:
        sampling = {"temperature": 0, "logprobs": 0, "ignore_eos": True, "detokenize": False}
        self.outputs[req_id] = Output()
        self.llm.llm_engine.add_request(
            req_id,
            {"prompt_token_ids": prompt_ids},
            SamplingParams(max_tokens=max_tokens, **{**sampling, **params}),
        )

    def step(self) -> None:
        self._step()
        if hasattr(self.scheduler, "_tracks") and self._is_one_process:
            self.compacted_rows_checked += assert_rows_agree(self)

    def _step(self) -> None:
        for item in self.llm.llm_engine.step():
            completion = item.outputs[0]
            output = self.outputs[item.request_id]
            output.token_ids = list(completion.token_ids)
            output.logprobs = [
                step[token_id].logprob
                for step, token_id in zip(completion.logprobs, completion.token_ids, strict=True)
            ]
            output.finished = item.finished
            self.cached_tokens[item.request_id] = item.num_cached_tokens
        self.running_per_step.append(len(self.scheduler.running))
        self.max_running = max(self.max_running, len(self.scheduler.running))

    def preempt(self, req_id: str) -> None:
        """Preempt one running request, as vLLM does when the pool is short."""
        (request,) = (r for r in self.scheduler.running if r.request_id.startswith(f"{req_id}-"))
        self.scheduler.running.remove(request)
        self.scheduler._preempt_request(request, 0.0)

    def num_cached_tokens(self, req_id: str) -> int:
        """Prompt tokens of a request that hit the prefix cache."""
        return self.cached_tokens[req_id]

    def run(self) -> None:
        while self.llm.llm_engine.has_unfinished_requests():
            self.step()

    def stats(self) -> dict[str, int]:
        return rkv_vllm.stats(self.llm)

    def assert_pool_is_empty(self) -> None:
        """Nothing is held any longer: no block, and no entry in a container of ours."""
        while self.scheduler.has_requests():
            # The workers learn with one more step who has gone.
            self.llm.llm_engine.step()
        assert_nothing_is_left(self._sizes_at_start, *self._roots)
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1

    def _count_preemptions(self) -> None:
        preempt = self.scheduler._preempt_request

        def noting(request, *args, **kwargs):
            req_id = request.request_id.rsplit("-", 1)[0]
            self.preempted_at.setdefault(req_id, []).append(request.num_output_tokens)
            return preempt(request, *args, **kwargs)

        self.scheduler._preempt_request = noting

    def _count_computed_tokens(self) -> None:
        schedule = self.scheduler.schedule

        def counting(*args, **kwargs):
            output = schedule(*args, **kwargs)
            self.num_computed_tokens += output.total_num_scheduled_tokens
            return output

        self.scheduler.schedule = counting


@contextmanager
def running_engine(
    model: Path, num_blocks: int = 1024, num_groups: int = 1, **options: Any
) -> Iterator[Engine]:
    """Starts an engine and takes all of it down again.

    Args:
        model: folder of a random model (tests/models.py).
        num_blocks: blocks of the pool, the null block included.
        num_groups: KV-cache groups that vLLM makes of the layers, all of as many.
        options: further arguments of `LLM`; `rkv_vllm.engine_args()` switches compression on.
            Where layers differ in heads, `kv_cache_memory_bytes` enough for the blocks.
    """
    if "kv_cache_memory_bytes" in options:
        options["num_gpu_blocks_override"] = num_blocks
    else:
        block_size = options.get("block_size", BLOCK_SIZE)
        bytes_per_element = 2 if options.get("dtype") == "bfloat16" else 4
        pool_bytes = kv_cache_bytes(model, num_blocks * block_size, bytes_per_element)
        options["kv_cache_memory_bytes"] = pool_bytes // num_groups
    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "block_size": BLOCK_SIZE,
        "seed": 0,
        **(GPU_OPTIONS if current_platform.is_cuda() else {}),
    }
    llm = LLM(str(model), **{**defaults, **options})
    try:
        engine = Engine(llm)
        assert engine.pool.num_gpu_blocks == num_blocks
        yield engine
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
