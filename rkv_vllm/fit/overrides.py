"""Says which vLLM functions ours stand in for, and compares these with a table at start.

A plugin that overrides functions breaks quietly when their parameters change. So the signature of
each stands in `vllm-0.32.json` and so on, made by `scripts/vllm_signatures.py` from a wheel, and
each process compares what it has imported. Attributes need no entry: a lost one fails by itself.
"""

import functools
import importlib
import inspect
import json
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

MISSING = "no such function"

# vLLM's symbol -> our file that rests upon it.
_needed_by: dict[str, str] = {}


class _Default:
    def __repr__(self) -> str:
        return "..."


_DEFAULT = _Default()


def overrides(*symbols: str) -> Callable[[Function], Function]:
    """Marks a function of ours that overrides, replaces or wraps functions of vLLM.

    Args:
        symbols: "package.module:Class.function", spelled out: `scripts/vllm_signatures.py` reads
            them from the text. For a class that is mixed into several, or put in front of a class
            that inherits the function: wherever vLLM defines what `super()` reaches.
    """
    our_module = sys._getframe(1).f_globals["__name__"]
    _needed_by.update(dict.fromkeys(symbols, f"{our_module.replace('.', '/')}.py"))
    return lambda function: function


# Marks a function that calls vLLM's long after the start: there a changed parameter, which Python
# reports at the call, would be noticed late.
calls = overrides


def check_overrides(also: str | None = None) -> None:
    """Compares the vLLM functions that this process may use with the table of the installed vLLM.

    Functions of modules that nobody has imported yet are left out: whatever imports one later
    compares again.

    Args:
        also: qualified name in a module of ours that is imported first.

    Raises:
        ValueError: names each function that is not what our code was written against.
    """
    import vllm

    table = load_table(vllm.__version__)
    if also is not None:
        try:
            importlib.import_module(also.rpartition(".")[0])
        except ImportError as error:
            raise _misfit(f"{also}: {error}") from error
    found = [
        f"{symbol} (needed by {file}): got {got}, wanted {table[symbol]}"
        for symbol, file in _needed_by.items()
        if symbol.partition(":")[0] in sys.modules and (got := describe(symbol)) != table[symbol]
    ]
    if found:
        raise _misfit("\n".join(found))


def _misfit(found: str) -> ValueError:
    import vllm

    return ValueError(
        f"KV cache compression does not fit this build of vLLM {vllm.__version__}; install an "
        "unchanged release, update rkv-vllm, remove the plugin that replaces the function, or "
        f"serve without --kv-compression:\n{found}"
    )


def describe(symbol: str) -> str:
    """Spells the parameters of a function in an imported module, without types and values."""
    module_name, _, path = symbol.partition(":")
    try:
        function = operator.attrgetter(path)(sys.modules[module_name])
    except AttributeError:
        return MISSING
    return _spell(function) if callable(function) else f"a {type(function).__name__}"


@functools.cache
def _spell(function: Callable[..., Any]) -> str:
    signature = inspect.signature(function)
    parameters = [
        each.replace(
            annotation=each.empty, default=each.empty if each.default is each.empty else _DEFAULT
        )
        for each in signature.parameters.values()
    ]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


def table_path(version: str) -> Path:
    """Returns where the table for a vLLM version lies; patch releases share one.

    Args:
        version: as vLLM states it, e.g. "0.32.0" or "0.32.1+cpu".
    """
    from packaging.version import Version

    release = Version(version)
    return Path(__file__).with_name(f"vllm-{release.major}.{release.minor}.json")


def load_table(version: str) -> dict[str, str]:
    """Returns symbol -> parameters for a vLLM version.

    Raises:
        ValueError: no table for this version.
    """
    path = table_path(version)
    if not path.is_file():
        known = sorted(
            found.stem.removeprefix("vllm-") for found in path.parent.glob("vllm-*.json")
        )
        raise ValueError(
            f"KV cache compression has no signature table for this vLLM: got {version}, wanted "
            f'one of {", ".join(known)}; run: pip install "vllm=={known[-1]}.*"'
        )
    return json.loads(path.read_text())
