"""Numbers drawn by lot: the same for the same thing, unlike for others, and evenly spread."""

import pytest
import torch
from torch import Tensor

from rkv_vllm.kernels.batch import Eviction, EvictionBatch
from rkv_vllm.methods import Heads, ModelFacts, get_method
from rkv_vllm.methods.base import layer_number
from tests.kernels.cases import CPU, new_states
from tests.methods import judges
from tests.methods.test_kept import Paged, paged

GOLDEN = 0x9E3779B97F4A7C15
HEAD_SIZE = 16
# Standard deviations that a fixed seed may be off; about one test in a million would be.
SIGMAS = 5.0


def facts(layers=(0, 1), first_head=0, num_heads=2) -> ModelFacts:
    names = tuple(f"model.layers.{number}.self_attn.attn" for number in layers)
    ones = torch.ones(len(layers))
    return ModelFacts(names, first_head, num_heads, num_heads, HEAD_SIZE, ones, 0 * ones)


def draw(seeds, m: int, model: ModelFacts, layers: slice | None = None, window: int = 8) -> Tensor:
    """Scores of `random` for requests of these seeds: [requests, layers * KV heads, m]."""
    layers = layers or slice(0, len(model.layers))
    num_layers = len(model.layers[layers])
    states = new_states("heads first", 1, HEAD_SIZE, torch.float32, num_layers, model.num_kv_heads)
    n = m + window
    row = [0] * -(-n // 32)
    evictions = [Eviction(row, row, n, n, window, seed=seed) for seed in seeds]
    method = get_method("random")(None, model, CPU)
    return method.score(
        Heads(layers, states, states, None), EvictionBatch.of(evictions, window, "cpu")
    )


def scheduled_seeds(count: int, own: int = 12345, buffer: int = 128) -> list[int]:
    """Those of one request's compactions, as the planner makes them."""
    return [(own + GOLDEN * (1024 + buffer * i)) % 2**64 for i in range(count)]


def test_the_hash_is_splitmix64_bit_by_bit():
    # The first numbers of SplitMix64 from the state 1234567, as its authors' program prints them.
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [judges.mix(1234567 + GOLDEN * i) for i in (1, 2, 3)] == known
    given = paged([(63, 64, 31), (40, 41, 20, 15)], head_size=16)
    method = given.method("random", CPU)
    got = method.score(given.heads(method), given.batch)
    for i in range(2):
        for layer in range(2):
            expected = judges.random(given.judged(i, layer))
            own = got[i, layer * 3 : layer * 3 + 3, : expected.shape[1]]
            assert (own.double().numpy() == expected).all()


def test_the_same_seed_repeats_in_any_batch():
    model = facts()
    seeds = [2**64 - 1, 7, 0, 2**63]
    whole = draw(seeds, 50, model)
    assert torch.equal(draw(seeds, 50, model), whole)
    assert torch.equal(draw(seeds[::-1], 50, model), whole.flip(0))
    assert torch.equal(draw([7], 50, model), whole[1:2])
    # Of a longer request the first tokens are drawn as those of a shorter one.
    assert torch.equal(draw([7], 80, model)[:, :, :50], whole[1:2])


def test_the_draw_of_a_head_depends_neither_on_ranks_nor_on_the_order_of_layers():
    whole = draw([5, 6], 50, facts((0, 1, 2), num_heads=4)).view(2, 3, 4, 50)
    for rank in range(2):
        half = draw([5, 6], 50, facts((0, 1, 2), first_head=2 * rank, num_heads=2))
        assert torch.equal(half.view(2, 3, 2, 50), whole[:, :, 2 * rank : 2 * rank + 2])
    # A pipeline stage, a layer set in another order, a chunk of layers.
    some = draw([5, 6], 50, facts((2, 0), num_heads=4)).view(2, 2, 4, 50)
    assert torch.equal(some, whole[:, [2, 0]])
    chunk = draw([5, 6], 50, facts((2, 0), num_heads=4), slice(1, 2)).view(2, 1, 4, 50)
    assert torch.equal(chunk, whole[:, :1])


def test_heads_layers_compactions_and_requests_draw_independently():
    """No two rows agree more than chance lets them: 3 requests x 4 compactions x 6 x 4 heads."""
    n = 400
    seeds = [seed for own in (1, 2, 2**63) for seed in scheduled_seeds(4, own)]
    rows = draw(seeds, n, facts(range(6), num_heads=4)).flatten(0, 1)
    assert len(rows) == 288
    # For each pair Pearson's r of independent rows has a standard deviation of n ** -0.5.
    r = torch.corrcoef(rows.double()).fill_diagonal_(0.0)
    assert r.abs().max() < (SIGMAS + 0.5) * n**-0.5
    # Nor when shifted against each other, as streams of neighbouring seeds would be.
    for shift in (1, 2, 128):
        pairs = torch.cat([rows[:, shift:], rows[:, : n - shift]]).double()
        r = torch.corrcoef(pairs)[: len(rows), len(rows) :]
        assert r.abs().max() < (SIGMAS + 0.5) * (n - shift) ** -0.5


@pytest.mark.parametrize("along", ["tokens", "compactions", "requests", "heads", "layers"])
def test_numbers_are_uniform_along_every_axis(along):
    count = 8192
    drawn = {
        "tokens": lambda: draw([3], count, facts((0,), num_heads=1)),
        "compactions": lambda: draw(scheduled_seeds(count), 1, facts((0,), num_heads=1)),
        "requests": lambda: draw(range(count), 1, facts((0,), num_heads=1)),
        "heads": lambda: draw([3], 1, facts((0,), num_heads=count)),
        "layers": lambda: draw([3], 1, facts(range(count), num_heads=1)),
    }[along]().flatten()
    assert len(drawn) == count
    assert drawn.min() > 0.0
    assert drawn.max() < 1.0
    # Chi-square over 64 equal bins: mean 63, variance 126.
    bins = drawn.mul(64).long().bincount(minlength=64).double()
    chi_square = float(((bins - count / 64) ** 2).sum() / (count / 64))
    assert abs(chi_square - 63) < SIGMAS * 126**0.5
    # Neither are neighbours alike.
    r = float(torch.corrcoef(torch.stack([drawn[1:], drawn[:-1]]).double())[0, 1])
    assert abs(r) < SIGMAS * count**-0.5


def test_random_keeps_each_candidate_equally_often():
    count, m, places = 3000, 41, 10
    states = new_states("heads first", 2, HEAD_SIZE, torch.float32, 2, 2)
    row, n = [0, 1], m + 8
    evictions = [Eviction(row, row, n, n, places + 8, seed=seed) for seed in scheduled_seeds(count)]
    batch = EvictionBatch.of(evictions, 8, "cpu")
    scores = get_method("random")(None, facts(), CPU).score(
        Heads(slice(0, 2), states, states, None), batch
    )
    kept = CPU.select(scores, batch)[:, :, :places]
    share = places / m
    for head in range(4):
        times = kept[:, head].flatten().bincount(minlength=m).double()
        assert times.sum() == count * places
        bound = SIGMAS * (count * share * (1 - share)) ** 0.5
        assert (times - count * share).abs().max() < bound


def drawn_by_vase(given: Paged, places: int, count: int) -> Tensor:
    """Which candidates `vase` draws with many seeds: bool [count, layers * KV heads, m]."""
    (eviction,) = given.batch.evictions
    evictions = [
        eviction._replace(budget=places + given.batch.window, seed=seed)
        for seed in scheduled_seeds(count)
    ]
    batch = EvictionBatch.of(evictions, given.batch.window, "cpu")
    method = given.method("vase", CPU, sinks=0, share=0.0, pool=1)
    kept = CPU.select(method.score(given.heads(method), batch), batch)[:, :, :places].long()
    m = eviction.num_judged - given.batch.window
    is_kept = torch.zeros(count, kept.shape[1], m, dtype=torch.bool)
    return is_kept.scatter_(2, kept - eviction.prefix_len, True)


@pytest.mark.parametrize("places", [1, 2])
def test_vase_draws_in_proportion_to_attention_and_without_replacement(places):
    count = 1500
    # One query: the mean of many looks everywhere alike.
    given = paged([(14, 15, 5, 3)], head_size=16, window=1)
    is_kept = drawn_by_vase(given, places, count)
    assert (is_kept.sum(dim=2) == places).all()
    for layer in range(2):
        chances = torch.from_numpy(judges.attention_of(given.judged(0, layer), pool=1))
        for head in range(3):
            p = chances[head] / chances[head].sum()
            if places == 2:
                # First, or second behind any other one.
                p = p + p * ((p / (1 - p)).sum() - p / (1 - p))
            assert p.max() > 2 * p.min()
            times = is_kept[:, 3 * layer + head].sum(dim=0)
            bound = SIGMAS * (count * p * (1 - p)).sqrt()
            assert ((times - count * p).abs() < bound).all()


def test_vase_keeps_sinks_and_wide_values_whatever_is_drawn():
    given = paged([(63, 64, 31, 2)], group=3, head_size=16)
    method = given.method("vase", CPU)
    kept_always = None
    for seed in range(20):
        evictions = [e._replace(seed=seed) for e in given.batch.evictions]
        batch = EvictionBatch.of(evictions, 8, "cpu")
        keep = CPU.select(method.score(given.heads(method), batch), batch)[0]
        kept = [set(row) for row in keep.tolist()]
        kept_always = kept if kept_always is None else map(set.intersection, kept_always, kept)
        kept_always = list(kept_always)
    width = given.dense_values[0].amax(dim=-1) - given.dense_values[0].amin(dim=-1)
    for row, always in zip(width[:, :, 2:55].flatten(0, 1), kept_always, strict=True):
        # Two sinks are protected, two more are kept; of (31 - 8) / 4 places three are left.
        row[:2] = torch.inf
        assert {*(2 + row.topk(5).indices).tolist(), *range(55, 63)} <= always


@pytest.mark.parametrize(
    ("name", "number"),
    [("model.layers.3.self_attn.attn", 3), ("language_model.model.layers.12.attn", 12)],
)
def test_a_layers_number_is_in_its_name(name, number):
    assert layer_number(name) == number


@pytest.mark.parametrize(("name", "got"), [("attn", 0), ("layers.3.attn.1", 2), ("layer3", 0)])
def test_a_name_without_one_number_is_refused(name, got):
    with pytest.raises(ValueError, match=f"layer '{name}': got {got} numbers in its name"):
        layer_number(name)


def test_on_more_than_one_chunk_of_requests_seeds_go_with_their_requests():
    given = paged([(63, 64, 31), (63, 64, 31)], head_size=16)
    method = given.method("random", CPU)
    whole = method.score(given.heads(method), given.batch)
    second = method.score(given.heads(method), given.batch.part(slice(1, 2)))
    assert torch.equal(second, whole[1:])
    assert not torch.equal(whole[0], whole[1])
