"""What the base classes do for a method that only knows dense tensors, and what they refuse."""

from dataclasses import replace

import pytest
import torch

from rkv_vllm.methods import DenseMethod, Heads, Method, ModelFacts, Need
from rkv_vllm.methods.base import NoOptions, check_scores
from tests.kernels.cases import CPU, HEADS, LAYERS, new_case


def facts(case) -> ModelFacts:
    states = case.states
    names = tuple(f"layer {i}" for i in range(states.num_layers))
    query_heads = case.queries.shape[3]
    return ModelFacts(
        names, 0, states.num_heads, query_heads, states.head_size, case.scale, case.no_cap
    )


def heads_of(case, layers: slice = slice(0, LAYERS), *, with_queries: bool = True) -> Heads:
    queries = case.queries[:, layers] if with_queries else None
    return Heads(layers, case.states.layers(layers), negated(case).layers(layers), queries)


def negated(case):
    """Values beside the keys of a case: the same with the other sign."""
    values = new_case([(e.settled_len, e.total_len, e.budget) for e in case.batch.evictions])
    values.states.cells.copy_(-case.states.cells)
    return values.states


class Weakest(DenseMethod):
    """Keeps what the last query looks at least; later layers count more."""

    @classmethod
    def need(cls, options):
        return Need(queries=True)

    def score_dense(self, keys, values, queries, layer, eviction):
        # The values only have to be those of the same tokens.
        assert torch.equal(keys, -values)
        window, n = queries.shape[1], keys.shape[1]
        looks = keys @ queries.view(keys.shape[0], -1, *queries.shape[1:])[:, 0, -1, :, None]
        return (-(layer + 1) * looks.squeeze(-1))[:, : n - window]


def test_a_method_of_dense_tensors_serves_a_ragged_batch_behind_its_prefixes():
    case = new_case([(100, 103, 50), (63, 63, 9, 33), (70, 70, 41, 29)], group=2)
    method = Weakest(NoOptions(), facts(case), CPU)
    got = method.score(heads_of(case), case.batch)
    assert got.dtype == torch.float32
    assert got.shape == (3, LAYERS * HEADS, 92)
    for i, eviction in enumerate(case.batch.evictions):
        m = eviction.settled_len - eviction.prefix_len - 8
        recorded = case.batch.window_queries(i, case.queries)
        queries = recorded.view(LAYERS, 2 * HEADS, 8, -1)
        for layer in range(LAYERS):
            keys = case.dense[i][layer, :, eviction.prefix_len : eviction.settled_len]
            expected = method.score_dense(keys, -keys, queries[layer], layer, eviction)
            own = got[i, layer * HEADS : (layer + 1) * HEADS]
            torch.testing.assert_close(own[:, :m], expected)
            assert own[:, m:].eq(-torch.inf).all()


def test_each_request_is_scored_with_its_own_numbers():
    class Longest(DenseMethod):
        def score_dense(self, keys, values, queries, layer, eviction):
            assert keys.shape[1] == eviction.num_judged
            return torch.full(keys.shape[:2], eviction.seed + eviction.budget + 0.5)

    case = new_case([(100, 103, 50), (63, 63, 9, 33)])
    evictions = [e._replace(seed=100 * i) for i, e in enumerate(case.batch.evictions)]
    batch = replace(case.batch, evictions=tuple(evictions))
    got = Longest(NoOptions(), facts(case), CPU).score(heads_of(case, with_queries=False), batch)
    assert got[0].unique().tolist() == [50.5]
    assert got[1, :, :22].unique().tolist() == [109.5]


def test_some_layers_are_scored_by_their_own_number():
    case = new_case([(100, 103, 50)], group=2)
    method = Weakest(NoOptions(), facts(case), CPU)
    whole = method.score(heads_of(case), case.batch)
    second = method.score(heads_of(case, slice(1, 2)), case.batch)
    assert torch.equal(second, whole[:, HEADS:])


def test_a_method_may_score_the_window_too_and_needs_no_queries():
    class Norm(DenseMethod):
        def score_dense(self, keys, values, queries, layer, eviction):
            assert queries is None
            return -keys.norm(dim=-1)

    case = new_case([(100, 100, 50), (40, 40, 8)])
    assert Norm.need(NoOptions()) == Need(queries=False)
    got = Norm(NoOptions(), facts(case), CPU).score(heads_of(case, with_queries=False), case.batch)
    expected = -case.dense[1].norm(dim=-1).flatten(0, 1)[:, :32]
    torch.testing.assert_close(got[1, :, :32], expected)
    # Half precision and NaN are for `select` to deal with.
    assert CPU.select(got, case.batch).shape == (2, LAYERS * HEADS, 50)


def test_zero_keys_of_an_unwritten_block_end_in_the_newest_tokens_and_not_in_an_error():
    class Directions(DenseMethod):
        def score_dense(self, keys, values, queries, layer, eviction):
            return (keys / keys.norm(dim=-1, keepdim=True)).sum(dim=-1)

    case = new_case([(40, 40, 20)])
    case.states.cells.zero_()
    method = Directions(NoOptions(), facts(case), CPU)
    keep = CPU.select(method.score(heads_of(case), case.batch), case.batch)
    assert keep.tolist() == [[[*range(20, 40)]] * LAYERS * HEADS]
    assert case.batch.non_finite.tolist() == [0]


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda scores: scores[:, 1:], r"torch\.float32 \[3, 91\]"),
        (lambda scores: scores[:2], r"torch\.float32 \[2, 92\]"),
        (lambda scores: scores.long(), r"torch\.int64 \[3, 92\]"),
    ],
)
def test_dense_scores_of_another_shape_or_kind_are_refused_by_name(change, got):
    class Wrong(Weakest):
        def score_dense(self, keys, values, queries, layer, eviction):
            return change(super().score_dense(keys, values, queries, layer, eviction))

    case = new_case([(100, 100, 50)])
    message = rf"Wrong\.score_dense: got {got}, wanted floats \[3, 92\] or \[3, 100\]"
    with pytest.raises(ValueError, match=message):
        Wrong(NoOptions(), facts(case), CPU).score(heads_of(case), case.batch)


@pytest.mark.parametrize(
    ("scores", "got"),
    [
        (torch.zeros(1, LAYERS * HEADS, 91), r"\[1, 6, 91\] on cpu"),
        (torch.zeros(1, LAYERS * HEADS + 1, 92), r"\[1, 7, 92\] on cpu"),
        (torch.zeros(1, LAYERS * HEADS, 92).bfloat16(), r"torch\.bfloat16"),
        (torch.zeros(1, LAYERS * HEADS, 92, device="meta"), "on meta"),
    ],
)
def test_scores_of_another_shape_dtype_or_device_are_refused_by_name(scores, got):
    class Own(Method):
        def score(self, heads, batch):
            return scores

    case = new_case([(100, 100, 50)])
    method, heads = Own(NoOptions(), facts(case), CPU), heads_of(case)
    with pytest.raises(ValueError, match=rf"Own\.score: got .*{got}.*, wanted torch\.float32 \[1"):
        check_scores(method, method.score(heads, case.batch), heads, case.batch)
    check_scores(method, torch.zeros(1, LAYERS * HEADS, 92), heads, case.batch)
