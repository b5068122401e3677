"""Layer sets: what a method is told of the layers, and which layers one view can span."""

from types import SimpleNamespace

import pytest
import torch

from rkv_vllm.worker.attention_hook import observe_queries
from rkv_vllm.worker.layer_set import make_layer_sets
from rkv_vllm.worker.lengths import GroupRows
from rkv_vllm.worker.query_ring import RingMemory
from tests.worker.test_cache_views import CellBackend, CellImplementation

BLOCKS, TOKENS, WINDOW = 4, 16, 8


class ObservedImplementation(CellImplementation):
    def __init__(self, scale: float, soft_cap: float | None) -> None:
        self.scale = scale
        self.logits_soft_cap = soft_cap

    def forward(self, layer, query):
        return query


def layers_in(
    cache: torch.Tensor, offsets, heads=2, head_size=8, soft_cap=None, first=0, is_draft=False
):
    """Layers at these element offsets of one allocation."""
    shape = (BLOCKS, heads, TOKENS, 2 * head_size)
    stride = torch.empty(shape).stride()
    return {
        f"layers.{first + i}": SimpleNamespace(
            is_draft_layer=is_draft,
            attn_backend=CellBackend("FLASH_ATTN"),
            num_heads=3 * heads,
            num_kv_heads=heads,
            head_size=head_size,
            impl=ObservedImplementation(0.1 * (first + i + 1), soft_cap),
            kv_cache=cache.as_strided(shape, stride, offset),
        )
        for i, offset in enumerate(offsets)
    }


def make(layers, memory=None, kv_shard=0):
    rows = GroupRows(4, 32, WINDOW + 1, torch.device("cpu"))
    return make_layer_sets(layers, TOKENS, rows, memory, kv_shard, WINDOW)


def test_each_layers_own_scale_and_soft_cap_reach_the_method():
    page = BLOCKS * 2 * TOKENS * 16
    layers = layers_in(torch.zeros(2 * page), [0, page], soft_cap=None)
    layers["layers.1"].impl.logits_soft_cap = 50.0
    (layer_set,) = make(layers, kv_shard=3)
    facts = layer_set.model
    assert facts.scale.tolist() == pytest.approx([0.1, 0.2])
    assert facts.soft_cap.tolist() == [0.0, 50.0]
    assert (facts.layers, facts.first_kv_head) == (("layers.0", "layers.1"), 6)
    assert (facts.num_kv_heads, facts.num_query_heads, facts.head_size) == (2, 6, 8)


def test_layers_of_different_heads_and_at_odd_places_become_several_sets():
    cache = torch.zeros(60_000)
    wide = layers_in(cache, [0, 8000, 16_000, 30_000], heads=2)
    narrow = layers_in(cache, [40_000, 44_000], heads=1, first=4)
    mixed = dict(sorted({**wide, **narrow}.items(), key=lambda item: item[0][::-1]))
    sets = make(mixed)
    assert sorted(layer_set.model.layers for layer_set in sets) == [
        ("layers.0", "layers.1", "layers.2"),
        ("layers.3",),
        ("layers.4", "layers.5"),
    ]
    for layer_set in sets:
        for i, name in enumerate(layer_set.model.layers):
            layer_set.keys.blocks[i].fill_(int(name[-1]) + 1)
    for name, layer in mixed.items():
        assert (layer.kv_cache[..., :8] == int(name[-1]) + 1).all()


