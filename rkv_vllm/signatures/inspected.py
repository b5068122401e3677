"""Describes a symbol of the installed vLLM in the words of the signature tables.

Read-only and import-only. `scripts/vllm_signatures.py` finds the same descriptions in source text;
a test holds the two together. The words:

* `(self, a, b=, *, c)`: a function; `=` marks a default, annotations and values are left out;
* `property`, cached ones included;
* `fields: a, b`: a dataclass;
* `class`: any other class;
* `attribute`: a variable of a module or class, or something its methods assign to `self`;
* `missing`.
"""

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Iterable
from types import FunctionType
from typing import Any

MISSING = "missing"


def describe(symbol: str) -> str:
    """Describes a symbol of the installed vLLM.

    Args:
        symbol: "package.module:Class.name", imported where it is not yet.
    """
    module_name, _, path = symbol.partition(":")
    *owners, name = path.split(".")
    try:
        owner = importlib.import_module(module_name)
        for each in owners:
            owner = getattr(owner, each)
    except (ModuleNotFoundError, AttributeError):
        return MISSING
    if inspect.isclass(owner):
        return _describe_member(owner, name)
    return _describe_object(getattr(owner, name)) if hasattr(owner, name) else MISSING


def format_parameters(parameters: Iterable[tuple[str, inspect._ParameterKind, bool]]) -> str:
    """Spells out a parameter list.

    Args:
        parameters: (name, kind, has a default) each.
    """
    words: list[str] = []
    last_kind = None
    for name, kind, has_default in parameters:
        if last_kind is inspect.Parameter.POSITIONAL_ONLY and kind is not last_kind:
            words.append("/")
        if kind is inspect.Parameter.KEYWORD_ONLY and last_kind not in (
            kind,
            inspect.Parameter.VAR_POSITIONAL,
        ):
            words.append("*")
        stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
        words.append(f"{stars.get(kind, '')}{name}{'=' if has_default else ''}")
        last_kind = kind
    if last_kind is inspect.Parameter.POSITIONAL_ONLY:
        words.append("/")
    return f"({', '.join(words)})"


def _describe_member(owner: type, name: str) -> str:
    static = inspect.getattr_static(owner, name, None)
    if isinstance(static, (property, functools.cached_property)):
        return "property"
    if static is not None:
        return _describe_object(getattr(owner, name))
    return "attribute" if _is_assigned(owner, name) else MISSING


def _describe_object(value: Any) -> str:
    if inspect.isclass(value):
        if dataclasses.is_dataclass(value):
            return f"fields: {', '.join(field.name for field in dataclasses.fields(value))}"
        return "class"
    if not inspect.isroutine(value):
        return "attribute"
    parameters = inspect.signature(value).parameters.values()
    return format_parameters(
        (each.name, each.kind, each.default is not each.empty) for each in parameters
    )


def _is_assigned(owner: type, name: str) -> bool:
    """Whether instances get this attribute, as far as the class tells without being called.

    The names a method uses stand in its code object; whether it assigns or only reads the name is
    not told apart there. The table was made from the source text, which does tell.
    """
    for base in owner.__mro__:
        if name in inspect.get_annotations(base):
            return True
        for method in map(inspect.unwrap, filter(inspect.isroutine, vars(base).values())):
            method = getattr(method, "__func__", method)
            if isinstance(method, FunctionType) and name in method.__code__.co_names:
                return True
    return False
