"""One option as a dataclass field; its metadata is all that flags, JSON and help are made from.

A method declares its options as a frozen dataclass whose fields are made by `option`; `options_of`
reads such a class. Knows neither vLLM nor torch nor argparse. Next: methods/rkv.py for an example,
options.py for the server's own.
"""

import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from functools import cache
from typing import Any

_KINDS = {"int": int, "float": float, "bool": bool, "str": str}
_WANTED = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}


def option(
    default: Any,
    meaning: str,
    *,
    flag: str | None = None,
    metavar: str | None = None,
    wanted: str | None = None,
    accepts: Callable[[Any], bool] | None = None,
    per_request: bool = False,
) -> Any:
    """Declare an option: a dataclass field with a default and what users are told of it.

    Args:
        default: value when the option is left out; its type is the option's.
        meaning: one sentence for `--help`, with the unit.
        flag: spelling on the command line, None for an option without a flag of its own.
        metavar: placeholder of the value in `--help`.
        wanted: the values that are accepted, in words, with the unit.
        accepts: tells an accepted value from another one of the right type; False for NaN. None
            accepts all.
        per_request: whether a request may bring a value of its own.

    Returns:
        The field.
    """
    metadata = {
        "meaning": meaning,
        "flag": flag,
        "metavar": metavar,
        "wanted": wanted,
        "accepts": accepts,
        "per_request": per_request,
    }
    return field(default=default, metadata=metadata)


class OptionError(ValueError):
    """An option that cannot be had, in the words that users read.

    Attributes:
        key: what is at fault, as the user spells it.
        got: its value.
        wanted: what would be accepted.
        cure: the way out.
    """

    def __init__(self, key: str, got: object, wanted: str, cure: str, listing: str = "") -> None:
        super().__init__(f"{key}: got {got!r}, wanted {wanted}; {cure}{listing}")
        self.key = key
        self.got = got
        self.wanted = wanted
        self.cure = cure


@dataclass(frozen=True)
class Option:
    """One field of an options class, as users meet it; see `option_field.option`.

    Attributes:
        kinds: the types that a value may have; an `int` is taken for a `float`, a `bool` is no
            number.
    """

    name: str
    default: Any
    kinds: tuple[type, ...]
    meaning: str = ""
    flag: str | None = None
    metavar: str | None = None
    wanted: str | None = None
    accepts: Callable[[Any], bool] | None = None
    per_request: bool = False

    @property
    def label(self) -> str:
        """How errors call it: "--kv-budget (budget)", or "--kv-option strength"."""
        return f"{self.flag} ({self.name})" if self.flag else f"--kv-option {self.name}"

    @property
    def takes(self) -> str:
        """The accepted values in words."""
        return self.wanted or " or ".join(_WANTED[kind] for kind in self.kinds)

    def check(self, value: object) -> Any:
        """Returns the value in its canonical type.

        Raises:
            OptionError: wrong type, or a value that the option does not accept.
        """
        if type(value) is int and int not in self.kinds and float in self.kinds:
            # Too large for a float it is none, and refused below.
            value = float(value) if abs(value) <= sys.float_info.max else math.inf
        fits = type(value) in self.kinds and not (type(value) is float and not math.isfinite(value))
        if not fits or not (self.accepts is None or self.accepts(value)):
            cure = f"change it or leave it out for the default {self.default!r}"
            raise OptionError(self.label, value, self.takes, cure)
        return value

    def parse(self, text: str) -> Any:
        """Returns the text as a value of the option's type, or as it is for `check` to refuse."""
        if bool in self.kinds and text.lower() in ("true", "false"):
            return text.lower() == "true"
        for kind in (int, float):
            if kind in self.kinds:
                try:
                    return kind(text)
                except ValueError:
                    pass
        return text


@cache
def options_of(cls: type) -> dict[str, Option]:
    """Returns the options of a dataclass by name, in its order.

    Raises:
        ValueError: a field of another type than int, float, bool and str.
    """
    return {f.name: _option_of(cls, f) for f in fields(cls) if not f.metadata.get("nested")}


def _option_of(cls: type, f: Field) -> Option:
    written = f.type if isinstance(f.type, str) else inspect.formatannotation(f.type)
    names = [name.strip() for name in written.split("|")]
    if not set(names) <= _KINDS.keys():
        raise ValueError(
            f"{cls.__qualname__}.{f.name}: got the type {written}, wanted one of "
            f"{', '.join(_KINDS)}, which have a spelling on the command line; change the field"
        )
    return Option(f.name, f.default, tuple(_KINDS[name] for name in names), **f.metadata)


def describe(method: str, cls: type) -> str:
    """Returns a line for every option of a method, to stand below an error."""
    lines = [
        f"\n  {each.name}: {each.meaning} Takes {each.takes}. (default: {each.default!r})"
        for each in options_of(cls).values()
    ]
    return f"\nThe method {method!r} has {'these options:' if lines else 'no options.'}" + "".join(
        lines
    )


def change_method_options(method: str, options: Any, changes: Mapping[str, Any]) -> Any:
    """Returns a method's options with some changed; a text is read by the type of its field.

    Args:
        method: the method's name, for errors.
        options: object of the method's options class.
        changes: names to values.

    Raises:
        OptionError: an unknown name, a bad value, or values that contradict each other; the message
            lists what there is.
    """
    table = options_of(type(options))
    listing = describe(method, type(options))
    for name in changes:
        if name not in table:
            wanted = f"an option of the method {method!r}"
            raise OptionError("--kv-option", name, wanted, "correct its name", listing)
    values = {}
    try:
        for name, each in table.items():
            value = changes.get(name, getattr(options, name))
            values[name] = each.check(each.parse(value) if isinstance(value, str) else value)
        return type(options)(**values)
    except OptionError as error:
        raise OptionError(error.key, error.got, error.wanted, error.cure, listing) from error
    except ValueError as error:
        key = f"the options of {method!r}"
        raise OptionError(key, values, str(error), "change one of them", listing) from error
