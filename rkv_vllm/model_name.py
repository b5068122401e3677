"""What a model is called, wherever its files lie: for files that are made for one model."""

import os
import re


def model_name(path: str) -> str:
    """Returns `Qwen3-8B` of a folder, of a hub id, or of a path in the hub's cache.

    Args:
        path: the model as the user gave it.
    """
    if cached := re.search(r"models--[^/]*--([^/]+)/snapshots/", path):
        return cached[1]
    # A folder may be given as `.`; its links keep the names that users gave them.
    return os.path.basename(os.path.abspath(path))


def is_same_model(name: str, path: str) -> bool:
    """Tells whether a file that is made for `name` serves the model at `path`."""
    return name.lower() == model_name(path).lower()
