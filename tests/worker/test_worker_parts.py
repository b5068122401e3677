"""Parts of the worker on their own: observation pool, cache views, refusals, errors, counts."""

import math
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from rkv_vllm.config import KVCompressionConfig
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.scheduling.directive import EvictionDirective, StepPlan
from rkv_vllm.worker.attention_hook import observe_queries
from rkv_vllm.worker.cache_views import CacheViews, known_packings, stack_layers
from rkv_vllm.worker.compactor import Compactor
from rkv_vllm.worker.observation import ObservationPool
from rkv_vllm.worker.runner_v1 import CompressionCPURunner

LAYERS, HEADS, GROUP, HEAD_SIZE, BLOCK_SIZE = 2, 3, 2, 32, 32


def new_pool(num_slots=3, ring_len=5) -> ObservationPool:
    pool = ObservationPool(
        num_slots, LAYERS, ring_len, HEADS * GROUP, HEAD_SIZE, torch.float32, torch.device("cpu")
    )
    pool.queries.fill_(math.nan)
    return pool


def test_each_watched_row_is_recorded_at_its_logical_positions():
    pool = new_pool()
    query = torch.randn(9, HEADS * GROUP, HEAD_SIZE)
    # (slot, first token, number of tokens, first position): rows of a mixed batch.
    pool.watch([(2, 0, 1, 11), (0, 4, 3, 20)])
    pool.record(1, query)
    assert torch.equal(pool.queries[2, 1, 11 % 5], query[0])
    for i in range(3):
        assert torch.equal(pool.queries[0, 1, (20 + i) % 5], query[4 + i])
    recorded = 4 * HEADS * GROUP * HEAD_SIZE
    assert pool.queries.isnan().sum() == pool.queries.numel() - recorded


def test_of_a_row_longer_than_the_ring_the_last_tokens_stay():
    pool = new_pool()
    query = torch.randn(12, HEADS * GROUP, HEAD_SIZE)
    pool.watch([(1, 0, 12, 100)])
    for layer in range(LAYERS):
        pool.record(layer, query)
    window = pool.window(1, 112, 5, slice(0, LAYERS))
    assert torch.equal(window, query[7:].transpose(0, 1).expand(LAYERS, -1, -1, -1))


def test_nothing_is_recorded_when_nobody_is_watched():
    pool = new_pool()
    query = torch.randn(4, HEADS * GROUP, HEAD_SIZE)
    pool.watch([(0, 0, 1, 3)])
    pool.unwatch()
    pool.record(0, query)
    pool.watch([])
    pool.record(0, query)
    assert pool.queries.isnan().all()


def test_the_hook_records_and_hands_everything_through():
    class Implementation:
        def forward(self, layer, query, key, scale=1):
            return (layer, query.sum().item(), key, scale)

    layer = SimpleNamespace(impl=Implementation())
    pool = new_pool()
    observe_queries(layer, 1, pool)
    query = torch.randn(2, HEADS * GROUP, HEAD_SIZE)
    pool.watch([(0, 1, 1, 7)])
    returned = layer.impl.forward(layer, query, "key", scale=3)
    assert returned == (layer, query.sum().item(), "key", 3)
    assert torch.equal(pool.queries[0, 1, 2], query[1])
    assert isinstance(layer.impl, Implementation)


def test_layers_of_one_allocation_are_stacked_as_a_view():
    allocation = torch.randn(3, 7, 2, 4, 8)
    stacked = stack_layers([allocation[i] for i in range(3)])
    assert torch.equal(stacked, allocation)
    stacked[1, 2, 0, 0, 0] = 5
    assert allocation[1, 2, 0, 0, 0] == 5


