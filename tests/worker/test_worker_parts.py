"""Parts of the worker on their own: observation pool, cache views, refusals, errors."""

import math
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    SinkFullAttentionSpec,
    SlidingWindowSpec,
)

from rkv_vllm.kernels.observe.naive import observe_naive
from rkv_vllm.methods.rkv import RKV
from rkv_vllm.options import ServerOptions
from rkv_vllm.scheduling.spec import CompressedAttentionSpec
from rkv_vllm.worker.attention_hook import observe_queries, record_in
from rkv_vllm.worker.cache_views import stack_layers
from rkv_vllm.worker.lengths import GroupRows
from rkv_vllm.worker.query_ring import QueryRing, RingMemory
from rkv_vllm.worker.runner import CompressionRunner

LAYERS, HEADS, GROUP, HEAD_SIZE = 2, 3, 2, 32


def new_ring(seats=3, ring_len=5) -> tuple[GroupRows, QueryRing]:
    rows = GroupRows(4, 16, ring_len, torch.device("cpu"))
    queries = torch.full((seats, LAYERS, ring_len, HEADS * GROUP, HEAD_SIZE), math.nan)
    return rows, QueryRing(queries, rows, observe_naive)


def test_no_layer_looks_in_a_step_that_records_nothing():
    looked = []
    rows, ring = new_ring()
    ring = QueryRing(ring.queries, rows, lambda *args: looked.append(args))
    query = torch.randn(9, HEADS * GROUP, HEAD_SIZE)
    for watched, total in (([(2, 0, 1, 11)], 1), ([], 1), ([(0, 4, 3, 20)], 2)):
        rows.watch(watched)
        ring.record(1, query)
        rows.end_step()
        assert len(looked) == total


def test_each_watched_row_is_recorded_at_its_logical_positions():
    rows, ring = new_ring()
    query = torch.randn(9, HEADS * GROUP, HEAD_SIZE)
    # (seat, first token, number of tokens, first position): rows of a mixed batch.
    rows.watch([(2, 0, 1, 11), (0, 4, 3, 20)])
    ring.record(1, query)
    assert torch.equal(ring.queries[2, 1, 11 % 5], query[0])
    for i in range(3):
        assert torch.equal(ring.queries[0, 1, (20 + i) % 5], query[4 + i])
    recorded = 4 * HEADS * GROUP * HEAD_SIZE
    assert ring.queries.isnan().sum() == ring.queries.numel() - recorded


def test_of_a_row_longer_than_the_ring_the_last_tokens_stay():
    rows, ring = new_ring()
    query = torch.randn(12, HEADS * GROUP, HEAD_SIZE)
    rows.watch([(1, 0, 12, 100)])
    for layer in range(LAYERS):
        ring.record(layer, query)
    for token in range(7, 12):
        recorded = ring.queries[1, :, (100 + token) % 5]
        assert torch.equal(recorded, query[token].expand(LAYERS, -1, -1))
    assert ring.queries[0].isnan().all()


def test_nothing_is_recorded_when_nobody_is_watched():
    rows, ring = new_ring()
    query = torch.randn(4, HEADS * GROUP, HEAD_SIZE)
    rows.watch([(0, 0, 1, 3)])
    rows.end_step()
    ring.record(0, query)
    rows.watch([])
    ring.record(0, query)
    assert ring.queries.isnan().all()


def test_the_hook_records_and_hands_everything_through():
    class Implementation:
        def forward(self, layer, query, key, scale=1):
            return (layer, query.sum().item(), key, scale)

    layer = SimpleNamespace(impl=Implementation())
    rows, ring = new_ring()
    observe_queries(layer)
    assert layer.impl.forward(layer, torch.ones(1), "key")[1] == 1, "before there is a ring"
    record_in(layer, 1, ring)
    query = torch.randn(2, HEADS * GROUP, HEAD_SIZE)
    rows.watch([(0, 1, 1, 7)])
    returned = layer.impl.forward(layer, query, "key", scale=3)
    assert returned == (layer, query.sum().item(), "key", 3)
    assert torch.equal(ring.queries[0, 1, 2], query[1])
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


def test_rings_of_all_layer_sets_lie_in_one_allocation():
    """Two seats, rings of three positions; one layer of 2 x 4 elements, two of 1 x 2."""
    memory = RingMemory(2, 3, 12, torch.float32, torch.device("cpu"))
    first, second = memory.take(1, 2, 4), memory.take(2, 1, 2)
    assert (first.shape, second.shape) == ((2, 1, 3, 2, 4), (2, 2, 3, 1, 2))
    first.fill_(1)
    second.fill_(2)
    assert memory.elements.tolist() == [1] * 48 + [2] * 24
    memory.take_back()
    assert memory.take(1, 1, 1).data_ptr() == first.data_ptr()


class Ladder(RKV):
    """Less for later layers."""

    @classmethod
    def layer_budgets(cls, options, budget, num_layers):
        return [budget * (num_layers - i) for i in range(num_layers)]


