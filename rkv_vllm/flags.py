"""The `--kv-...` flags of `vllm serve` and of every other command with vLLM's engine options.

The flags are nothing but another spelling of `--additional-config`: each writes its value into
`namespace.additional_config["kv_compression"]` while the command line is parsed. A spawned process
receives that namespace ready-made and turns it into engine arguments before any plugin is loaded,
so nothing may be left to do after parsing. The same holds for `frontend/option_check.py`, which is
put in front of a server. Whether the options fit together is checked when the engine config is
made: read `patches/create_engine_config.py` next.
"""

import argparse
import os
from collections.abc import Callable, Mapping
from typing import Any

from rkv_vllm.options import (
    CONFIG_KEY,
    FORMER_NAMES,
    OPTIONS,
    check_options,
    flagged_method_options,
    merge,
    read_pairs,
)

# What was given as flags, beside where it goes: `AdditionalConfigFlag` must not override it.
FLAGS_KEY = "kv_compression_flags"
OPTION_FLAG = "--kv-option"
MIDDLEWARE = "rkv_vllm.frontend.option_check.OptionCheck"
GROUP_TITLE = "KV cache compression (rkv-vllm)"
# The first paragraph is also what `vllm serve --help` says of the group.
GROUP_DESCRIPTION = """\
Bounded KV cache per request: tokens that attention hardly needs are evicted while the request
decodes, and the freed blocks go back to the pool. Off unless --kv-compression is given.

The same as JSON: --additional-config '{"kv_compression": {"method": "rkv", "budget": 1024}}'
Where a flag and the JSON name the same option, the flag holds."""


class CompressionFlag(argparse.Action):
    """Checks what one flag says and stores it under "kv_compression".

    Attributes:
        read: makes options, as the JSON object has them, of the flag's value.
    """

    def __init__(self, *args: Any, read: Callable[[Any], Mapping[str, Any]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.read = read

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Stores the value; a bad one ends the program with exit code 2."""
        try:
            given = check_options(self.read(values))
        except ValueError as error:
            parser.error(str(error))
        setattr(namespace, FLAGS_KEY, merge(vars(namespace).get(FLAGS_KEY, {}), given))
        # A copy: the parser hands out one and the same default dict every time.
        additional = dict(namespace.additional_config)
        additional[CONFIG_KEY] = merge(additional.get(CONFIG_KEY, {}), given)
        namespace.additional_config = additional
        _check_requests(parser, namespace)


class AdditionalConfigFlag(argparse.Action):
    """`--additional-config` that keeps the options of this package which it does not mention.

    vLLM's own action replaces the whole dict, so `--kv-budget 512 --additional-config '{}'` would
    lose the budget. Every other key is replaced as before.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Stores the object; anything else ends the program with exit code 2."""
        if not isinstance(values, dict):
            parser.error(
                f"{option_string}: got {values!r}, wanted a JSON object; "
                """write it as '{"key": "value"}'"""
            )
        try:
            from_json = check_options(values.get(CONFIG_KEY, {}))
        except ValueError as error:
            parser.error(f"{option_string}: {error}")
        earlier = namespace.additional_config.get(CONFIG_KEY, {})
        options = merge(earlier, from_json, vars(namespace).get(FLAGS_KEY, {}))
        if options or CONFIG_KEY in values:
            values = {**values, CONFIG_KEY: options}
            _check_requests(parser, namespace)
        setattr(namespace, self.dest, values)


def _check_requests(parser: argparse.ArgumentParser, namespace: argparse.Namespace) -> None:
    """Put our middleware in front of the server that this command line starts, if it starts one."""
    if _takes_middleware(parser) and MIDDLEWARE not in namespace.middleware:
        namespace.middleware = [*namespace.middleware, MIDDLEWARE]


def check_requests_by_default(parser: argparse.ArgumentParser) -> None:
    """Put our middleware in front of every server whose command line this parser reads.

    Args:
        parser: as in `add_flags`.
    """
    if _takes_middleware(parser):
        parser.set_defaults(middleware=[*parser.get_default("middleware"), MIDDLEWARE])


def _takes_middleware(parser: argparse.ArgumentParser) -> bool:
    # vLLM takes none for a snapshot of a server, and its Rust front end runs no Python.
    takes_none = parser.prog.endswith("snapshot create")
    is_rust = os.environ.get("VLLM_USE_RUST_FRONTEND", "0") != "0"
    return not takes_none and not is_rust and parser.get_default("middleware") is not None


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flag group to a parser that already has vLLM's engine options.

    Args:
        parser: the parser that `EngineArgs.add_cli_args` has filled.
    """
    group = parser.add_argument_group(GROUP_TITLE, GROUP_DESCRIPTION)

    def add(flag: str, read: Callable[[Any], Mapping[str, Any]], **settings: Any) -> None:
        # Without a default in the namespace, a flag that is not given leaves no trace.
        group.add_argument(
            flag, action=CompressionFlag, read=read, default=argparse.SUPPRESS, **settings
        )

    for name, option in {**OPTIONS, **flagged_method_options()}.items():
        if option.kinds == (bool,):
            add(
                option.flag,
                lambda _, option=option: {option.name: True},
                nargs=0,
                help=f"{option.meaning} (default: off)",
            )
            continue
        default = "off" if name == "method" else option.default
        add(
            option.flag,
            lambda text, option=option: {option.name: option.parse(text)},
            metavar=option.metavar,
            help=f"{option.meaning} Takes {option.takes}. (default: {default})",
        )
    add(
        OPTION_FLAG,
        lambda texts: read_pairs(OPTION_FLAG, texts),
        nargs="+",
        metavar="NAME=VALUE",
        help="Options of the method by name, also of one that is not built in; may be repeated. An "
        "unknown name ends the start with a list of what there is.",
    )
    for former, name in FORMER_NAMES.items():
        add(
            f"--kv-{former.replace('_', '-')}",
            lambda text, name=name: {name: OPTIONS[name].parse(text)},
            help=argparse.SUPPRESS,
        )
    # The stock action keeps its help, type and default; only what it does on a match changes.
    parser._option_string_actions["--additional-config"].__class__ = AdditionalConfigFlag