@pytest.mark.parametrize("fault", ["foreign", "stride", "dtype", "shape"])
def test_layers_that_cannot_be_stacked_are_refused(fault):
    allocation = torch.randn(4, 7, 2, 4, 8)
    caches = {
        "foreign": [allocation[0], torch.randn(7, 2, 4, 8)],
        "stride": [allocation[0], allocation[1], allocation[3]],
        "dtype": [allocation[0], allocation.view(torch.int32)[1]],
        "shape": [allocation[0], allocation[1, :6]],
    }[fault]
    with pytest.raises(ValueError, match="caches"):
        stack_layers(caches)


def test_layers_that_share_a_cache_are_refused(monkeypatch):
    monkeypatch.setattr(CPUModelRunner, "get_kv_cache_spec", lambda self: {})
    runner = CompressionCPURunner.__new__(CompressionCPURunner)
    runner.shared_kv_cache_layers = {"layers.3": "layers.1"}
    with pytest.raises(ValueError, match=r"share another layer's cache.*layers\.3"):
        runner.get_kv_cache_spec()


def compactor_with(keys_value: float) -> Compactor:
    blocks = torch.randn(LAYERS, 6, HEADS, BLOCK_SIZE * HEAD_SIZE)
    blocks[1, :, 2] = keys_value
    states = PagedStates(blocks, known_packings(BLOCK_SIZE, HEAD_SIZE)["vec"][0], BLOCK_SIZE)
    names = [f"model.layers.{i}.attn" for i in range(LAYERS)]
    views = CacheViews(states, states, names)
    pool = new_pool(ring_len=9)
    pool.queries.normal_()
    return Compactor(KVCompressionConfig(budget=20, buffer=10), views, pool)


def directive(req_id="a", before=0) -> EvictionDirective:
    return EvictionDirective(
        req_id, before, 40, 41, 20, slot=1, old_block_ids=[3, 1], new_block_ids=[3]
    )


@pytest.mark.parametrize("max_elements", [1, 64 << 20])
def test_a_nan_in_the_cache_ends_the_step_with_the_layer_named(monkeypatch, max_elements):
    monkeypatch.setattr("rkv_vllm.worker.compactor._MAX_DENSE_ELEMENTS", max_elements)
    compactor = compactor_with(math.nan)
    compactor.begin_step(StepPlan(directives=[directive()]))
    with pytest.raises(RuntimeError, match=r"request a in layer model\.layers\.1\.attn, KV head 2"):
        compactor.flush()
    assert compactor.stats()["compactions"] == 0


def test_layers_compacted_in_chunks_end_as_layers_compacted_at_once(monkeypatch):
    caches = []
    for max_elements in (1, 64 << 20):
        monkeypatch.setattr("rkv_vllm.worker.compactor._MAX_DENSE_ELEMENTS", max_elements)
        torch.manual_seed(0)
        compactor = compactor_with(1.0)
        before = compactor._views.keys.blocks.clone()
        compactor.begin_step(StepPlan(directives=[directive()]))
        compactor.flush()
        assert compactor.stats()["compactions"] == 1
        assert not compactor._views.keys.blocks[:, 3].equal(before[:, 3])
        caches.append(compactor._views.keys.blocks)
    assert caches[0].equal(caches[1])


def test_counts_follow_the_work_and_forget_with_the_request():
    compactor = compactor_with(1.0)
    compactor.begin_step(StepPlan(directives=[directive("a"), directive("b")], num_deferred=2))
    assert compactor.stats()["compactions"] == 0
    assert [done.req_id for done in compactor.flush()] == ["a", "b"]
    assert compactor.flush() == []
    compactor.readmit("a")
    assert (compactor.num_evicted("a"), compactor.num_evicted("b")) == (0, 20)
    compactor.begin_step(StepPlan(directives=[directive("a")]))
    compactor.flush()
    stats = compactor.stats()
    assert stats["compactions"] == 3
    assert stats["evicted_tokens"] == 60
    assert stats["freed_blocks"] == 3
    assert stats["deferred"] == 2
    assert stats["requests_compacted"] == 2
    assert compactor.num_compactions("a") == 2
    compactor.forget("a")
    assert (compactor.num_evicted("a"), compactor.num_compactions("a")) == (0, 0)
