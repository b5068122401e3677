"""The flush: waves, groups, options and chunks, flags that arrive late, counts."""

import logging
import math
from dataclasses import dataclass, replace

import pytest
import torch

from rkv_vllm.kernels.batch import ALL_FINITE
from rkv_vllm.kernels.ops import ops_for, triton_ops
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.methods.base import Method, ModelFacts
from rkv_vllm.methods.rkv import RKV
from rkv_vllm.scheduling.directive import EvictionDirective, StepPlan
from rkv_vllm.worker import flush as flush_module
from rkv_vllm.worker.checks import FiniteChecks, JudgedLayers
from rkv_vllm.worker.flush import Compactor
from rkv_vllm.worker.group import CompressedGroup
from rkv_vllm.worker.layer_set import LayerSet
from rkv_vllm.worker.lengths import GroupRows
from rkv_vllm.worker.query_ring import QueryRing

LAYERS, HEADS, GROUP, HEAD_SIZE, BLOCK_SIZE, WINDOW = 2, 3, 2, 32, 32, 8
SEATS, RING_LEN, NUM_BLOCKS = 3, 9, 6


def new_layer_set(
    broken: float | None = None, heads=HEADS, ops=ops_for, seed=0, queries=True
) -> LayerSet:
    """Over six random blocks; `broken` fills all keys of layer 1, head 2."""
    generator = torch.Generator().manual_seed(seed)
    shape = (LAYERS, NUM_BLOCKS, heads, BLOCK_SIZE, 2 * HEAD_SIZE)
    cache = torch.randn(shape, generator=generator)
    if broken is not None:
        cache[1, :, 2, :, :HEAD_SIZE] = broken
    keys = PagedStates(cache[..., :HEAD_SIZE], None, BLOCK_SIZE)
    values = PagedStates(cache[..., HEAD_SIZE:], None, BLOCK_SIZE)
    ring_shape = (SEATS, LAYERS, RING_LEN, heads * GROUP, HEAD_SIZE)
    recorded = torch.randn(ring_shape, generator=generator)
    chosen = ops(keys)
    rows = GroupRows(SEATS, 16, RING_LEN, torch.device("cpu"))
    ring = QueryRing(recorded, rows, chosen.observe)
    names = tuple(f"model.layers.{i}.attn" for i in range(LAYERS))
    scale = torch.full((LAYERS,), HEAD_SIZE**-0.5)
    facts = ModelFacts(names, 0, heads, heads * GROUP, HEAD_SIZE, scale, torch.zeros(LAYERS))
    return LayerSet(facts, keys, values, chosen, ring if queries else None)


def make_rkv(layer_set: LayerSet, options) -> Method:
    return RKV(options or RKV.Options(), layer_set.model, layer_set.ops)


def new_compactor(*layer_sets: LayerSet, make_method=make_rkv, **options) -> Compactor:
    """One group of these layer sets, or of one made with `options`."""
    group = CompressedGroup(0, BLOCK_SIZE, layer_sets or [new_layer_set(**options)], make_method)
    return Compactor({0: group}, WINDOW)


def directive(req_id="a", old=(3, 1), new=(3,), before=0, **changes) -> EvictionDirective:
    return EvictionDirective(
        **{
            "req_id": req_id,
            "group_id": 0,
            "num_evicted_before": before,
            "prefix_len": 0,
            "settled_len": 40,
            "total_len": 41,
            "num_evict": 20,
            "seat": 1,
            "prompt_len": 30,
            "seed": 7,
            "method_options": None,
            "old_block_ids": list(old),
            "new_block_ids": list(new),
            **changes,
        }
    )


def flush(compactor: Compactor, *directives: EvictionDirective) -> torch.Tensor:
    """Carry these out and return a copy of the first cache, keys beside values."""
    compactor.begin_step(StepPlan(directives=list(directives)))
    compactor.flush()
    return content(compactor.groups[0].layer_sets[0])


def content(layer_set: LayerSet) -> torch.Tensor:
    return torch.cat([layer_set.keys.blocks, layer_set.values.blocks], dim=-1)


