"""Registry of compression methods: which tokens of a request's KV cache to keep.

A method is one file with one class derived from ``CompressionMethod`` (see ``base.py``; ``rkv.py``
is the first). Other distributions add theirs through the entry point group ``rkv_vllm.methods``.
Nothing here knows vLLM, blocks or requests.
"""

from importlib.metadata import EntryPoint, entry_points

from rkv_vllm.methods.base import CompressionMethod

ENTRY_POINT_GROUP = "rkv_vllm.methods"

# Listed here as well as in the distribution's metadata, which a bare source tree does not have.
_BUILT_IN = (EntryPoint(name="rkv", value="rkv_vllm.methods.rkv:RKV", group=ENTRY_POINT_GROUP),)

__all__ = ["CompressionMethod", "available_methods", "get_method"]


def available_methods() -> list[str]:
    """Return the names that ``get_method`` accepts, sorted; imports none of the methods."""
    return sorted(_registered())


def get_method(name: str) -> type[CompressionMethod]:
    """Load the class of a compression method.

    Args:
        name: A name from ``available_methods``, for example ``"rkv"``.

    Returns:
        The class; ``get_method(name).from_config(config)`` makes a method object.

    Raises:
        ValueError: ``name`` is unknown, or two distributions register it for different classes.
        TypeError: What is registered under ``name`` is not a ``CompressionMethod`` class.
    """
    registered = _registered()
    if name not in registered:
        raise ValueError(
            f"unknown compression method {name!r}; available: {', '.join(sorted(registered))}"
        )
    method = registered[name].load()
    if not (isinstance(method, type) and issubclass(method, CompressionMethod)):
        raise TypeError(
            f"compression method {name!r} is {registered[name].value}, "
            "which is not a class derived from rkv_vllm.methods.CompressionMethod"
        )
    return method


def _registered() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in (*_BUILT_IN, *entry_points(group=ENTRY_POINT_GROUP)):
        known = found.setdefault(entry.name, entry)
        if known.value != entry.value:
            raise ValueError(
                f"compression method {entry.name!r} is registered twice, as {known.value} "
                f"and as {entry.value}; uninstall one of the two distributions"
            )
    return found