class SpecRunner:
    """A model runner of vLLM, as far as its specs go."""

    def __init__(self, specs, method=RKV, num_stages=1, num_layers=2) -> None:
        self.specs = specs
        self.compression = ServerOptions(budget=64, buffer=32)
        self._method = method
        context = {name: SimpleNamespace(is_draft_layer="draft" in name) for name in specs}
        self.compilation_config = SimpleNamespace(static_forward_context=context)
        self.parallel_config = SimpleNamespace(pipeline_parallel_size=num_stages)
        self.model_config = SimpleNamespace(get_total_num_hidden_layers=lambda: num_layers)

    def get_kv_cache_spec(self):
        return dict(self.specs)


class SpecCompressionRunner(CompressionRunner, SpecRunner):
    __init__ = SpecRunner.__init__
    _follow_physical_positions = _exchange_rows = _live_ids = _lengths = None


SIZES = {"block_size": 16, "num_kv_heads": 2, "head_size": 8, "dtype": torch.float32}


def test_only_full_attention_is_compressed_and_windows_stay():
    specs = {
        "full": FullAttentionSpec(**SIZES),
        "slide": SlidingWindowSpec(**SIZES, sliding_window=32),
    }
    asked = SpecCompressionRunner(specs).get_kv_cache_spec()
    assert type(asked["full"]) is CompressedAttentionSpec
    assert asked["full"].layer_budget is None
    assert asked["slide"] is specs["slide"]


def test_a_pipeline_stage_may_have_no_compressed_layer():
    specs = {"a": SlidingWindowSpec(**SIZES, sliding_window=32)}
    assert SpecCompressionRunner(specs, num_stages=2).get_kv_cache_spec() == specs


def budgets_of(runner) -> list[int | None]:
    return [spec.layer_budget for spec in runner.get_kv_cache_spec().values()]


def test_layer_budgets_are_the_methods_and_none_for_the_servers():
    full = FullAttentionSpec(**SIZES)
    specs = {f"model.layers.{i}.attn": full for i in (4, 5)}
    assert budgets_of(SpecCompressionRunner(specs, Ladder)) == [128, None]
    # The last two of six layers, on the second of two pipeline stages.
    assert budgets_of(SpecCompressionRunner(specs, Ladder, 2, 6)) == [128, None]
    assert budgets_of(SpecCompressionRunner(specs, RKV, 2, 6)) == [None, None]


def test_layers_of_a_draft_model_stand_beside_with_the_servers_budget():
    full = FullAttentionSpec(**SIZES)
    specs = {f"model.layers.{i}.attn": full for i in (0, 1)} | {"draft.layers.0.attn": full}
    assert budgets_of(SpecCompressionRunner(specs, Ladder)) == [128, None, None]


def test_layer_budgets_that_cannot_be_are_refused_by_name():
    specs = {"model.layers.0.attn": FullAttentionSpec(**SIZES)}
    slide = {"model.layers.1.attn": SlidingWindowSpec(**SIZES, sliding_window=32)}
    with pytest.raises(ValueError, match=r"Ladder gives .* got --pipeline-parallel-size 2, wanted"):
        SpecCompressionRunner(specs | slide, Ladder, 2).get_kv_cache_spec()

    class Few(RKV):
        @classmethod
        def layer_budgets(cls, options, budget, num_layers):
            return [8]

    with pytest.raises(ValueError, match=r"Few\.layer_budgets: got \[8\], wanted 1 numbers"):
        SpecCompressionRunner(specs, Few).get_kv_cache_spec()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (SinkFullAttentionSpec(**SIZES, sink_len=4), "got layer a with SinkFull"),
        (ChunkedLocalAttentionSpec(**SIZES, attention_chunk_size=64), "no layer of full attention"),
        (FullAttentionSpec(**SIZES, sliding_window=64), "got layer a with Full"),
        (SlidingWindowSpec(**SIZES, sliding_window=32), "no layer of full attention among .'a'"),
    ],
)
def test_layers_of_other_kinds_alone_are_refused_by_name(spec, message):
    with pytest.raises(ValueError, match=message):
        SpecCompressionRunner({"a": spec}).get_kv_cache_spec()


def test_a_query_ring_that_does_not_fit_is_refused(monkeypatch):
    def too_large(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("rkv_vllm.worker.runner.RingMemory", too_large)
    runner = SpecCompressionRunner({})
    runner.compression = ServerOptions(seats=4096)
    runner.vllm_config = SimpleNamespace(max_concurrent_batches=2, num_speculative_tokens=0)
    layer = SimpleNamespace(num_heads=32, head_size=128)
    runner.max_num_tokens, runner.dtype, runner.device = 64, torch.bfloat16, "cuda:0"
    with pytest.raises(ValueError, match=r"--kv-seats 4096 needs 10240 MiB.*lower it"):
        runner._allocate_rings(dict.fromkeys(range(32), layer))