@pytest.mark.parametrize("scratch_bytes", [1, 224 << 20])
def test_a_nan_in_the_cache_is_named_and_counted_and_the_other_heads_go_on(
    monkeypatch, caplog, scratch_bytes
):
    monkeypatch.setattr(flush_module, "SCRATCH_BYTES", scratch_bytes)
    compactor = new_compactor(broken=math.nan)
    kept = flush(compactor, directive(), directive("b", (2, 4), (5,)))
    whole = flush(new_compactor(), directive(), directive("b", (2, 4), (5,)))
    healthy = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    for layer, head in healthy:
        assert kept[layer, :, head].equal(whole[layer, :, head])
    stats = compactor.stats()
    assert (stats["compactions"], stats["non_finite"]) == (2, 2)
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warning.startswith("request a: scores of layer model.layers.1.attn, KV head 2 are not")
    # The next warning waits; the count does not.
    flush(compactor, directive())
    assert compactor.stats()["non_finite"] == 3
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1


def test_a_head_with_nan_keeps_its_newest_tokens():
    layer_set = new_layer_set(broken=math.nan)
    before = layer_set.values.read(torch.tensor([3, 1]), 41)
    flush(new_compactor(layer_set), directive())
    after = layer_set.values.read(torch.tensor([3]), 21)
    assert after[1, 2].equal(before[1, 2, 20:])
    assert not after[1, 1].equal(before[1, 1, 20:])


def bytes_for(tokens: int) -> int:
    """Scratch memory for so many tokens in one layer."""
    return tokens * HEADS * new_layer_set().ops.scratch_bytes_per_token


# All at once; each request alone; each layer of each request alone.
@pytest.mark.parametrize("tokens", [1 << 20, LAYERS * 41, 1])
def test_groups_and_chunks_end_as_everything_at_once(monkeypatch, tokens):
    both = (directive("a", (3, 1), (3,)), directive("b", (2, 4), (5,)))
    expected = flush(new_compactor(), *both)
    calls = []
    monkeypatch.setattr(flush_module, "SCRATCH_BYTES", bytes_for(tokens))
    score = RKV.score
    monkeypatch.setattr(
        RKV,
        "score",
        lambda self, heads, batch: (
            calls.append((batch.num_requests, heads.keys.num_layers)),
            score(self, heads, batch),
        )[1],
    )
    assert torch.equal(flush(new_compactor(), *both), expected)
    assert not torch.equal(expected, flush(new_compactor()))
    at_once, alone, single = [(2, LAYERS)], [(1, LAYERS)] * 2, [(1, 1)] * 2 * LAYERS
    assert calls == {1 << 20: at_once, LAYERS * 41: alone, 1: single}[tokens]


def test_layers_of_different_heads_in_one_group_are_each_compacted_by_their_own_scores():
    both = (directive("a", (3, 1), (3,)), directive("b", (2, 4), (5,)))
    narrow, wide = new_layer_set(heads=1, seed=1), new_layer_set(heads=4, seed=2)
    compactor = new_compactor(narrow, wide)
    flush(compactor, *both)
    for layer_set, (heads, seed) in ((narrow, (1, 1)), (wide, (4, 2))):
        assert content(layer_set).equal(flush(new_compactor(heads=heads, seed=seed), *both))
    assert compactor.stats()["compactions"] == 2


def test_requests_of_equal_options_are_scored_together_by_one_method_object(monkeypatch):
    @dataclass(frozen=True)
    class Weight:
        lam: float

    made, scored = [], []

    def make_method(layer_set, options):
        made.append(options)
        return make_rkv(layer_set, None if options is None else RKV.Options(lam=options.lam))

    score = RKV.score

    def noting(self, heads, batch):
        scored.append((self.options.lam, batch.num_requests))
        return score(self, heads, batch)

    monkeypatch.setattr(RKV, "score", noting)
    compactor = new_compactor(make_method=make_method)
    directives = [
        directive("a", (1,), (1,), method_options=Weight(0.5), **SHORT),
        directive("b", (2,), (2,), **SHORT),
        directive("c", (3,), (3,), method_options=Weight(0.5), **SHORT),
        directive("d", (4,), (4,), method_options=Weight(1.0), **SHORT),
    ]
    mixed = flush(compactor, *directives)
    assert scored == [(0.5, 2), (0.1, 1), (1.0, 1)]
    flush(compactor, replace(directives[0], method_options=Weight(0.5)))
    assert made == [Weight(0.5), None, Weight(1.0)]
    monkeypatch.undo()
    one_by_one = new_compactor(make_method=make_method)
    for one in directives:
        alone = flush(one_by_one, one)
    assert torch.equal(mixed, alone)


