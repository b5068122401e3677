"""The `--kv-...` flags as environment variables, for containers: RKV_BUDGET=512 is --kv-budget 512.

They are what holds where neither a flag nor JSON says otherwise. Read in one place, where an engine
config is made (`patches/create_engine_config.py`), so they count for `vllm serve` and `LLM(...)`
alike; other processes get the finished options. Knows neither vLLM nor argparse.
"""

import difflib
from collections.abc import Mapping
from functools import cache
from typing import Any

from rkv_vllm.option_field import Option
from rkv_vllm.options import (
    OPTIONS,
    check_options,
    flagged_method_options,
    merge,
    read_pairs,
)

PREFIX = "RKV_"
SWITCH = f"{PREFIX}COMPRESSION"
OFF = "off"
METHOD_OPTIONS = f"{PREFIX}OPTION"
# Two letters of RKV_BUDGET exchanged are 0.83; what Kubernetes sets for a service called "rkv",
# such as RKV_PORT and RKV_SERVICE_HOST, is at most 0.6.
_ALIKE = 0.75
_TRUTHS = {"1": True, "true": True, "0": False, "false": False}


@cache
def options_of_variables() -> dict[str, Option]:
    """Returns the options by the name of their variable; `METHOD_OPTIONS` comes on top."""
    flagged = {**OPTIONS, **flagged_method_options()}.values()
    return {_variable(each.flag): each for each in flagged}


def read_variables(environ: Mapping[str, str]) -> dict[str, Any]:
    """Returns what the environment sets, checked one by one, as the JSON object has it.

    Args:
        environ: the environment. An empty variable is none, as Compose and Helm pass on what is not
            set; with RKV_COMPRESSION=off all others are ignored.

    Raises:
        ValueError: names the variable: a bad value, or a name that is nearly one of these.
    """
    given = {name: text for name, text in environ.items() if name.startswith(PREFIX) and text}
    if given.get(SWITCH) == OFF:
        return {}
    read: dict[str, Any] = {}
    for name, text in given.items():
        if name == METHOD_OPTIONS or name in options_of_variables():
            read = merge(read, _read(name, text))
        elif meant := _meant_by(name):
            raise ValueError(
                f"{name}: got an unknown variable, wanted one of {METHOD_OPTIONS}, "
                f"{', '.join(options_of_variables())}; write {meant}"
            )
    return read


def switches_on(environ: Mapping[str, str]) -> bool:
    """Whether the environment alone switches compression on."""
    return environ.get(SWITCH, OFF) not in ("", OFF)


def complete(options: Mapping[str, Any], environ: Mapping[str, str]) -> Mapping[str, Any]:
    """Returns options with what only the environment sets.

    Args:
        options: what stands under "kv_compression"; it holds against the environment.
        environ: the environment.

    Raises:
        ValueError: as `read_variables`, or variables with which nothing is switched on.
    """
    read = read_variables(environ)
    if not read:
        return options
    completed = merge(read, check_options(options))
    if "method" not in completed:
        names = [
            name
            for name, text in environ.items()
            if text and (name in options_of_variables() or name == METHOD_OPTIONS)
        ]
        raise ValueError(
            f"{', '.join(names)}: got options of compression, which nothing switches on, wanted "
            f"{SWITCH} beside them; set {SWITCH}=rkv, or {SWITCH}={OFF} to ignore them"
        )
    return completed


def _read(name: str, text: str) -> dict[str, Any]:
    if name == METHOD_OPTIONS:
        return read_pairs(METHOD_OPTIONS, text.split())
    option = options_of_variables()[name]
    value = option.parse(text)
    if option.kinds == (bool,):
        value = _TRUTHS.get(text.lower(), text)
    try:
        return check_options({option.name: value})
    except ValueError as error:
        raise ValueError(f"{name}={text}: {error}") from error


def _variable(flag: str) -> str:
    return PREFIX + flag.removeprefix("--kv-").replace("-", "_").upper()


def _meant_by(name: str) -> str | None:
    known = {each.removeprefix(PREFIX): each for each in (*options_of_variables(), METHOD_OPTIONS)}
    alike = difflib.get_close_matches(name.removeprefix(PREFIX), known, 1, _ALIKE)
    return known[alike[0]] if alike else None
