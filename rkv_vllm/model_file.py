"""A JSON file that is made for one model: written whole or not at all, read with what all check.

Such a file is an object with `model` and `num_layers` beside what it is for. Next: layer_budgets.py
and cache_owners.py, which know two kinds.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rkv_vllm.model_name import is_same_model
from rkv_vllm.whole_file import whole_file


def write_model_file(path: Path, document: dict[str, Any]) -> None:
    """Write a document; what stops it leaves an older file as it was.

    Raises:
        OSError: it cannot be written.
    """
    with whole_file(path) as half:
        half.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def check_model(
    document: dict[str, Any], model: str, num_layers: int, refuse: Callable[[str], Exception]
) -> None:
    """Check that a document is for a model.

    Args:
        document: of the right form.
        model: folder or hub id.
        num_layers: of the whole model.
        refuse: makes the error of a sentence that says what is wrong.
    """
    if not is_same_model(document["model"], model):
        raise refuse(f"it is for {document['model']!r}")
    if document["num_layers"] != num_layers:
        raise refuse(f"it is for {document['num_layers']} layers, and the model has {num_layers}")
