"""Budgets that differ between layers: PyramidKV's ladder, or classes of layers from a file.

vLLM gives the layers of one budget a block table of their own, and wants tables of equally many
layers: so the layers fall into 2 to 4 classes of equal size. A class with share s keeps
`window + s * (budget - window)` tokens, shares being scaled so that the mean over all layers is the
budget. Knows no vLLM; `rkv_vllm/calibrate/layer_importance.py` makes such a file, worker/runner.py
asks for the budgets.
"""

import json
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from rkv_vllm.model_file import check_model, write_model_file
from rkv_vllm.option_field import OptionError

METHOD, PYRAMID = "method", "pyramid"
LABEL = "--kv-layer-budgets (layer_budgets)"

# Every class costs a block table, and a launch of what prepares it, in each step.
NUM_CLASSES = (4, 3, 2)

# The lowest layer's budget is 2 - 1/20 of the mean, the highest layer's 1/20.
_STEEPNESS = 20


class LayerClass(NamedTuple):
    """Layers of one budget.

    Attributes:
        layers: their numbers in the model.
        share: of the tokens beside the window, in proportion to the other classes'.
    """

    layers: tuple[int, ...]
    share: float


def require_classes(num_layers: int) -> int:
    """Returns the most classes of equal size that so many layers can have.

    Raises:
        OptionError: there are none.
    """
    for count in NUM_CLASSES:
        if num_layers % count == 0:
            return count
    raise OptionError(
        LABEL,
        f"a model of {num_layers} layers",
        "one whose layers make 2, 3 or 4 classes of equal size",
        "leave the option out: all its layers then have the same budget",
    )


def pyramid(num_layers: int) -> list[LayerClass]:
    """Returns the ladder that falls evenly from the lowest to the highest layer, in classes.

    Each class has the mean of its layers.

    Raises:
        OptionError: the layers cannot be shared out.

    Source: PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling
    (arXiv:2406.02069), section 4.2; the steepness is that of its released code.
    """
    count = require_classes(num_layers)
    lowest, highest = 2 - 1 / _STEEPNESS, 1 / _STEEPNESS
    size = num_layers // count
    classes = []
    for first in range(0, num_layers, size):
        middle = (first + (size - 1) / 2) / (num_layers - 1)
        share = lowest + (highest - lowest) * middle
        classes.append(LayerClass(tuple(range(first, first + size)), share))
    return classes


def class_budgets(
    setting: str, classes: Sequence[LayerClass], budget: int, window: int
) -> list[int]:
    """Returns whole tokens for each class; their mean is the budget.

    Raises:
        OptionError: a class would keep nothing but the window.
    """
    total = sum(Fraction(each.share) for each in classes)
    exact = [
        window + Fraction(each.share) * len(classes) * (budget - window) / total for each in classes
    ]
    budgets = [math.floor(each) for each in exact]
    # What rounding down has left goes to those that lost most.
    by_loss = sorted(range(len(exact)), key=lambda i: budgets[i] - exact[i])
    for i in by_loss[: len(exact) * budget - sum(budgets)]:
        budgets[i] += 1
    if min(budgets) <= window:
        raise OptionError(
            LABEL,
            setting,
            f"more than --kv-window {window} tokens in every class, but with --kv-budget {budget} "
            f"they are {', '.join(map(str, budgets))}",
            "raise the budget, lower the window or choose shares that are nearer to each other",
        )
    return budgets


def budgets_of_layers(
    setting: str, model: str, num_layers: int, budget: int, window: int
) -> list[int]:
    """Returns what each layer of a model keeps.

    Args:
        setting: of `--kv-layer-budgets`, anything but `method`.
        model: folder or hub id.
        num_layers: of the whole model.
        budget: of the server, the mean.
        window: newest tokens, which every layer keeps.

    Raises:
        OptionError: the ladder or the file does not fit the model or the budget.
    """
    if setting == PYRAMID:
        classes = pyramid(num_layers)
    else:
        classes = _read_classes(setting, model, num_layers)
    of_layer = {}
    for each, kept in zip(classes, class_budgets(setting, classes, budget, window), strict=True):
        of_layer |= dict.fromkeys(each.layers, kept)
    return [of_layer[layer] for layer in range(num_layers)]


def write_classes(path: Path, model: str, classes: Sequence[LayerClass]) -> None:
    """Write a file that `budgets_of_layers` reads; what stops it leaves an older one as it was.

    Raises:
        OSError: it cannot be written.
    """
    document = {
        "model": model,
        "num_layers": sum(len(each.layers) for each in classes),
        "classes": [{"layers": each.layers, "share": each.share} for each in classes],
    }
    write_model_file(path, document)


def _read_classes(path: str, model: str, num_layers: int) -> list[LayerClass]:
    def refuse(got: str) -> OptionError:
        return OptionError(
            LABEL,
            path,
            f"{METHOD}, {PYRAMID} or a JSON file of layer classes of {model!r}, but {got}",
            f"make it: rkv-vllm calibrate {model} --layer-budgets FILE.json",
        )

    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise refuse(f"it cannot be read ({error})") from error
    classes = _parse_classes(document)
    if isinstance(classes, str):
        raise refuse(classes)
    check_model(document, model, num_layers, refuse)
    if sorted(layer for each in classes for layer in each.layers) != list(range(num_layers)):
        raise refuse(f"its classes do not name each layer from 0 to {num_layers - 1} once")
    sizes = [len(each.layers) for each in classes]
    if len(classes) not in NUM_CLASSES or len(set(sizes)) != 1:
        raise refuse(f"it has classes of {sizes} layers, not 2 to 4 of equally many")
    return classes


def _parse_classes(document: Any) -> list[LayerClass] | str:
    """The classes of a document of the right form, or what is wrong with it."""
    if not isinstance(document, dict) or not {"model", "num_layers", "classes"} <= document.keys():
        return 'it is no object with "model", "num_layers" and "classes"'
    if not isinstance(document["model"], str) or not isinstance(document["classes"], list):
        return '"model" is no text or "classes" no list'
    classes = []
    for each in document["classes"]:
        fits = isinstance(each, dict) and isinstance(each.get("layers"), list)
        share = each.get("share") if fits else None
        if not fits or not all(type(layer) is int for layer in each["layers"]):
            return f'the class {each!r} has no list of layer numbers as "layers"'
        if type(share) not in (int, float) or not (0 < share < math.inf):
            return f'the class {each!r} has no positive number as "share"'
        classes.append(LayerClass(tuple(each["layers"]), share))
    return classes
