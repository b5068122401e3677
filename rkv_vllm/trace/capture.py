"""Runs one prompt in an engine of this process and records what its compactions evict.

Imports vLLM in its functions only, behind `prepare_vllm`. Next: recorder.py for what is recorded,
pieces.py for the text.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import rkv_vllm
from rkv_vllm.options import ServerOptions
from rkv_vllm.trace.record import Evictions

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.outputs import CompletionOutput

    from rkv_vllm.trace.recorder import TraceRecorder

# Tokens of the cache beside the request's own: fresh blocks for a compaction whose old ones can be
# found by a prefix, vLLM's empty block, and blocks that are not full.
_SPARE_TOKENS = 1024


@dataclass(frozen=True)
class TracedRequest:
    """What is to be generated.

    Attributes:
        prompt_ids: the prompt.
        max_tokens: output tokens at most.
        temperature: 0 takes the likeliest token.
        ignore_eos: go on when the model ends.
    """

    prompt_ids: list[int]
    max_tokens: int
    temperature: float
    ignore_eos: bool

    @property
    def max_len(self) -> int:
        """Tokens of prompt and output at most."""
        return len(self.prompt_ids) + self.max_tokens


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


def prepare_vllm() -> None:
    """One process, quiet and offline; vLLM reads these variables when it is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Left to itself vLLM keeps one core free of computation, half of a small machine.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # Of vLLM's own imports; nobody here can act on them.
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")


@contextmanager
def running_engine(
    model: str, config: ServerOptions, max_len: int, bytes_per_token: int, **options: Any
) -> Iterator["LLM"]:
    """Start an eager engine for one request and take it down again.

    Args:
        model: folder or hub id.
        config: what to keep and when.
        max_len: tokens of the request, prompt and output.
        bytes_per_token: of the KV cache, which gets room for the request twice.
        **options: further arguments of `LLM`.

    Raises:
        ValueError: vLLM or the plugin refuses the model or an option.
    """
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm = LLM(
        model,
        **rkv_vllm.engine_args(**config.to_dict()),
        # Compiling takes longer than one prompt saves by it.
        enforce_eager=True,
        # A step ahead would cache the last token, which then nothing attends to.
        async_scheduling=False,
        max_model_len=max_len,
        max_num_seqs=1,
        kv_cache_memory_bytes=(2 * max_len + _SPARE_TOKENS) * bytes_per_token,
        use_tqdm_on_load=False,
        **options,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def capture(
    llm: "LLM",
    config: ServerOptions,
    request: TracedRequest,
    on_token: Callable[[int], None],
) -> Capture:
    """Generate for one prompt, looking on.

    Args:
        llm: an engine in this process, idle, which has compacted nothing yet.
        config: the engine's compression.
        request: what is to be generated.
        on_token: is told the number of output tokens after every step.

    Raises:
        RuntimeError: the workers count other compactions than were recorded.
    """
    from vllm import SamplingParams

    from rkv_vllm.trace.recorder import TraceRecorder

    sampling = SamplingParams(
        temperature=request.temperature,
        max_tokens=request.max_tokens,
        ignore_eos=request.ignore_eos,
        detokenize=False,
    )
    recorder = TraceRecorder(request.max_len, config.window)
    llm.collective_rpc(_observe, args=(recorder,))
    llm.llm_engine.add_request("trace", {"prompt_token_ids": request.prompt_ids}, sampling)
    output = _last_output(llm, on_token)
    counts = rkv_vllm.stats(llm)
    evictions = None
    if counts["compactions"]:
        evictions = recorder.result(len(request.prompt_ids) + len(output.token_ids))
        _check_counts(evictions, counts)
    return Capture(list(output.token_ids), output.finish_reason, evictions)


def _observe(worker: Any, recorder: "TraceRecorder") -> None:
    """Runs in the worker, which is in this process: the recorder is the same object."""
    worker.model_runner.compactor.observer = recorder


def _last_output(llm: "LLM", on_token: Callable[[int], None]) -> "CompletionOutput":
    """Steps the engine until its request is done."""
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
