"""TriAttention against its formula with keys before RoPE, positions and distances; and its file."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.methods import Heads, ModelFacts, ModelShape
from rkv_vllm.methods.query_statistics import QueryStatistics, load_statistics
from rkv_vllm.methods.triattention import TriAttention
from tests.kernels.cases import (
    CPU,
    HEADS,
    LAYERS,
    assert_equivalent_choice,
    new_case,
)

SIZE = 32
ROPE = 1e4 ** -(np.arange(SIZE // 2) / (SIZE // 2))
SHAPE = ModelShape("models/tiny", LAYERS, 2 * HEADS, HEADS, SIZE)
# Scores have variance 1; the angles of a million positions leave float32 that much.
TOLERANCE = {"rtol": 0, "atol": 2e-5}
RAGGED = [(100, 103, 50), (63, 63, 9, 33), (70, 70, 41, 29), (300, 301, 80, 5), (9, 9, 8)]


def random_statistics(group: int, seed: int = 5) -> QueryStatistics:
    generator = torch.Generator().manual_seed(seed)
    shape = (LAYERS, HEADS * group, SIZE // 2)
    mean = torch.randn((*shape, 2), generator=generator)
    spread = torch.rand(shape, generator=generator)
    return QueryStatistics(
        model="tiny",
        num_kv_heads=HEADS,
        num_tokens=1000,
        inv_freq=torch.from_numpy(ROPE).float(),
        mean_query=torch.cat(mean.unbind(-1), dim=-1),
        mean_magnitude=mean.norm(dim=-1) + spread,
    )


def rotated(states, angles):
    """Of `states [..., n, SIZE]` (float64) each pair of elements, turned by `angles [n, pairs]`."""
    first, second = states[..., : SIZE // 2], states[..., SIZE // 2 :]
    cosine, sine = np.cos(angles), np.sin(angles)
    parts = [first * cosine - second * sine, second * cosine + first * sine]
    return np.concatenate(parts, axis=-1)


def case_at_positions(lengths, group: int, dtype=torch.float32, layout: str = "heads first"):
    """A case whose cached keys were made before RoPE and rotated at known, gappy positions.

    Returns:
        The case; of each request the positions [total_len].
    """
    case = new_case(lengths, head_size=SIZE, group=group, dtype=dtype, layout=layout)
    draw = np.random.default_rng(3)
    evictions, all_positions = [], []
    for i, eviction in enumerate(case.batch.evictions):
        window_end = 5000 * (i + 1) + eviction.settled_len
        earlier = draw.choice(window_end, eviction.settled_len, replace=False)
        later = window_end + np.arange(eviction.total_len - eviction.settled_len)
        positions = np.concatenate([np.sort(earlier), later])
        keys = rotated(case.dense[i].double().numpy(), positions[:, None] * float32_rope())
        case.dense[i] = torch.from_numpy(keys).to(dtype)
        case.states.write(torch.tensor(eviction.old_block_ids), case.dense[i])
        evictions.append(eviction._replace(window_end=window_end))
        all_positions.append(positions)
    return replace(case, batch=EvictionBatch.of(evictions, 8, "cpu")), all_positions


def float32_rope():
    return torch.from_numpy(ROPE).float().double().numpy()


def oracle(statistics, case, positions):
    """Scores float64 [requests, LAYERS * HEADS, most candidates], token by token."""
    rope, pairs = float32_rope(), SIZE // 2
    result = np.full((case.batch.num_requests, LAYERS * HEADS, case.batch.max_candidates), -np.inf)
    mean_query = statistics.mean_query.double().numpy()
    magnitude = statistics.mean_magnitude.double().numpy()
    group = mean_query.shape[1] // HEADS
    for i, eviction in enumerate(case.batch.evictions):
        m, start = case.batch.num_candidates(i), eviction.prefix_len
        where = positions[i][start : start + m]
        cached = case.dense[i][:, :, start : start + m].double().numpy()
        before = rotated(cached, -where[:, None] * rope)
        for layer in range(LAYERS):
            for head in range(HEADS):
                of_group = []
                for own in range(head * group, (head + 1) * group):
                    query = mean_query[layer, own]
                    query = query[:pairs] + 1j * query[pairs:]
                    rows = []
                    for key, position in zip(before[layer, head], where, strict=True):
                        key = key[:pairs] + 1j * key[pairs:]
                        waves = 0.0
                        for power in range(17):
                            distance = eviction.window_end + 2**power - position
                            angle = distance * rope + np.angle(query * key.conj())
                            waves += np.sum(abs(query) * abs(key) * np.cos(angle)) / 17
                        rest = np.sum((magnitude[layer, own] - abs(query)) * abs(key))
                        rows.append(waves + rest)
                    rows = np.array(rows)
                    deviation = rows.std()
                    of_group.append((rows - rows.mean()) / (deviation if m > 1 else 1))
                result[i, layer * HEADS + head, :m] = np.max(of_group, axis=0)
    return result


def facts(case, layers=tuple(range(LAYERS)), first_kv_head=0, num_kv_heads=HEADS) -> ModelFacts:
    names = tuple(f"model.layers.{i}.self_attn.attn" for i in layers)
    count = len(names)
    return ModelFacts(
        names, first_kv_head, num_kv_heads, 99, SIZE, torch.ones(count), torch.zeros(count)
    )


def scores_of(options, case, model=None) -> torch.Tensor:
    method = TriAttention(options, model or facts(case), CPU)
    layers = slice(0, case.states.num_layers)
    return method.score(Heads(layers, case.states, case.states, None), case.batch)


@pytest.fixture
def options(tmp_path):
    """Options with a file of random statistics for so many query heads per KV head."""

    def make(group: int) -> TriAttention.Options:
        path = tmp_path / f"{group}.safetensors"
        random_statistics(group).save(path)
        return TriAttention.Options(str(path))

    return make


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("layout", ["heads first", "vec keys"])
def test_kept_tokens_are_those_of_the_formula_with_positions(options, group, layout):
    case, positions = case_at_positions(RAGGED, group, layout=layout)
    got = scores_of(options(group), case)
    expected = torch.from_numpy(oracle(random_statistics(group), case, positions)).float()
    torch.testing.assert_close(got, expected, **TOLERANCE)
    assert_equivalent_choice(CPU.select(got, case.batch), expected, case.batch)
    assert (case.batch.non_finite == 2**31 - 1).all()


def test_half_precision_keys_are_scored_in_float32(options):
    case, positions = case_at_positions(RAGGED, 3, torch.bfloat16)
    expected = torch.from_numpy(oracle(random_statistics(3), case, positions)).float()
    torch.testing.assert_close(scores_of(options(3), case), expected, **TOLERANCE)


def test_reading_layer_by_layer_changes_nothing(options, monkeypatch):
    case, _ = case_at_positions(RAGGED, 3)
    whole = scores_of(options(3), case)
    monkeypatch.setattr("rkv_vllm.methods.triattention._MAX_KEY_ELEMENTS", 1)
    torch.testing.assert_close(scores_of(options(3), case), whole, **TOLERANCE)


def test_some_layers_are_scored_by_their_own_statistics(options):
    case, _ = case_at_positions(RAGGED, 3)
    method = TriAttention(options(3), facts(case), CPU)
    whole = scores_of(options(3), case)
    second = Heads(slice(1, 2), case.states.layers(slice(1, 2)), case.states, None)
    torch.testing.assert_close(method.score(second, case.batch), whole[:, HEADS:], **TOLERANCE)


def test_a_rank_finds_its_layers_by_name_and_its_heads_by_number(options):
    """A pipeline stage with the second layer, a rank with the last KV head."""
    case, _ = case_at_positions(RAGGED, 3)
    whole = scores_of(options(3), case)
    last = slice(HEADS - 1, HEADS)
    own = type(case.states)(case.states.blocks[1:, :, last], case.states.packing, 32)
    model = facts(case, layers=(1,), first_kv_head=HEADS - 1, num_kv_heads=1)
    method = TriAttention(options(3), model, CPU)
    got = method.score(Heads(slice(0, 1), own, own, None), case.batch)
    torch.testing.assert_close(got, whole[:, -1:], **TOLERANCE)


def test_equal_keys_are_equal_and_a_broken_key_spoils_its_own_head_only(options):
    case, _ = case_at_positions([(40, 40, 20)], 1)
    case.states.cells.zero_()
    assert scores_of(options(1), case).eq(0).all()
    case.states.cells[0, case.batch.evictions[0].old_block_ids[0], 1, 3] = torch.inf
    keep = CPU.select(scores_of(options(1), case), case.batch)
    assert keep[0, 1].tolist() == [*range(20, 40)]
    assert keep[0, 2].tolist() == [*range(12), *range(32, 40)]
    assert case.batch.non_finite.tolist() == [1]


def test_a_file_holds_what_was_saved_and_leaves_nothing_beside_it(tmp_path):
    saved = random_statistics(3)
    saved.save(tmp_path / "a.safetensors")
    loaded = load_statistics(str(tmp_path / "a.safetensors"))
    for name in ("inv_freq", "mean_query", "mean_magnitude"):
        assert torch.equal(getattr(loaded, name), getattr(saved, name))
    assert (loaded.model, loaded.num_kv_heads, loaded.num_tokens) == ("tiny", HEADS, 1000)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def truncated(path):
    random_statistics(2).save(path)
    path.write_bytes(path.read_bytes()[:-100])


def with_nan(path):
    statistics = random_statistics(2)
    statistics.mean_query[0, 0, 0] = torch.nan
    statistics.save(path)


def without_tensor(path):
    other = {"format": "rkv-vllm query statistics", "version": "1", "rotary_style": "half-split"}
    save_file({"inv_freq": torch.ones(2)}, path, other)


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (lambda path: None, "it is a file that cannot be read"),
        (truncated, "it is a file that cannot be read"),
        (with_nan, "it is a damaged file (mean_query holds NaN or infinite numbers)"),
        (without_tensor, "it is a file that cannot be read"),
        (
            lambda path: save_file({"x": torch.ones(2)}, path),
            "it is a safetensors file without query statistics",
        ),
        (
            lambda path: replace(random_statistics(2), model="Other-7B").save(path),
            "wanted statistics of 'models/tiny', but it holds those of 'Other-7B'",
        ),
        (
            lambda path: random_statistics(3).save(path),
            "whose num_query_heads is 6, but it holds those of one with 9",
        ),
    ],
)
def test_a_file_that_does_not_fit_the_model_is_refused_with_the_command(tmp_path, write, sentence):
    path = tmp_path / "statistics"
    write(path)
    with pytest.raises(ValueError, match="--kv-option statistics: got ") as error:
        TriAttention.check_model(TriAttention.Options(str(path)), SHAPE)
    assert sentence in str(error.value)
    assert "make them: rkv-vllm calibrate models/tiny --out FILE.safetensors" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_no_file_is_refused_and_a_fitting_one_is_not(tmp_path):
    with pytest.raises(ValueError, match="got '', wanted a file with statistics of 'models/tiny'"):
        TriAttention.check_model(TriAttention.Options(), SHAPE)
    path = tmp_path / "statistics"
    random_statistics(2).save(path)
    TriAttention.check_model(TriAttention.Options(str(path)), SHAPE)
    cached = SHAPE._replace(name="/hub/models--Org--Tiny/snapshots/0123abc")
    TriAttention.check_model(TriAttention.Options(str(path)), cached)