SHORT = {"settled_len": 30, "total_len": 31, "num_evict": 10}


def test_a_method_without_queries_is_given_none():
    class Newest(Method):
        def score(self, heads, batch):
            assert heads.queries is None
            heads_of_layers = heads.keys.num_layers * heads.keys.num_heads
            places = torch.arange(batch.max_candidates, dtype=torch.float32)
            return places.expand(batch.num_requests, heads_of_layers, -1).contiguous()

    layer_set = new_layer_set(queries=False)
    before = layer_set.keys.read(torch.tensor([3, 1]), 41)
    compactor = new_compactor(
        layer_set, make_method=lambda s, options: Newest(options, s.model, s.ops)
    )
    flush(compactor, directive(seat=-1))
    assert layer_set.keys.read(torch.tensor([3]), 21).equal(before[:, :, 20:])


def test_a_block_given_back_by_one_request_is_written_after_it_was_read():
    first = directive("a", (3, 1), (3,))
    takes_it = directive("b", (2, 4), (1,))
    apart = directive("c", (0, 5), (0,))
    assert waves_of(first, takes_it, apart) == [["a"], ["b", "c"]]
    # A block that is written and then read, and one that two requests read.
    assert waves_of(takes_it, directive("d", (1, 5), (5,))) == [["b"], ["d"]]
    assert waves_of(directive("a", (3, 1), (0,)), directive("b", (3, 2), (4,))) == [["a", "b"]]
    assert waves_of() == []


def waves_of(*directives: EvictionDirective) -> list[list[str]]:
    waves = new_compactor()._waves(list(directives))
    return [[directive.req_id for directive in wave] for wave in waves]


def test_a_shared_prefix_that_nobody_touches_does_not_part_requests():
    shared = {"prefix_len": BLOCK_SIZE + 5, "settled_len": 80, "total_len": 81}
    both = directive("a", (9, 1, 2), (9, 1), **shared), directive("b", (9, 3, 4), (9, 3), **shared)
    assert waves_of(*both) == [["a", "b"]]
    # The block behind it is full of nobody's prefix.
    assert waves_of(both[0], directive("b", (9, 1, 4), (9, 5), **shared)) == [["a"], ["b"]]


def test_waves_go_over_all_groups_together():
    """Groups overlay each other in one allocation: a block of one may become one of another."""
    group_0 = new_layer_set()
    group_1 = replace(new_layer_set(seed=3), keys=group_0.keys, values=group_0.values)
    groups = {
        i: CompressedGroup(i, BLOCK_SIZE, [s], make_rkv) for i, s in enumerate((group_0, group_1))
    }
    compactor = Compactor(groups, WINDOW)
    first = directive("a", (3, 1), (3,))
    takes_it = directive("a", (2, 4), (1,), group_id=1)
    together = flush(compactor, first, takes_it)
    assert [group.num_compactions for group in groups.values()] == [1, 1]
    assert [group.num_evicted("a") for group in groups.values()] == [20, 20]

    apart_0 = new_layer_set()
    apart_1 = replace(new_layer_set(seed=3), keys=apart_0.keys, values=apart_0.values)
    flush(new_compactor(apart_0), first)
    flush(new_compactor(apart_1), replace(takes_it, group_id=0))
    assert together.equal(content(apart_0))


def test_requests_that_left_are_skipped_and_counted():
    compactor = new_compactor()
    untouched = content(compactor.groups[0].layer_sets[0])
    compactor.begin_step(StepPlan(directives=[directive("a"), directive("b", (2, 4), (5,))]))
    assert [done.req_id for done in compactor.flush({"a", "c"})] == ["b"]
    assert compactor.flush() == []
    stats = compactor.stats()
    assert (stats["compactions"], stats["skipped"], stats["requests_compacted"]) == (1, 1, 1)
    assert compactor.groups[0].num_evicted("a") == 0
    after = content(compactor.groups[0].layer_sets[0])
    assert after[:, [1, 3]].equal(untouched[:, [1, 3]])
    assert not after[:, 5].equal(untouched[:, 5])


class Event:
    """A copy that arrives when somebody waits for it."""

    has_arrived = False

    def query(self):
        return self.has_arrived

    def synchronize(self):
        self.has_arrived = True


