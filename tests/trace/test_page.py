"""The file: its size, and that no token can leave the place that is meant for it."""

import base64
import json
import re
import zlib

import numpy as np
import pytest

from rkv_vllm.options import ServerOptions
from rkv_vllm.trace.page import render
from rkv_vllm.trace.record import NEVER, Piece
from tests.trace.synthetic import synthetic_trace

HARMFUL = "</script><b>bold</b><script>document.title='owned'</script><!--<script>&lt;$data"


def document(page: bytes) -> dict:
    """The data of a page, its arrays unpacked but not shaped."""
    found = re.search(rb'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    data = json.loads(found[1])
    for name in ("evictedAt", "lastRank", "meanRank"):
        if data[name] is not None:
            dtype = {1: "u1", 2: "<u2"}[data[name]["bytes"]]
            inflated = zlib.decompress(base64.b64decode(data[name]["data"]))
            data[name] = np.frombuffer(inflated, dtype)
    return data


@pytest.mark.parametrize(("num_layers", "num_heads"), [(30, 3), (36, 8)])
def test_4000_tokens_stay_below_5_mb(num_layers, num_heads):
    config = ServerOptions()
    trace = synthetic_trace(4096, 96, num_layers, num_heads, config)
    assert len(trace.evictions.steps) == 23
    page = render(trace)
    # Of 2.2 MB with 8 heads, 1.3 are ranks and 0.7 evictions.
    assert len(page) < (1_000_000 if num_heads == 3 else 2_600_000)
    data = document(page)
    shape = (num_layers, num_heads, 4096)
    evicted_at = data["evictedAt"].reshape(shape).astype(int)
    exact = np.where(evicted_at == 255, NEVER, evicted_at)
    assert np.array_equal(exact, trace.evictions.evicted_at)
    assert np.array_equal(data["lastRank"].reshape(shape), trace.evictions.last_rank)
    assert data["rankLevels"] == 100


def test_more_than_254_compactions_take_two_bytes_each():
    config = ServerOptions(budget=12, buffer=8)
    trace = synthetic_trace(2200, 10, 1, 2, config)
    assert len(trace.evictions.steps) > 255
    data = document(render(trace))
    assert np.array_equal(data["evictedAt"], trace.evictions.evicted_at.ravel())
    assert data["evictedAt"].max() == NEVER


def test_a_prompt_cannot_end_the_script_that_holds_it():
    pieces = [Piece(HARMFUL)] * 400
    page = render(synthetic_trace(pieces=pieces, model=HARMFUL))
    assert page.count(b"<script") == page.count(b"</script") == 2
    assert b"<b>" not in page.split(b'id="data">')[1]
    assert b"<!--" not in page
    data = document(page)
    assert data["pieces"][0] == data["model"] == HARMFUL


def test_a_lone_surrogate_is_written():
    pieces = [Piece("\ud83d")] * 400
    assert document(render(synthetic_trace(pieces=pieces)))["pieces"][0] == "\ud83d"


def test_nothing_in_the_page_can_be_fetched():
    page = render(synthetic_trace(with_scores=False)).decode()
    assert "default-src 'none'" in page
    # The one address is the name of SVG's elements.
    addresses = re.findall(r"https?://[^\s\"']+", page)
    assert addresses == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"<(link|img|iframe|object)|@import|url\(|\bsrc=|fetch\(", page)
    assert document(page.encode())["lastRank"] is None
