"""Budgets by layer: the ladder, files, and what is refused before a model loads."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkv_vllm.layer_budgets import (
    LayerClass,
    budgets_of_layers,
    class_budgets,
    pyramid,
    write_classes,
)

CLASSES = [LayerClass((0, 3), 3.0), LayerClass((1, 2), 1.0)]


def budgets(setting, *, model="models/Tiny-1B", num_layers=4, budget=40, window=8):
    return budgets_of_layers(str(setting), model, num_layers, budget, window)


@pytest.mark.parametrize(
    ("num_layers", "count"), [(32, 4), (28, 4), (30, 3), (26, 2), (2, 2), (3, 3), (4, 4)]
)
def test_the_ladder_has_the_most_classes_that_share_the_layers_evenly(num_layers, count):
    classes = pyramid(num_layers)
    assert len(classes) == count
    assert [layer for each in classes for layer in each.layers] == [*range(num_layers)]
    assert {len(each.layers) for each in classes} == {num_layers // count}
    shares = [each.share for each in classes]
    assert shares == sorted(shares, reverse=True)
    # From 1.95 of the mean in the lowest layer to .05 in the highest, evenly.
    of_layers = [1.95 - 1.9 * layer / (num_layers - 1) for layer in range(num_layers)]
    for each in classes:
        mean = sum(of_layers[layer] for layer in each.layers) / len(each.layers)
        assert each.share == pytest.approx(mean)


def test_a_ladder_of_hand_counted_layers():
    # Beside the window of 8 there are 100: 195, 132, 68 and 5, rounded to a sum of 400.
    assert budgets("pyramid", budget=108) == [203, 140, 76, 13]


@given(
    shares=st.lists(st.floats(0.5, 5), min_size=2, max_size=4),
    budget=st.integers(60, 5000),
    window=st.integers(1, 20),
)
def test_the_mean_is_the_budget_to_the_token(shares, budget, window):
    classes = [LayerClass((i,), share) for i, share in enumerate(shares)]
    kept = class_budgets("x", classes, budget, window)
    assert sum(kept) == budget * len(kept)
    for share, tokens in zip(shares, kept, strict=True):
        exact = window + share * len(shares) * (budget - window) / sum(shares)
        assert abs(tokens - exact) < 1


def test_a_file_gives_its_layers_their_shares(tmp_path):
    path = tmp_path / "classes.json"
    write_classes(path, "Tiny-1B", CLASSES)
    assert budgets(path) == [56, 24, 24, 56]
    assert budgets(path, model="/hub/models--Org--tiny-1b/snapshots/0abc") == [56, 24, 24, 56]
    assert [each.name for each in tmp_path.iterdir()] == ["classes.json"]


GOOD = {
    "model": "Tiny-1B",
    "num_layers": 4,
    "classes": [{"layers": [0, 3], "share": 3}, {"layers": [1, 2], "share": 1}],
}


def with_classes(*classes):
    return {**GOOD, "classes": [{"layers": layers, "share": share} for layers, share in classes]}


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        (None, "it cannot be read ([Errno 2]"),
        ("{", "it cannot be read (Expecting"),
        ([1], 'it is no object with "model", "num_layers" and "classes"'),
        ({**GOOD, "model": 3}, '"model" is no text'),
        ({**GOOD, "model": "Other-7B"}, "of 'models/Tiny-1B', but it is for 'Other-7B'"),
        ({**GOOD, "num_layers": 6}, "it is for 6 layers, and the model has 4"),
        ({**GOOD, "classes": [3]}, "the class 3 has no list of layer numbers"),
        (with_classes(([0, 3], -1), ([1, 2], 1)), 'has no positive number as "share"'),
        (with_classes(([0, 3], float("nan")), ([1, 2], 1)), 'no positive number as "share"'),
        (with_classes(([0, 1], 1), ([1, 2], 2)), "do not name each layer from 0 to 3 once"),
        (with_classes(([0], 1), ([1, 2, 3], 2)), "it has classes of [1, 3] layers, not 2 to 4"),
        (with_classes(([0, 1, 2, 3], 1)), "it has classes of [4] layers, not 2 to 4"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_the_command(tmp_path, document, sentence):
    path = tmp_path / "classes.json"
    if document is not None:
        path.write_text(document if isinstance(document, str) else json.dumps(document))
    with pytest.raises(ValueError, match=r"--kv-layer-budgets \(layer_budgets\): got ") as error:
        budgets(path)
    assert sentence in str(error.value)
    assert "rkv-vllm calibrate models/Tiny-1B --layer-budgets FILE.json" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_model_without_classes_and_a_budget_without_room_are_refused_by_name():
    with pytest.raises(ValueError, match="got 'a model of 25 layers', wanted one whose layers"):
        budgets("pyramid", num_layers=25)
    assert budgets("pyramid", budget=28)[-1] == 9
    message = (
        r"more than --kv-window 8 tokens in every class, but with --kv-budget 16 they are .*8;"
    )
    with pytest.raises(ValueError, match=message):
        budgets("pyramid", budget=16)
