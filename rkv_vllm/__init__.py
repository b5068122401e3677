"""rkv-vllm: a stock vLLM whose requests keep a bounded KV cache (R-KV, arXiv:2505.24133).

`vllm serve MODEL --kv-compression rkv`, or offline `LLM(model, **rkv_vllm.engine_args())`.
Importing this package imports neither vLLM nor torch. Where it reaches into vLLM: `plugin.py`;
where it decides: `scheduling/`; where it moves the cache: `worker/`; what it keeps: `methods/`.
"""

from typing import TYPE_CHECKING, Any

from rkv_vllm.config import CONFIG_KEY, KVCompressionConfig

if TYPE_CHECKING:
    from vllm import LLM

__all__ = ["KVCompressionConfig", "engine_args", "stats"]

# Counters that every rank must agree on: all ranks follow the same directives.
COUNTERS = (
    "compactions",
    "evicted_tokens",
    "freed_blocks",
    "deferred",
    "requests_compacted",
)


def engine_args(method: str = KVCompressionConfig.method, **options: int | float) -> dict[str, Any]:
    """Returns the keyword arguments that switch compression on: `LLM(model, **engine_args())`.

    Args:
        method: name of the method that chooses what to keep.
        **options: the other fields of `KVCompressionConfig`, as `budget` and `buffer`; lengths in
            tokens. What is left out has its default.

    Returns:
        `additional_config` (plain JSON), `scheduler_cls` and `worker_cls`. To set other keys of
        `additional_config` as well, merge them into that dict.

    Raises:
        ValueError: an unknown option, a bad value, or a platform that is not supported.
    """
    from rkv_vllm.fit.versions import SCHEDULER_CLS, platform_worker_cls

    config = KVCompressionConfig.from_dict({"method": method, **options})
    return {
        "additional_config": {CONFIG_KEY: config.to_dict()},
        "scheduler_cls": SCHEDULER_CLS,
        "worker_cls": platform_worker_cls(),
    }


def stats(llm: "LLM") -> dict[str, int]:
    """Returns what compression has done in an offline engine so far, counted by its workers.

    Every tensor-parallel rank and every pipeline stage carries out the same compactions on its part
    of the cache, so one rank's numbers are the engine's. Data-parallel engines count for
    themselves: over HTTP, `collective_rpc` asks the first one only.

    Args:
        llm: an engine made with `engine_args()`.

    Returns:
        `COUNTERS` to counts, and whatever else the workers count; tokens and blocks are summed over
        requests, not over layers or ranks.

    Raises:
        ValueError: compression is off in this engine.
        RuntimeError: the ranks disagree.
    """
    if CONFIG_KEY not in llm.llm_engine.vllm_config.additional_config:
        raise ValueError(
            "stats(llm): got an engine without KV cache compression, wanted one that has it; make "
            "it with LLM(model, **rkv_vllm.engine_args())"
        )
    ranks = llm.collective_rpc("kv_compression_stats")
    for rank, numbers in enumerate(ranks):
        if any(numbers[name] != ranks[0][name] for name in COUNTERS):
            raise RuntimeError(
                f"stats(llm): rank {rank} counts {numbers}, rank 0 {ranks[0]}; wanted equal "
                "numbers on all ranks, their caches have come apart: please report it"
            )
    return ranks[0]