def test_each_set_records_into_its_own_part_of_the_memory():
    cache = torch.zeros(60_000)
    layers = layers_in(cache, [0, 8000]) | layers_in(cache, [40_000], heads=1, first=2)
    for layer in layers.values():
        observe_queries(layer)
    seats, ring_len = 3, WINDOW + 1
    position_size = sum(layer.num_heads * layer.head_size for layer in layers.values())
    memory = RingMemory(seats, ring_len, position_size, torch.float32, torch.device("cpu"))
    rows = GroupRows(4, 32, ring_len, torch.device("cpu"))
    sets = make_layer_sets(layers, TOKENS, rows, memory, 0, WINDOW)
    rows.watch([(2, 0, 1, 5)])
    for i, layer in enumerate(layers.values()):
        query = torch.full((1, layer.num_heads, layer.head_size), i + 1.0)
        layer.impl.forward(layer, query)
    for layer_set in sets:
        for i, name in enumerate(layer_set.model.layers):
            assert (layer_set.ring.queries[2, i, 5] == int(name[-1]) + 1).all()
    assert memory.elements.count_nonzero() == position_size
    assert memory.elements.numel() == seats * ring_len * position_size


def test_without_queries_nothing_is_recorded():
    layers = layers_in(torch.zeros(60_000), [0, 8000])
    (layer_set,) = make(layers, memory=None)
    assert layer_set.ring is None
    assert all(type(layer.impl) is ObservedImplementation for layer in layers.values())


@pytest.mark.parametrize("factors", [[0.5], [0.5, 0.25]], ids=["layer", "head"])
def test_queries_that_a_layer_has_quantised_are_recorded_with_its_factor(factors):
    """`query_quant` of vLLM's attention layer; what others give is recorded as it is."""
    page = BLOCKS * 2 * TOKENS * 16
    layers = layers_in(torch.zeros(2 * page), [0, page])
    for i, layer in enumerate(layers.values()):
        layer._q_scale = (i + 1) * torch.tensor(factors)
        observe_queries(layer)
    memory = RingMemory(1, WINDOW + 1, 2 * 6 * 8, torch.bfloat16, torch.device("cpu"))
    (layer_set,) = make(layers, memory)
    rows = layer_set.ring._rows
    rows.token_rows[:2] = torch.tensor([-1, 3])
    rows.records = True
    query = torch.randn(2, 6, 8)
    of_heads = torch.tensor(factors).repeat_interleave(6 // len(factors)).view(-1, 1)
    for i, layer in enumerate(layers.values()):
        layer.impl.forward(layer, query.to(torch.float8_e4m3fn))
        expected = query[1].to(torch.float8_e4m3fn).float() * (i + 1) * of_heads
        assert layer_set.ring.queries[0, i, 3].equal(expected.bfloat16())
    layer.impl.forward(layer, query.bfloat16())
    assert layer_set.ring.queries[0, 1, 3].equal(query[1].bfloat16())


def test_layers_of_a_draft_model_are_a_set_and_record_by_rows_of_their_own():
    layers = layers_in(torch.zeros(4096), [0, 8]) | layers_in(
        torch.zeros(4096), [0, 8], first=2, is_draft=True
    )
    for layer in layers.values():
        observe_queries(layer)
    rows = GroupRows(4, 32, WINDOW + 1, torch.device("cpu"))
    target, draft = make_layer_sets(
        layers,
        TOKENS,
        rows,
        RingMemory(2, WINDOW + 1, 4 * 6 * 8, torch.float32, torch.device("cpu")),
        0,
        WINDOW,
    )
    assert target.model.layers == ("layers.0", "layers.1")
    assert draft.model.layers == ("layers.2", "layers.3")
    rows.watch([(1, 0, 1, 0)])
    for layer in layers.values():
        layer.impl.forward(layer, torch.ones(1, 6, 8))
    assert target.ring.queries[1, :, 0].eq(1).all()
    # Not before the draft model's own forward is that of the step, and not after it.
    assert not draft.ring.queries.any()
    rows.draft.begin_step(rows)
    layers["layers.2"].impl.forward(layers["layers.2"], torch.ones(1, 6, 8))
    rows.draft.end_step()
    layers["layers.3"].impl.forward(layers["layers.3"], torch.ones(1, 6, 8))
    assert draft.ring.queries[1, 0, 0].eq(1).all()
    assert not draft.ring.queries[:, 1].any()
