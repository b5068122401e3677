"""The versions that the kernel benchmark compares, and what has to hold before one is timed."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kernel_cases import RING_LEN, WINDOW, Workload
from released_formulation import released_compact, released_scores, released_select
from torch import Tensor

# The tests hold the only definition of "equal".
sys.path.append(str(Path(__file__).resolve().parent.parent))

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.observe.naive import observe_naive
from rkv_vllm.kernels.ops import Ops, naive_ops, ops_for
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.methods.rkv import RKV
from tests.kernels.cases import SCORE_TOLERANCE, assert_equivalent_choice, assert_same_scores

# Of our choice, when the released formulation computes in float32 too: another order of addition.
# It is timed in bf16 where that is faster, which rounds away who of two like tokens is worth more.
LEAST_OVERLAP = 0.99
CHECKED_HEADS = 8
# Share of scores. Tensor cores add in another order than torch: a pair of keys whose cosine lies
# within rounding of the threshold is then similar for one of them only, which moves two scores.
MOST_DIFFERING = 1e-4
OBSERVED_TOKENS, OBSERVED_WATCHED = 256, 8

Version = dict[str, Callable[[], Any]]


def ours(work: Workload) -> Version:
    """The kernels that serve this device, by operation."""
    return _version(work, ops_for(work.keys, WINDOW))


def naive(work: Workload) -> Version:
    """The contract in plain torch, by operation."""
    return _version(work, naive_ops(work.keys))


def _version(work: Workload, ops: Ops) -> Version:
    method = RKV(RKV.Options(), work.model, ops)
    # Computed once here, so that `select` and `compact` can run alone.
    scores = method.score(work.heads, work.batch)
    keep = ops.select(scores, work.batch)

    def move(kept: Tensor) -> None:
        ops.compact_both(work.keys, work.values, work.batch, kept)

    return {
        "score": lambda: method.score(work.heads, work.batch),
        "select": lambda: ops.select(scores, work.batch),
        "compact": lambda: move(keep),
        "whole": lambda: move(ops.select(method.score(work.heads, work.batch), work.batch)),
    }


def released_dtype(work: Workload) -> torch.dtype:
    """What suits it best: the cache's dtype on a GPU, float32 on a CPU without bf16 products."""
    return work.keys.dtype if work.keys.device.type == "cuda" else torch.float32


def released(work: Workload, heads_at_once: int) -> Version:
    """The n x n formulation on dense states, by operation."""
    dtype = released_dtype(work)
    keys, values = work.dense
    queries = work.dense_queries
    count = work.shape.budget - WINDOW

    def scored() -> Tensor:
        return released_scores(
            keys.to(dtype), queries.to(dtype), window=WINDOW, heads_at_once=heads_at_once
        )

    def move(chosen: Tensor) -> tuple[Tensor, Tensor]:
        return released_compact(keys, chosen, WINDOW), released_compact(values, chosen, WINDOW)

    scores = scored()
    chosen = released_select(scores, count)
    return {
        "score": scored,
        "select": lambda: released_select(scores, count),
        "compact": lambda: move(chosen),
        "whole": lambda: move(released_select(scored(), count)),
    }


def check(work: Workload, versions: dict[str, Version]) -> dict[str, str]:
    """Compare the versions; moves the survivors of ours.

    Returns:
        What was compared -> "ok" and perhaps a remark, "not checked: reason", or what is wrong.
    """
    keep = versions["ours"]["select"]()
    found = {}
    if "naive" in versions:
        reference = versions["naive"]["score"]().cpu()
        scores = versions["ours"]["score"]().cpu()
        found["score"] = _scores_verdict(scores, reference, work.batch)
        # What is kept is judged by our own scores: those of a few tokens may differ, see above.
        found["select"] = _verdict(assert_equivalent_choice, keep.cpu(), scores, work.batch)
    else:
        found["score"] = found["select"] = "not checked: the naive version is left out"
    if "released" in versions:
        # Against ours, which the lines above have compared with the naive version.
        overlap = _overlap(work, keep)
        found["released formulation"] = (
            "ok"
            if overlap >= LEAST_OVERLAP
            else f"shares {overlap:.3f} of our choice, wanted {LEAST_OVERLAP}"
        )
    versions["ours"]["whole"]()
    found["compact"] = "ok" if _is_compacted(work, keep) else "survivors are not where they belong"
    return found


