"""Runs one prompt in an engine of this process and records what its compactions evict.

Importing this module imports vLLM; its environment variables must be set before. Next: recorder.py
for what is recorded, pieces.py for the text.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.outputs import CompletionOutput

import rkv_vllm
from rkv_vllm.config import KVCompressionConfig
from rkv_vllm.trace.record import Evictions
from rkv_vllm.trace.recorder import TraceRecorder


@dataclass(frozen=True)
class Capture:
    """What came of a prompt.

    Attributes:
        output_ids: generated tokens.
        finish_reason: vLLM's word: "length" or "stop".
        evictions: what compression did; None when no compaction ran.
    """

    output_ids: list[int]
    finish_reason: str
    evictions: Evictions | None


@contextmanager
def running_engine(
    model: str, config: KVCompressionConfig, max_len: int, cache_bytes: int, **options: Any
) -> Iterator[LLM]:
    """Start an eager engine for one request and take it down again.

    Args:
        model: folder or hub id.
        config: what to keep and when.
        max_len: tokens of the request, prompt and output.
        cache_bytes: of the KV cache.
        **options: further arguments of `LLM`.

    Raises:
        ValueError: vLLM or the plugin refuses the model or an option.
    """
    llm = LLM(
        model,
        **rkv_vllm.engine_args(**config.to_dict()),
        # Compiling takes longer than one prompt saves by it.
        enforce_eager=True,
        # A step ahead would cache the last token, which then nothing attends to.
        async_scheduling=False,
        max_model_len=max_len,
        max_num_seqs=1,
        kv_cache_memory_bytes=cache_bytes,
        use_tqdm_on_load=False,
        **options,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def capture(
    llm: LLM,
    config: KVCompressionConfig,
    prompt_ids: list[int],
    sampling: SamplingParams,
    on_token: Callable[[int], None],
) -> Capture:
    """Generate for one prompt, looking on.

    Args:
        llm: an engine in this process, idle, which has compacted nothing yet.
        config: the engine's compression.
        prompt_ids: the prompt.
        sampling: of one output.
        on_token: is told the number of output tokens after every step.

    Raises:
        RuntimeError: the workers count other compactions than were recorded.
    """
    recorder = TraceRecorder(len(prompt_ids) + sampling.max_tokens, config.window)
    llm.collective_rpc(_observe, args=(recorder,))
    llm.llm_engine.add_request("trace", {"prompt_token_ids": prompt_ids}, sampling)
    output = _last_output(llm, on_token)
    counts = rkv_vllm.stats(llm)
    output_ids = list(output.token_ids)
    evictions = None
    if counts["compactions"]:
        evictions = recorder.result(len(prompt_ids) + len(output_ids))
        _check_counts(evictions, counts)
    return Capture(output_ids, output.finish_reason, evictions)


def _observe(worker: Any, recorder: TraceRecorder) -> None:
    """Runs in the worker, which is in this process: the recorder is the same object."""
    worker.model_runner.compactor.observer = recorder


def _last_output(llm: LLM, on_token: Callable[[int], None]) -> CompletionOutput:
    """Steps the engine until its request is done."""
    output = None
    while llm.llm_engine.has_unfinished_requests():
        for item in llm.llm_engine.step():
            output = item.outputs[0]
            on_token(len(output.token_ids))
    return output


def _check_counts(evictions: Evictions, counts: dict[str, int]) -> None:
    seen = {
        "compactions": len(evictions.steps),
        "evicted_tokens": sum(step.num_evicted for step in evictions.steps),
        "freed_blocks": sum(step.freed_blocks for step in evictions.steps),
    }
    if any(counts[name] != number for name, number in seen.items()):
        raise RuntimeError(
            f"trace: got {seen} by looking on, wanted the workers' own {counts}; please report it"
        )
