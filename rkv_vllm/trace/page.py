"""One HTML file from a trace: markup, style, script and data, nothing fetched from anywhere.

What the browser needs of every (layer, KV head, token) is one byte (two beyond 254 compactions),
deflated and in base64: the compaction that evicted it, exact, and the rank of its score, rounded to
a percent. `assets/*.js` is the other side of this file, `state.js` first.
"""

import base64
import hashlib
import json
import zlib
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np

from rkv_vllm.trace.record import NEVER, RANK_LEVELS, Trace

# In the order in which they define what the next one uses.
_SCRIPTS = ("state.js", "text.js", "detail.js", "chart.js", "controls.js")

# Index in a byte for "in the cache to the end".
_NEVER_BYTE = 255


def render(trace: Trace) -> bytes:
    """Make the page.

    Args:
        trace: with at least one compaction.

    Returns:
        UTF-8; opens from a file in any browser of 2023 or later (DecompressionStream).
    """
    assets = files("rkv_vllm.trace") / "assets"
    style = (assets / "page.css").read_text(encoding="utf-8")
    script = "\n".join((assets / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    page = Template((assets / "page.html").read_text(encoding="utf-8")).substitute(
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        data=_embed(_document(trace)),
    )
    return page.encode()


def _document(trace: Trace) -> dict[str, Any]:
    evictions = trace.evictions
    num_layers, num_heads, _ = evictions.evicted_at.shape
    return {
        "model": trace.model,
        "options": trace.options,
        "versions": trace.versions,
        "counts": trace.counts(),
        "finishReason": trace.finish_reason,
        "window": trace.window,
        "promptLen": trace.prompt_len,
        "cachedLen": trace.cached_len,
        "numLayers": num_layers,
        "numHeads": num_heads,
        # Plain text where one token is one piece: short, and readable in the source of the page.
        "pieces": [p.text if p.num_parts == 1 else list(p) for p in trace.pieces],
        "steps": [step._asdict() for step in evictions.steps],
        "evictedAt": _indices(evictions.evicted_at, len(evictions.steps)),
        "rankLevels": RANK_LEVELS,
        "lastRank": _packed(evictions.last_rank),
        "meanRank": _packed(evictions.mean_rank),
    }


def _indices(evicted_at: np.ndarray, num_steps: int) -> dict[str, Any]:
    if num_steps >= _NEVER_BYTE:
        return _packed(evicted_at.astype("<u2"))
    return _packed(np.where(evicted_at == NEVER, _NEVER_BYTE, evicted_at).astype(np.uint8))


def _packed(numbers: np.ndarray | None) -> dict[str, Any] | None:
    if numbers is None:
        return None
    deflated = zlib.compress(np.ascontiguousarray(numbers).tobytes(), 9)
    return {"bytes": numbers.itemsize, "data": base64.b64encode(deflated).decode()}


def _embed(document: dict[str, Any]) -> str:
    """JSON that ends no script element and opens no comment, whatever the tokens say."""
    return json.dumps(document).replace("&", "\\u0026").replace("<", "\\u003c")


def _hash(content: str) -> str:
    """For the page's Content-Security-Policy: these bytes and no others may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
