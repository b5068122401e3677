"""Positions through compactions: what the recorder says against lists that are really cut."""

import random

import numpy as np
import pytest
import torch

from rkv_vllm.methods import Heads
from rkv_vllm.options import ServerOptions
from rkv_vllm.trace.record import NEVER
from rkv_vllm.trace.recorder import TraceRecorder, rank
from rkv_vllm.worker.flush import Choice
from tests.trace.synthetic import Keys, directive

CONFIG = ServerOptions(budget=20, buffer=10, window=4)
LAYERS, HEADS, MAX_LEN = 3, 2, 80


def choice(found, keep: torch.Tensor, scores: torch.Tensor, first_layer: int = 0) -> Choice:
    heads = Heads(slice(first_layer, first_layer + len(keep) // HEADS), Keys(HEADS), None, None)
    return Choice([found], heads, None, scores.unsqueeze(0), keep.int().unsqueeze(0), ())


def compactions(seed: int = 0):
    """(directive, keep [heads, budget], scores [heads, candidates]), settled after 33, 43, ..."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    evicted = 0
    for index in range(4):
        settled_len = 33 if index == 0 else 30
        candidates = settled_len - CONFIG.window
        rows = [
            sorted(rng.sample(range(candidates), CONFIG.budget - CONFIG.window))
            + list(range(candidates, settled_len))
            for _ in range(LAYERS * HEADS)
        ]
        scores = torch.randn(LAYERS * HEADS, candidates, generator=generator)
        yield directive(CONFIG, settled_len, evicted), torch.tensor(rows), scores
        evicted += settled_len - CONFIG.budget


@pytest.mark.parametrize("layers_at_once", [1, 2, 3])
def test_every_token_is_followed_to_the_compaction_that_evicts_it(layers_at_once):
    recorder = TraceRecorder(MAX_LEN, CONFIG.window)
    caches = [list(range(34)) for _ in range(LAYERS * HEADS)]
    expected = np.full((LAYERS * HEADS, 70), NEVER)
    for index, (found, keep, scores) in enumerate(compactions()):
        for first in range(0, LAYERS, layers_at_once):
            rows = slice(first * HEADS, (first + layers_at_once) * HEADS)
            recorder.chosen(choice(found, keep[rows], scores[rows], first))
        for head, cache in enumerate(caches):
            kept = {cache[i] for i in keep[head].tolist()}
            for token in set(cache[: found.settled_len]) - kept:
                expected[head, token] = index
            newest = cache[found.settled_len :]
            caches[head] = [t for t in cache if t in kept] + newest
            # The text grows until the next compaction: ten tokens, one of them unsettled.
            caches[head] += range(newest[-1] + 1, newest[-1] + 1 + CONFIG.buffer)
    evictions = recorder.result(70)
    assert evictions.evicted_at.reshape(LAYERS * HEADS, 70).tolist() == expected.tolist()
    assert [step.num_evicted for step in evictions.steps] == [13, 10, 10, 10]
    assert [step.logical_len for step in evictions.steps] == [34, 44, 54, 64]
    assert (evictions.evicted_at < NEVER).sum() == 43 * LAYERS * HEADS


def test_ranks_are_those_of_the_last_compaction_that_judged_a_token():
    recorder = TraceRecorder(MAX_LEN, CONFIG.window)
    (first, keep, scores), (second, keep_again, scores_again), *_ = compactions(1)
    recorder.chosen(choice(first, keep, scores))
    recorder.chosen(choice(second, keep_again, scores_again))
    evictions = recorder.result(60)
    ranks, ranks_again = rank(scores), rank(scores_again)
    for head in range(LAYERS * HEADS):
        last = evictions.last_rank.reshape(-1, 60)[head]
        kept = keep[head].tolist()
        for token in range(29):
            # All kept tokens but the newest candidates are judged again.
            again = token in kept and kept.index(token) < 26
            expected = ranks_again[head, kept.index(token)] if again else ranks[head, token]
            assert last[token] == expected
        # The second window, and what came behind it, was never judged.
        assert not last[39:].any()
    mean = ranks.float().mean(dim=0).round()
    assert evictions.mean_rank[0, :29].tolist() == mean.tolist()
    assert not evictions.mean_rank[0, 29:].any()
    assert evictions.mean_rank.shape == (2, 60)


def test_the_best_score_ranks_highest_and_of_equal_ones_the_earlier():
    assert rank(torch.tensor([[3.0, -1.0, 3.0, 0.5, -1.0]])).tolist() == [[101, 26, 76, 51, 1]]
    assert rank(torch.zeros(1, 1)).tolist() == [[1]]


def test_a_preempted_request_or_a_second_one_is_refused():
    recorder = TraceRecorder(MAX_LEN, CONFIG.window)
    found, keep, scores = next(iter(compactions()))
    recorder.chosen(choice(found, keep, scores))
    with pytest.raises(RuntimeError, match="preempted"):
        recorder.chosen(choice(found, keep, scores))
    both = choice(found, keep, scores)._replace(directives=[found, found])
    with pytest.raises(RuntimeError, match="2 requests at once"):
        recorder.chosen(both)
