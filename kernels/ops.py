"""The kernels of one cache, chosen once when it is allocated.

Triton on a GPU, C++ on a CPU, torch elsewhere. The only place that knows which version serves
where. Whoever computes on a cache is handed an `Ops`; tests hand over another one. `naive.py` of
each folder has the contract.
"""

import logging
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import NamedTuple

from torch import Tensor

from rkv_vllm.kernels import native
from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.compact.cpu import compact_cpu
from rkv_vllm.kernels.compact.naive import compact_naive
from rkv_vllm.kernels.observe.cpu import observe_cpu
from rkv_vllm.kernels.observe.naive import observe_naive
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.kernels.rkv.cpu import importance_cpu, redundancy_cpu
from rkv_vllm.kernels.rkv.naive import importance_naive, redundancy_naive
from rkv_vllm.kernels.select.cpu import select_cpu
from rkv_vllm.kernels.select.naive import select_naive
from rkv_vllm.kernels.vase.cpu import attention_cpu, channel_range_cpu
from rkv_vllm.kernels.vase.naive import attention_naive, channel_range_naive

# Below vLLM's own name, because vLLM configures its loggers only; the kernels do not import it.
logger = logging.getLogger(f"vllm.{__name__}")

# A compaction in C++ or torch keeps both halves of the scores and the choice: three numbers.
_RESULT_BYTES = 12


class Ops(NamedTuple):
    """What can be done with one cache.

    Attributes:
        name: "triton", "cpu" or "naive".
        observe: (ring, layer_idx, query, token_rows, query_scale), see `observe_naive`.
        importance: (keys, batch, queries, scale, soft_cap, *, pool, defensive) -> scores, see
            `importance_naive`.
        redundancy: (keys, batch, *, threshold, center) -> scores, see `redundancy_naive`.
        rkv_scores: (keys, batch, queries, scale, soft_cap, *, lam, pool, defensive, threshold,
            center) -> scores, lam * importance - (1 - lam) * redundancy.
        attention: (keys, batch, queries, scale, soft_cap, *, pool) -> weights, see
            `attention_naive`.
        channel_range: (values, batch) -> widths, see `channel_range_naive`.
        select: (scores, batch) -> keep, see `select_naive`.
        compact: (states, batch, keep), see `compact_naive`.
        compact_both: (keys, values, batch, keep), the same for two, at once where that is faster.
        scratch_bytes_per_token: temporaries of one importance, redundancy and select, per token,
            head and layer of the batch.
    """

    name: str
    observe: Callable[..., None]
    importance: Callable[..., Tensor]
    redundancy: Callable[..., Tensor]
    rkv_scores: Callable[..., Tensor]
    attention: Callable[..., Tensor]
    channel_range: Callable[[PagedStates, EvictionBatch], Tensor]
    select: Callable[[Tensor, EvictionBatch], Tensor]
    compact: Callable[[PagedStates, EvictionBatch, Tensor], None]
    compact_both: Callable[[PagedStates, PagedStates, EvictionBatch, Tensor], None]
    scratch_bytes_per_token: int


def ops_for(states: PagedStates, window: int = 8) -> Ops:
    """Choose the kernels of a cache; says so once when they are the slow ones.

    Args:
        states: the keys or the values of the cache.
        window: newest tokens whose queries judge; what is kept of their logits counts as scratch.

    Returns:
        The kernels.
    """
    if native.is_available(states):
        return cpu_ops()
    # Triton reports AMD's devices under the name "cuda" as well.
    has_triton = states.device.type == "cuda" and find_spec("triton") is not None
    if has_triton and _is_plain(states):
        return triton_ops(states, window)
    _log_fallback(states.device.type, str(states.dtype))
    ops = naive_ops(states)
    # Recording knows no layout, and runs in graphs, where torch's version cannot.
    return ops._replace(observe=triton_ops(states, window).observe) if has_triton else ops


def naive_ops(states: PagedStates) -> Ops:
    """The contracts in plain torch, for any device and layout."""
    # One request at a time: its keys, as blocks, as heads and, of a quantised cache, as numbers.
    per_element = 2 * states.dtype.itemsize + 4 * (states.quantisation is not None)
    dense = states.head_size * per_element
    return Ops(
        "naive",
        observe_naive,
        importance_naive,
        redundancy_naive,
        _NAIVE_SCORES,
        attention_naive,
        channel_range_naive,
        select_naive,
        compact_naive,
        _NAIVE_MOVES,
        _RESULT_BYTES + dense,
    )


def cpu_ops() -> Ops:
    """The C++ kernels; what their threads need besides is bounded in csrc/cpu/heads.h."""
    return Ops(
        "cpu",
        observe_cpu,
        importance_cpu,
        redundancy_cpu,
        _CPU_SCORES,
        attention_cpu,
        channel_range_cpu,
        select_cpu,
        compact_cpu,
        _CPU_MOVES,
        _RESULT_BYTES,
    )


def triton_ops(states: PagedStates, window: int = 8) -> Ops:
    """The Triton kernels, for caches that strides describe."""
    # Imported where they serve: a CPU installation need not have Triton.
    from rkv_vllm.kernels.compact.triton import compact_both_triton, compact_triton
    from rkv_vllm.kernels.observe.triton import observe_triton
    from rkv_vllm.kernels.rkv.triton import (
        importance_triton,
        redundancy_triton,
        rkv_scores_triton,
        scratch_bytes,
    )
    from rkv_vllm.kernels.select.triton import select_triton
    from rkv_vllm.kernels.vase.triton import attention_triton, channel_range_triton

    return Ops(
        "triton",
        observe_triton,
        importance_triton,
        redundancy_triton,
        rkv_scores_triton,
        attention_triton,
        channel_range_triton,
        select_triton,
        compact_triton,
        compact_both_triton,
        scratch_bytes(states.head_size, window),
    )


def _weighed(
    importance: Callable[..., Tensor],
    redundancy: Callable[..., Tensor],
    keys: PagedStates,
    batch: EvictionBatch,
    *window: Tensor,
    lam: float,
    pool: int,
    defensive: bool,
    threshold: float,
    center: bool,
) -> Tensor:
    # In place: on a long prompt each half is as large as the scores.
    scores = importance(keys, batch, *window, pool=pool, defensive=defensive).mul_(lam)
    repeated = redundancy(keys, batch, threshold=threshold, center=center)
    return scores.sub_(repeated, alpha=1 - lam)


def _one_by_one(
    compact: Callable[[PagedStates, EvictionBatch, Tensor], None],
    keys: PagedStates,
    values: PagedStates,
    batch: EvictionBatch,
    keep: Tensor,
) -> None:
    for states in (keys, values):
        compact(states, batch, keep)


def _is_plain(states: PagedStates) -> bool:
    """Whether one stride leads from dimension to dimension and at most two to a token."""
    return states.num_token_dims <= 2 and states.cells.dim() == 4 + states.num_token_dims


@cache
def _log_fallback(device: str, dtype: str) -> None:
    logger.warning(
        "No kernel of this installation takes a %s cache on %s: compaction runs in plain torch, "
        "which is slower. On a CPU reinstall rkv-vllm where a C++ compiler is found, on a GPU "
        "install triton",
        dtype,
        device,
    )


# One object each, so that the kernels of one cache, chosen twice, are equal.
_NAIVE_SCORES = partial(_weighed, importance_naive, redundancy_naive)
_NAIVE_MOVES = partial(_one_by_one, compact_naive)
_CPU_SCORES = partial(_weighed, importance_cpu, redundancy_cpu)
_CPU_MOVES = partial(_one_by_one, compact_cpu)