def _scores_verdict(scores: Tensor, reference: Tensor, batch: EvictionBatch) -> str:
    """Says "ok", with a count where rounding made a few pairs similar on one side only."""
    verdict = _verdict(assert_same_scores, scores, reference, batch)
    if verdict == "ok":
        return verdict
    is_candidate = reference.isfinite()
    differ = ~scores.isclose(reference, **SCORE_TOLERANCE) & is_candidate
    share = int(differ.sum()) / int(is_candidate.sum())
    if share > MOST_DIFFERING or not scores.isfinite().eq(is_candidate).all():
        return f"{verdict} {share:.2%} of the scores differ"
    return f"ok, but {int(differ.sum())} of {int(is_candidate.sum())} scores ({share:.1e})"


def _verdict(compare: Callable[..., None], *tensors: Any) -> str:
    try:
        compare(*tensors)
    except AssertionError as error:
        return str(error).strip().splitlines()[0] if str(error) else "differs from naive"
    return "ok"


def _overlap(work: Workload, keep: Tensor) -> float:
    """Share of our candidates that the released formulation chooses too, over a few heads."""
    shape = work.shape
    count = shape.budget - WINDOW
    keys = work.dense[0][:CHECKED_HEADS].float()
    queries = work.dense_queries[: CHECKED_HEADS * shape.group].float()
    chosen = released_select(released_scores(keys, queries, window=WINDOW, heads_at_once=1), count)
    # The dense heads are in the order of requests, layers and heads, and so is `keep`.
    kept = keep[:, :, :count].reshape(-1, count)[: len(chosen)].long()
    is_kept = torch.zeros((len(kept), shape.num_tokens), dtype=torch.bool, device=kept.device)
    is_kept.scatter_(1, kept, True)
    return float(is_kept.gather(1, chosen).float().mean())


def _is_compacted(work: Workload, keep: Tensor) -> bool:
    """Whether every survivor lies at its new place, bit for bit, in keys and values."""
    shape = work.shape
    index = keep.reshape(-1, shape.budget, 1).long().expand(-1, -1, shape.head_size)
    for states, dense in zip((work.keys, work.values), work.dense, strict=True):
        rows = [states.read(row, shape.budget).flatten(0, 1) for row in work.batch.new_block_table]
        if not torch.equal(torch.cat(rows), dense.gather(1, index)):
            return False
    return True


def observe_versions(
    head_size: int, num_heads: int, dtype: torch.dtype, device: torch.device
) -> tuple[Version, bool]:
    """Ours and naive recording of one layer in a step of many tokens, and whether they agree."""
    pools = [
        torch.zeros((64, 1, RING_LEN, num_heads, head_size), dtype=dtype, device=device)
        for _ in range(2)
    ]
    query = torch.randn((OBSERVED_TOKENS, num_heads, head_size), device=device).to(dtype)
    token_rows = torch.full((OBSERVED_TOKENS,), -1, dtype=torch.int32, device=device)
    watched = torch.arange(OBSERVED_WATCHED, device=device)
    token_rows[watched * (OBSERVED_TOKENS // OBSERVED_WATCHED)] = (watched * RING_LEN + 3).int()
    cells = torch.zeros((1, 1, 1, 1, head_size), dtype=dtype, device=device)
    observe = ops_for(PagedStates(cells, None, 1)).observe
    runs = {
        "ours": lambda: observe(pools[0], 0, query, token_rows),
        "naive": lambda: observe_naive(pools[1], 0, query, token_rows),
    }
    for run in runs.values():
        run()
    return runs, torch.equal(*pools)
