"""What every method keeps of a paged cache is what its oracle keeps."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.ops import triton_ops
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.methods import Heads, Method, ModelFacts, get_method
from tests.kernels.cases import CPU, HEADS, NAIVE, SMALL_STATES, Case, new_case, new_states
from tests.methods import judges
from tests.methods.judges import Judged
from tests.methods.oracle import assert_same_kept
from tests.methods.test_rkv import LargestOutput

# (settled_len, total_len, budget, prefix_len), blocks of 32: prefixes inside a block, at its end
# and one behind; a request of one candidate; one that keeps but its window; sinks in the prefix.
RAGGED = [
    (9, 9, 9),
    (63, 64, 31),
    (100, 103, 50, 1),
    (101, 101, 8, 33),
    (47, 49, 26, 15),
    (64, 70, 20, 32),
    (95, 95, 40, 2),
]
# What the interpreter can do in the time.
FEW = [RAGGED[i] for i in (1, 3, 6)]
LAYER_NUMBERS, FIRST_HEAD = (7, 2), 6
# Tokens within rounding of the cut may differ; most cases have none.
MOST_EXCUSED = 2


@dataclass
class Paged:
    """A case whose values are no copies of its keys and whose requests have seeds."""

    case: Case
    batch: EvictionBatch
    values: PagedStates
    dense_values: list[Tensor]
    facts: ModelFacts

    def method(self, name: str, ops, **options) -> Method:
        cls = get_method(name)
        return cls(cls.Options(**options), self.facts, ops)

    def heads(self, method: Method) -> Heads:
        queries = self.case.queries if method.need(method.options).queries else None
        layers = slice(0, self.case.states.num_layers)
        return Heads(layers, self.case.states, self.values, queries)

    def judged(self, request: int, layer: int) -> Judged:
        """One request in one of the layers, for the oracles."""
        eviction, states = self.batch.evictions[request], self.case.states
        queries = self.batch.window_queries(request, self.case.queries)
        queries = queries.view(states.num_layers, -1, *queries.shape[1:])[layer]
        settled = slice(eviction.prefix_len, eviction.settled_len)
        return Judged(
            keys=self.case.dense[request][layer, :, settled].double().numpy(),
            values=self.dense_values[request][layer, :, settled].double().numpy(),
            queries=queries.double().numpy(),
            budget=eviction.budget,
            prefix_len=eviction.prefix_len,
            seed=eviction.seed,
            layer=LAYER_NUMBERS[layer],
            first_head=FIRST_HEAD,
            scale=float(self.facts.scale[layer]),
            soft_cap=float(self.facts.soft_cap[layer]),
        )


def paged(lengths=RAGGED, *, soft_caps=(0.0, 0.0), **settings) -> Paged:
    case = new_case(lengths, **settings)
    states = case.states
    generator = torch.Generator().manual_seed(7)
    values = new_states("heads first", states.num_blocks, states.head_size, states.dtype)
    dense_values = []
    evictions = []
    for i, eviction in enumerate(case.batch.evictions):
        dense = torch.randn(case.dense[i].shape, generator=generator).to(states.dtype)
        values.write(torch.tensor(eviction.old_block_ids), dense)
        dense_values.append(dense)
        evictions.append(eviction._replace(seed=2**64 - 1 - 12345 * i))
    facts = ModelFacts(
        layers=tuple(f"model.layers.{number}.self_attn.attn" for number in LAYER_NUMBERS),
        first_kv_head=FIRST_HEAD,
        num_kv_heads=states.num_heads,
        num_query_heads=case.queries.shape[3],
        head_size=states.head_size,
        scale=case.scale * torch.tensor([1.0, 0.5]),
        soft_cap=torch.tensor(soft_caps),
    )
    batch = EvictionBatch.of(evictions, case.batch.window, "cpu")
    return Paged(replace(case, batch=batch), batch, values, dense_values, facts)


def assert_keeps_what_its_oracle_keeps(given: Paged, name: str, ops, **options) -> None:
    method = given.method(name, ops, **options)
    scores = method.score(given.heads(method), given.batch)
    assert scores.shape == (
        given.batch.num_requests,
        len(LAYER_NUMBERS) * HEADS,
        given.batch.max_candidates,
    )
    keep = ops.select(scores, given.batch)
    assert (given.batch.non_finite == 2**31 - 1).all()
    excused = 0
    for i, eviction in enumerate(given.batch.evictions):
        for layer in range(len(LAYER_NUMBERS)):
            expected = judges.BY_NAME[name](given.judged(i, layer), **options)
            own = keep[i, layer * HEADS : (layer + 1) * HEADS, : eviction.budget]
            kept = own.long() - eviction.prefix_len
            if eviction.budget == given.batch.window:
                assert kept.tolist() == [[*range(expected.shape[1], eviction.num_judged)]] * HEADS
                continue
            excused += assert_same_kept(kept, expected, eviction.budget, given.batch.window)
    assert excused <= MOST_EXCUSED


@pytest.mark.parametrize("ops", [NAIVE, CPU], ids=["naive", "cpu"])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("name", judges.BY_NAME)
def test_keeps_what_its_oracle_keeps(name, group, ops):
    given = paged(group=group, head_size=16)
    assert_keeps_what_its_oracle_keeps(given, name, ops)


@pytest.mark.parametrize("name", judges.BY_NAME)
def test_triton_keeps_it_as_well(name):
    given = paged(FEW, group=3, head_size=16)
    assert_keeps_what_its_oracle_keeps(given, name, triton_ops(SMALL_STATES))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("snapkv", {"pool": 1}),
        ("snapkv", {"pool": 11}),
        ("snapkv", {"defensive": True}),
        ("recent", {"sinks": 0}),
        ("recent", {"sinks": 40}),
        ("vase", {"sinks": 0, "share": 0.0, "pool": 1}),
        ("vase", {"sinks": 0, "share": 0.5}),
        ("vase", {"share": 1.0}),
        ("vase", {"sinks": 9, "pool": 9}),
    ],
    ids=str,
)
def test_with_other_options_too(name, options):
    given = paged(group=3, head_size=16, window=5, soft_caps=(0.0, 2.0))
    assert_keeps_what_its_oracle_keeps(given, name, CPU, **options)


@pytest.mark.parametrize("heads_at_once", [2, 3, 6])
def test_a_long_request_is_judged_some_heads_at_a_time(monkeypatch, heads_at_once):
    given = paged([(120, 120, 90, 2)], group=8, head_size=16, window=64)
    method = given.method("vase", NAIVE)
    whole = method.score(given.heads(method), given.batch)
    of_a_head = 8 * 64 * (118 - 64)
    bound = "rkv_vllm.kernels.rkv.naive.MAX_TEMPORARY_ELEMENTS"
    monkeypatch.setattr(bound, heads_at_once * of_a_head)
    with LargestOutput() as largest:
        torch.testing.assert_close(method.score(given.heads(method), given.batch), whole)
    assert largest.numel == heads_at_once * of_a_head


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", judges.BY_NAME)
def test_half_precision_is_judged_in_float32(name, dtype):
    """Widths of half precision values often tie; the lower index stays."""
    given = paged(group=3, head_size=16, dtype=dtype, soft_caps=(3.0, 0.0))
    assert_keeps_what_its_oracle_keeps(given, name, CPU)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["keydiff", "knorm", "snapkv", "vase"])
def test_a_broken_key_ends_in_the_newest_tokens_of_its_head_alone(name, bad):
    given = paged([(63, 64, 31)], group=3, head_size=16)
    row = given.batch.evictions[0].old_block_ids
    given.case.states.cells[1, row[0], 2, 5, 3] = bad
    assert_only_one_head_keeps_its_newest(given, name)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_value_does_the_same_to_vase(bad):
    given = paged([(63, 64, 31)], group=3, head_size=16)
    given.values.cells[1, given.batch.evictions[0].old_block_ids[0], 2, 5, 3] = bad
    assert_only_one_head_keeps_its_newest(given, "vase")


def assert_only_one_head_keeps_its_newest(given: Paged, name: str) -> None:
    method = given.method(name, CPU)
    keep = CPU.select(method.score(given.heads(method), given.batch), given.batch)
    newest = torch.arange(63 - 31, 63, dtype=torch.int32)
    assert (keep[0] == newest).all(dim=1).tolist() == [False] * 5 + [True]
    assert given.batch.non_finite.tolist() == [5]