def test_flags_are_told_once_they_have_arrived(caplog):
    checks = FiniteChecks()
    layers = [JudgedLayers(("layers.0", "layers.1"), HEADS), JudgedLayers(("layers.2",), 1)]
    flags = torch.full((2, 3), ALL_FINITE, dtype=torch.int32)
    flags[0, 1], flags[1, 1], flags[1, 2] = 4, 0, 0
    checks.start(flags, layers, ["a", "b", "c"])
    event = Event()
    checks._on_their_way[0] = checks._on_their_way[0]._replace(event=event)
    checks.examine()
    assert checks.num_found == 0
    checks.examine(wait=True)
    checks.examine()
    assert event.has_arrived
    assert checks.num_found == 2
    (record,) = caplog.records
    assert record.getMessage().startswith("request b: scores of layer layers.1, KV head 1 are not")


def test_triton_leaves_what_cpp_leaves():
    directives = (directive("a", (3, 1), (3,)), directive("b", (2, 4), (5,), before=7))
    interpreted = flush(new_compactor(ops=triton_ops), *directives)
    expected = flush(new_compactor(), *directives)
    # Zeros behind the last token: see tests/kernels/test_triton.py.
    interpreted[:, [3, 5], :, 21:] = expected[:, [3, 5], :, 21:]
    assert torch.equal(interpreted, expected)


def test_warming_up_writes_the_null_block_alone_and_counts_nothing():
    compactor = new_compactor(broken=math.nan, ops=triton_ops)
    (layer_set,) = compactor.groups[0].layer_sets
    before = layer_set.keys.blocks[:, 1:].clone()
    compactor.warm_up()
    assert torch.equal(layer_set.keys.blocks[:, 1:].nan_to_num(7.0), before.nan_to_num(7.0))
    assert compactor.flush() == []
    stats = compactor.stats()
    assert stats["compactions"] == stats["non_finite"] == 0
    assert compactor.groups[0].num_evicted("warm-up") == 0


def test_a_method_of_others_that_fails_in_the_warm_up_does_not_fail_the_start(caplog):
    class Picky(Method):
        def score(self, heads, batch):
            raise ZeroDivisionError("too few tokens")

    make_method = {Picky: lambda s, options: Picky(options, s.model, s.ops), RKV: make_rkv}
    new_compactor(ops=triton_ops, make_method=make_method[Picky]).warm_up()
    assert "Warm-up of KV-cache group 0 failed" in caplog.text

    def broken_kernel(*args, **kwargs):
        raise ZeroDivisionError("does not compile")

    layer_set = new_layer_set(ops=triton_ops)
    broken = replace(layer_set, ops=layer_set.ops._replace(rkv_scores=broken_kernel))
    with pytest.raises(ZeroDivisionError):
        new_compactor(broken).warm_up()


def test_the_warm_up_shows_a_method_keys_that_are_not_zero():
    class DividesByNorms(Method):
        def score(self, heads, batch):
            keys = heads.keys.read(batch.old_block_table[0], batch.evictions[0].settled_len)
            norms.append(keys.norm(dim=-1).min().item())
            shape = (1, heads.keys.num_layers * heads.keys.num_heads, batch.max_candidates)
            return torch.zeros(shape)

    norms = []
    layer_set = new_layer_set(ops=triton_ops)
    layer_set.keys.blocks.zero_()
    make_method = lambda s, options: DividesByNorms(options, s.model, s.ops)  # noqa: E731
    new_compactor(layer_set, make_method=make_method).warm_up()
    assert min(norms) > 0


def test_counts_follow_the_work_and_forget_with_the_request():
    compactor = new_compactor()
    group = compactor.groups[0]
    plan = StepPlan([directive("a"), directive("b")], {}, 1, 1)
    compactor.begin_step(plan)
    assert compactor.stats()["compactions"] == 0
    assert [done.req_id for done in compactor.flush()] == ["a", "b"]
    assert compactor.flush() == []
    compactor.readmit("a")
    assert (group.num_evicted("a"), group.num_evicted("b")) == (0, 20)
    flush(compactor, directive("a"))
    stats = compactor.stats()
    assert stats["compactions"] == group.num_compactions == 3
    assert stats["evicted_tokens"] == 60
    assert stats["freed_blocks"] == 3
    assert stats["deferred"] == 2
    assert stats["requests_compacted"] == 2
    assert compactor.num_compactions("a") == 2
    compactor.forget("a")
    assert (group.num_evicted("a"), compactor.num_compactions("a")) == (0, 0)
