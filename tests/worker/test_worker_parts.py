"""Parts of the worker on their own: observation pool, cache views, refusals, errors."""

import math
from types import SimpleNamespace

import pytest
import torch

from rkv_vllm.config import KVCompressionConfig
from rkv_vllm.worker.attention_hook import observe_queries
from rkv_vllm.worker.cache_views import stack_layers
from rkv_vllm.worker.query_ring import QueryRing
from rkv_vllm.worker.runner import CompressionRunner

LAYERS, HEADS, GROUP, HEAD_SIZE = 2, 3, 2, 32


def new_pool(num_slots=3, ring_len=5) -> QueryRing:
    pool = QueryRing(
        num_slots=num_slots,
        num_layers=LAYERS,
        ring_len=ring_len,
        num_heads=HEADS * GROUP,
        head_size=HEAD_SIZE,
        max_num_tokens=16,
        dtype=torch.float32,
        device=torch.device("cpu"),
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
    for token in range(7, 12):
        recorded = pool.queries[1, :, (100 + token) % 5]
        assert torch.equal(recorded, query[token].expand(LAYERS, -1, -1))
    assert pool.queries[0].isnan().all()


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


class LoadedRunner:
    """A model runner of vLLM, as far as loading goes."""

    def __init__(self, layers) -> None:
        self.layers = layers

    def load_model(self) -> None:
        pass


class LoadedCompressionRunner(CompressionRunner, LoadedRunner):
    __abstractmethods__ = frozenset()
    __init__ = LoadedRunner.__init__
    _follow_physical_positions = _exchange_rows = _live_ids = _lengths = None

    def _attention_layers(self):
        return self.layers


def test_layers_that_share_a_cache_are_refused():
    layers = {
        "layers.1": SimpleNamespace(kv_sharing_target_layer_name=None),
        "layers.3": SimpleNamespace(kv_sharing_target_layer_name="layers.1"),
    }
    with pytest.raises(ValueError, match=r"share another layer's cache.*layers\.3"):
        LoadedCompressionRunner(layers).load_model()


def test_layers_with_different_heads_are_refused():
    layers = {
        f"layers.{n}": SimpleNamespace(
            kv_sharing_target_layer_name=None, num_heads=n, head_size=HEAD_SIZE
        )
        for n in (2, 4)
    }
    with pytest.raises(ValueError, match=r"same \(query heads, head size\).*\(2, 32\), \(4, 32\)"):
        LoadedCompressionRunner(layers).load_model()


def test_an_query_ring_that_does_not_fit_is_refused(monkeypatch):
    def too_large(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("rkv_vllm.worker.runner.QueryRing", too_large)
    runner = LoadedCompressionRunner({})
    runner.compression = KVCompressionConfig(observation_slots=4096)
    runner.vllm_config = SimpleNamespace(max_concurrent_batches=2)
    runner.max_num_tokens, runner.dtype, runner.device = 64, torch.bfloat16, "cuda:0"
    with pytest.raises(ValueError, match=r"--kv-observation-slots 4096 needs 10240 MiB.*lower it"):
        runner._allocate_pool(num_layers=32, num_heads=32, head_size=128)
