"""What the base class does for a method that only knows dense tensors."""

import pytest
import torch

from rkv_vllm.methods import CompressionMethod
from rkv_vllm.methods.base import NonFiniteScoreError
from tests.kernels.cases import HEADS, LAYERS, new_case


class Weakest(CompressionMethod):
    """Keeps what the last query looks at least, and the window."""

    @classmethod
    def from_config(cls, config):
        return cls()

    def keep_indices(self, keys, values, queries, budget):
        window, n = queries.shape[1], keys.shape[1]
        # One query head per KV head; the values only have to be those of the same tokens.
        assert torch.equal(keys, -values)
        looks = (keys @ queries[:, -1, :, None]).squeeze(-1)
        looks[:, n - window :] = -torch.inf
        return looks.topk(budget, largest=False).indices.sort().values


def negated(case):
    """Values beside the keys of a case: the same with the other sign."""
    values = new_case([(e.settled_len, e.total_len, e.budget) for e in case.batch.evictions])
    values.states.cells.copy_(-case.states.cells)
    return values.states


def test_a_method_of_dense_tensors_serves_a_ragged_batch():
    case = new_case([(100, 103, 50), (63, 63, 9)])
    keep = Weakest().keep_paged(case.states, negated(case), case.batch, case.queries)
    assert keep.dtype == torch.int32
    assert keep[1, :, 9:].eq(-1).all()
    for i, eviction in enumerate(case.batch.evictions):
        keys = case.dense[i][:, :, : eviction.settled_len].flatten(0, 1)
        queries = case.batch.window_queries(i, case.queries)
        expected = Weakest().keep_indices(keys, -keys, queries, eviction.budget)
        assert torch.equal(keep[i, :, : eviction.budget].long(), expected)


def test_a_method_that_keeps_too_few_is_named():
    class Short(Weakest):
        def keep_indices(self, keys, values, queries, budget):
            return super().keep_indices(keys, values, queries, budget - 1)

    case = new_case([(100, 100, 50)])
    message = rf"Short\.keep_indices returned \[6, 49\], expected \[{LAYERS * HEADS}, 50\]"
    with pytest.raises(ValueError, match=message):
        Short().keep_paged(case.states, negated(case), case.batch, case.queries)


def test_a_non_finite_score_is_told_with_its_request():
    class Broken(Weakest):
        def keep_indices(self, keys, values, queries, budget):
            if keys.shape[1] == 63:
                raise NonFiniteScoreError(4)
            return super().keep_indices(keys, values, queries, budget)

    case = new_case([(100, 100, 50), (63, 63, 9)])
    with pytest.raises(NonFiniteScoreError) as caught:
        Broken().keep_paged(case.states, negated(case), case.batch, case.queries)
    assert (caught.value.request, caught.value.head) == (1, 4)
