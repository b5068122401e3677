"""The flush: waves, groups and chunks, errors that arrive late, counts."""

import math

import pytest
import torch

from rkv_vllm.config import KVCompressionConfig
from rkv_vllm.kernels.batch import ALL_FINITE
from rkv_vllm.kernels.ops import triton_ops
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.scheduling.directive import EvictionDirective, StepPlan
from rkv_vllm.worker.cache_views import CacheViews
from rkv_vllm.worker.flush import Compactor, _Check, _waves
from rkv_vllm.worker.query_ring import QueryRing

LAYERS, HEADS, GROUP, HEAD_SIZE, BLOCK_SIZE = 2, 3, 2, 32, 32
NAMES = [f"model.layers.{i}.attn" for i in range(LAYERS)]


def new_compactor(broken: float | None = None) -> Compactor:
    """Over six random blocks; `broken` fills all keys of layer 1, head 2."""
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(LAYERS, 6, HEADS, BLOCK_SIZE, 2 * HEAD_SIZE, generator=generator)
    if broken is not None:
        cache[1, :, 2, :, :HEAD_SIZE] = broken
    keys = PagedStates(cache[..., :HEAD_SIZE], None, BLOCK_SIZE)
    values = PagedStates(cache[..., HEAD_SIZE:], None, BLOCK_SIZE)
    pool = QueryRing(
        num_slots=3,
        num_layers=LAYERS,
        ring_len=9,
        num_heads=HEADS * GROUP,
        head_size=HEAD_SIZE,
        max_num_tokens=16,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    pool.queries.normal_(generator=generator)
    return Compactor(
        KVCompressionConfig(budget=20, buffer=10), CacheViews(keys, values, NAMES), pool
    )


def directive(req_id="a", old=(3, 1), new=(3,), before=0) -> EvictionDirective:
    return EvictionDirective(
        req_id, before, 40, 41, 20, slot=1, old_block_ids=list(old), new_block_ids=list(new)
    )


def flush(compactor: Compactor, *directives: EvictionDirective) -> torch.Tensor:
    """Carry these out and return a copy of the cache, keys beside values."""
    compactor.begin_step(StepPlan(directives=list(directives)))
    compactor.flush()
    views = compactor._views
    return torch.cat([views.keys.blocks, views.values.blocks], dim=-1)


@pytest.mark.parametrize("max_elements", [1, 64 << 20])
def test_a_nan_in_the_cache_ends_the_step_with_the_layer_named(monkeypatch, max_elements):
    monkeypatch.setattr("rkv_vllm.worker.flush._MAX_DENSE_ELEMENTS", max_elements)
    compactor = new_compactor(broken=math.nan)
    with pytest.raises(RuntimeError, match=r"request a in layer model\.layers\.1\.attn, KV head 2"):
        flush(compactor, directive())
    assert compactor.stats()["compactions"] == 0


# All at once; each request alone; each layer of each request alone.
@pytest.mark.parametrize("max_tokens", [1 << 20, LAYERS * HEADS * 41, 1])
def test_groups_and_chunks_end_as_everything_at_once(monkeypatch, max_tokens):
    both = (directive("a", (3, 1), (3,)), directive("b", (2, 4), (5,)))
    expected = flush(new_compactor(), *both)
    calls = []
    compactor = new_compactor()
    compactor._max_tokens = lambda: max_tokens
    score = compactor._method.score
    monkeypatch.setattr(
        type(compactor._method),
        "score",
        lambda self, heads, batch: (
            calls.append((batch.num_requests, heads.keys.num_layers)),
            score(heads, batch),
        )[1],
    )
    assert torch.equal(flush(compactor, *both), expected)
    assert not torch.equal(expected, flush(new_compactor()))
    at_once, alone, single = [(2, LAYERS)], [(1, LAYERS)] * 2, [(1, 1)] * 2 * LAYERS
    assert calls == {1 << 20: at_once, LAYERS * HEADS * 41: alone, 1: single}[max_tokens]


def test_a_block_given_back_by_one_request_is_written_after_it_was_read():
    first = directive("a", (3, 1), (3,))
    takes_it = directive("b", (2, 4), (1,))
    apart = directive("c", (0, 5), (0,))
    waves = [[d.req_id for d in wave] for wave in _waves([first, takes_it, apart])]
    assert waves == [["a"], ["b", "c"]]
    # A block that is written and then read, and one that two requests read.
    assert len(list(_waves([takes_it, directive("d", (1, 5), (5,))]))) == 2
    assert len(list(_waves([directive("a", (3, 1), (0,)), directive("b", (3, 2), (4,))]))) == 1
    assert list(_waves([])) == []


def test_a_late_error_is_raised_by_the_first_flush_that_can_know():
    compactor = new_compactor()
    arrived = []
    flags = torch.tensor([ALL_FINITE, 1], dtype=torch.int32)
    late = _Check(flags, lambda: bool(arrived), [directive("a"), directive("b")], slice(1, 2))
    compactor._checks.append(late)
    assert compactor.flush() == []
    arrived.append(True)
    with pytest.raises(RuntimeError, match=r"request b in layer model\.layers\.1\.attn, KV head 1"):
        compactor.flush()
    compactor._checks.append(late._replace(flags=torch.tensor([ALL_FINITE, ALL_FINITE])))
    assert compactor.flush() == []
    assert not compactor._checks


@pytest.fixture
def with_triton(monkeypatch):
    """Let Triton's interpreter serve this CPU."""
    monkeypatch.setattr("rkv_vllm.worker.flush.ops_for", triton_ops)


def test_triton_leaves_what_cpp_leaves(with_triton, monkeypatch):
    directives = (directive("a", (3, 1), (3,)), directive("b", (2, 4), (5,), before=7))
    interpreted = flush(new_compactor(), *directives)
    monkeypatch.undo()
    assert torch.equal(interpreted, flush(new_compactor(), *directives))


def test_warming_up_writes_the_null_block_alone_and_counts_nothing(with_triton):
    compactor = new_compactor(broken=math.nan)
    before = compactor._views.keys.blocks[:, 1:].clone()
    compactor.warm_up()
    assert torch.equal(compactor._views.keys.blocks[:, 1:].nan_to_num(7.0), before.nan_to_num(7.0))
    assert compactor.flush() == []
    assert compactor.stats()["compactions"] == 0


def test_counts_follow_the_work_and_forget_with_the_request():
    compactor = new_compactor()
    compactor.begin_step(StepPlan(directives=[directive("a"), directive("b")], num_deferred=2))
    assert compactor.stats()["compactions"] == 0
    assert [done.req_id for done in compactor.flush()] == ["a", "b"]
    assert compactor.flush() == []
    compactor.readmit("a")
    assert (compactor.num_evicted("a"), compactor.num_evicted("b")) == (0, 20)
    flush(compactor, directive("a"))
    stats = compactor.stats()
    assert stats["compactions"] == 3
    assert stats["evicted_tokens"] == 60
    assert stats["freed_blocks"] == 3
    assert stats["deferred"] == 2
    assert stats["requests_compacted"] == 2
    assert compactor.num_compactions("a") == 2
    compactor.forget("a")
    assert (compactor.num_evicted("a"), compactor.num_compactions("a")) == (0, 0)
