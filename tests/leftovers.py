"""What our objects still hold of requests that are gone: the size of every container they own.

Walks from an object through all attributes and containers to further objects of this package, so
that a dictionary added tomorrow is looked at as well. Knows no class by name; vLLM's own objects
are looked at only where ours derive from them.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from rkv_vllm.scheduling.step_stats import FALLBACKS

# What may stay, and how much of it: the reports of the last requests that finished, of nine values
# each; an empty dictionary for each KV-cache group; a counter for each reason. The others are what
# vLLM's runner remembers of its last step.
BOUNDED = {
    "finished_reports": 256,
    "_watched": 4,
    "recomputed": len(FALLBACKS),
    "_draft_token_ids": 4,
    "_draft_token_req_ids": 4,
    "mamba_state_idx": 4,
    "_mamba_state_copy_funcs": 4,
}

_SEQUENCES = (list, tuple, set, frozenset, deque)


def container_sizes(*roots: object) -> dict[str, int]:
    """Entries of every container that these objects lead to, by path.

    Args:
        roots: objects of this package, or of classes derived from vLLM's.

    Returns:
        Sizes by path; "scheduler._tracks[0].planner._near" is one.
    """
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    for root in roots:
        _walk(root, type(root).__name__, sizes, seen)
    return sizes


def assert_nothing_is_left(before: Mapping[str, int], *roots: object) -> None:
    """Fail where a container holds more than before the first request.

    Args:
        before: what `container_sizes` said of the same objects then.
        roots: the objects; every request is gone, and the workers know.
    """
    grown = {
        path: size
        for path, size in container_sizes(*roots).items()
        if size > before.get(path, 0) and not _is_bounded(path, size)
    }
    assert not grown, f"still held of requests that are gone, in entries: {grown}"


def _is_bounded(path: str, size: int) -> bool:
    attribute = path.split(".")[-1].split("[")[0]
    return attribute in BOUNDED and size <= BOUNDED[attribute]


def _walk(value: object, path: str, sizes: dict[str, int], seen: set[int]) -> None:
    if isinstance(value, (int, float, str)) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, (Mapping, *_SEQUENCES)):
        # Those of fixed length hold others at most.
        if not isinstance(value, (tuple, frozenset)):
            sizes[path] = len(value)
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in list(items):
            _walk(item, f"{path}[{key!r}]", sizes, seen)
    if _is_ours(value):
        for name, attribute in _attributes(value):
            _walk(attribute, f"{path}.{name}", sizes, seen)


def _is_ours(value: object) -> bool:
    return any(base.__module__.startswith("rkv_vllm.") for base in type(value).__mro__)


def _attributes(value: object) -> Iterator[tuple[str, Any]]:
    if hasattr(value, "__dict__"):
        yield from list(vars(value).items())
    elif is_dataclass(value):
        for field in fields(value):
            yield field.name, getattr(value, field.name)
