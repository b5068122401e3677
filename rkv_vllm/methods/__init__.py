"""Registry of compression methods: which tokens of a request's KV cache to keep.

A method is one file with one class derived from ``Method`` (see ``base.py``; ``rkv.py`` is the
first). A class is found by a registered name, which other distributions add through the
entry point group ``rkv_vllm.methods``, or by its qualified name, spelled as vLLM spells those of
schedulers: ``package.module.Class``. Nothing here knows vLLM, blocks or requests.
"""

import inspect
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from operator import attrgetter

from rkv_vllm.methods.base import DenseMethod, Heads, Method, ModelFacts, ModelShape, Need
from rkv_vllm.option_field import option

ENTRY_POINT_GROUP = "rkv_vllm.methods"

# Listed here as well as in the distribution's metadata, which a bare source tree does not have.
_BUILT_IN = tuple(
    EntryPoint(name=name, value=f"rkv_vllm.methods.{name}:{class_name}", group=ENTRY_POINT_GROUP)
    for name, class_name in (
        ("keydiff", "KeyDiff"),
        ("knorm", "KNorm"),
        ("random", "Random"),
        ("recent", "Recent"),
        ("rkv", "RKV"),
        ("snapkv", "SnapKV"),
        ("triattention", "TriAttention"),
        ("vase", "VaSE"),
    )
)

__all__ = [
    "DenseMethod",
    "Heads",
    "Method",
    "ModelFacts",
    "ModelShape",
    "Need",
    "available_methods",
    "get_method",
    "option",
]


def available_methods() -> list[str]:
    """Return the registered names, sorted; imports none of the methods."""
    return sorted(_registered())


def get_method(name: str) -> type[Method]:
    """Load the class of a compression method.

    Args:
        name: A name from ``available_methods``, for example ``"rkv"``, or the qualified name of a
            class, for example ``"rkv_vllm.methods.rkv.RKV"``. Its module is imported.

    Returns:
        The class; ``get_method(name)(options, model, ops)`` makes a method object.

    Raises:
        ValueError: The name is unknown, two distributions register it for different classes, or
            what it names cannot be imported or is no complete ``Method``. The message starts with
            what was got, so that callers can put the option's name before it.
    """
    if entry := _registered().get(name):
        module_name, class_name = entry.module, entry.attr
    else:
        module_name, _, class_name = name.rpartition(".")
    if not module_name:
        raise ValueError(
            f"got {name!r}, wanted one of {', '.join(available_methods())} or the qualified name "
            "of a class such as package.module.Class; correct the name or install the package "
            "that brings the method"
        )
    method = _load(name, module_name, class_name)
    _check_complete(name, method)
    return method


def _registered() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in (*_BUILT_IN, *entry_points(group=ENTRY_POINT_GROUP)):
        known = found.setdefault(entry.name, entry)
        if known.value != entry.value:
            raise ValueError(
                f"got {entry.name!r}, wanted one method of that name, but both {known.value} and "
                f"{entry.value} are registered; uninstall one of the two distributions"
            )
    return found


def _load(name: str, module_name: str, class_name: str) -> object:
    try:
        module = import_module(module_name)
    # A leading dot is a TypeError: there is no package that it could be relative to.
    except (ImportError, TypeError) as error:
        raise ValueError(
            f"got {name!r}, wanted a class that every process can import, but importing "
            f"{module_name!r} says: {error}; correct the name, install the package that brings "
            "the module, or put its folder into PYTHONPATH"
        ) from error
    try:
        return attrgetter(class_name)(module)
    except AttributeError as error:
        raise ValueError(
            f"got {name!r}, wanted a class of {module_name!r}, which has no {class_name!r}; write "
            "the name as package.module.Class"
        ) from error


def _check_complete(name: str, method: object) -> None:
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise ValueError(
            f"got {name!r}, wanted a class derived from rkv_vllm.methods.Method, but it names "
            f"{method!r}; derive the class or name another one"
        )
    if inspect.isabstract(method):
        raise ValueError(
            f"got {name!r}, wanted a class with all methods of Method, but it lacks "
            f"{', '.join(sorted(method.__abstractmethods__))}; add them"
        )
    _check_options(name, method.Options)


def _check_options(name: str, options: object) -> None:
    """Options travel as JSON, are keys of caches and may all be left out."""
    if not (
        isinstance(options, type) and is_dataclass(options) and options.__dataclass_params__.frozen
    ):
        raise ValueError(
            f"got {name!r}, wanted a method whose Options is a frozen dataclass, but it is "
            f"{options!r}; decorate it with @dataclass(frozen=True)"
        )
    bare = [
        field.name
        for field in fields(options)
        if field.default is MISSING and field.default_factory is MISSING
    ]
    if bare:
        raise ValueError(
            f"got {name!r}, wanted a method whose Options all have defaults, but "
            f"{', '.join(bare)} of {options.__name__} has none; give it one"
        )
