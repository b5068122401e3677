"""rkv-vllm: a stock vLLM whose requests keep a bounded KV cache (R-KV, arXiv:2505.24133).

`vllm serve MODEL --kv-compression rkv`, or offline `LLM(model, **rkv_vllm.engine_args())`.
Importing this package imports neither vLLM nor torch. Where it reaches into vLLM: `plugin.py`;
where it decides: `scheduling/`; where it moves the cache: `worker/`; what it keeps: `methods/`.
"""

from typing import TYPE_CHECKING, Any

from rkv_vllm.option_field import options_of
from rkv_vllm.options import CONFIG_KEY, METHOD_KEY, OPTIONS, ServerOptions, find_method
from rkv_vllm.options import ServerOptions as KVCompressionConfig

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
    "swapped_out",
    "swapped_in",
    "recomputed",
)


def engine_args(method: str = ServerOptions.method, **options: Any) -> dict[str, Any]:
    """Returns the keyword arguments that switch compression on: `LLM(model, **engine_args())`.

    Also registers the plugin in this process, so that VLLM_PLUGINS cannot skip a check.

    Args:
        method: name of the method that chooses what to keep.
        **options: fields of `KVCompressionConfig`, as `budget` and `buffer`, and options of the
            method, as `lam`, or all of those in `options={...}`. What is left out has its default.

    Returns:
        `additional_config` (plain JSON), `scheduler_cls` and `worker_cls`. To set other keys of
        `additional_config` as well, merge them into that dict.

    Raises:
        ValueError: an unknown option, a bad value, or a platform that is not supported.
    """
    from rkv_vllm.fit.versions import SCHEDULER_CLS, platform_worker_cls
    from rkv_vllm.plugin import register

    of_method = options_of(find_method(method).Options).keys() - OPTIONS.keys()
    own = {name: options.pop(name) for name in list(options) if name in of_method}
    if own:
        options[METHOD_KEY] = {**options.get(METHOD_KEY, {}), **own}
    config = ServerOptions.from_dict({"method": method, **options})
    register()
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
