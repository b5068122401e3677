"""Latencies of an offline run from the times of its tokens, by priority where it has any.

Measured where the scheduler hears of a token: without the network and the detokenizer of a server.
Knows no vLLM. Next: offline.py, which takes the times.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

Percentiles = dict[str, float]


def percentiles(seconds: Sequence[float]) -> Percentiles:
    """The 50th and 99th percentile in milliseconds, interpolated as vLLM's client does."""
    # Only in the child: numpy comes with vLLM.
    import numpy as np

    p50, p99 = np.percentile(seconds, (50, 99)) if len(seconds) else (0.0, 0.0)
    return {"p50": 1000 * float(p50), "p99": 1000 * float(p99)}


def latencies_of(times: Sequence[Sequence[float]], priorities: Sequence[int]) -> dict[str, Any]:
    """Returns the latencies of a load as the document names them.

    Args:
        times: of each request in seconds: when it arrived, then of each of its tokens.
        priorities: of the requests, in the same order; or empty.

    Returns:
        `ttft_ms` and `itl_ms`; with priorities also `classes`, one for each from the most to the
        least urgent, with `e2el_ms`, the time from arrival to the last token.
    """
    found: dict[str, Any] = {"ttft_ms": percentiles(_ttfts(times)), "itl_ms": _itl(times)}
    if priorities:
        found["classes"] = [
            _class(priority, [t for t, p in zip(times, priorities, strict=True) if p == priority])
            for priority in sorted(set(priorities))
        ]
    return found


def _class(priority: int, times: Sequence[Sequence[float]]) -> dict[str, Any]:
    return {
        "priority": priority,
        "num_requests": len(times),
        "ttft_ms": percentiles(_ttfts(times)),
        "itl_ms": _itl(times),
        "e2el_ms": percentiles([each[-1] - each[0] for each in times if len(each) > 1]),
    }


def _ttfts(times: Sequence[Sequence[float]]) -> list[float]:
    return [each[1] - each[0] for each in times if len(each) > 1]


def _itl(times: Sequence[Sequence[float]]) -> Percentiles:
    return percentiles([late - soon for each in times for soon, late in pairwise(each[1:])])
