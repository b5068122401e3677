"""The `--kv-...` flags of `vllm serve` and of every other command with vLLM's engine options.

The flags are nothing but another spelling of `--additional-config`: each writes its value into
`namespace.additional_config["kv_compression"]` while the command line is parsed. A spawned process
receives that namespace ready-made and turns it into engine arguments before any plugin is loaded,
so nothing may be left to do after parsing. Whether the options fit together is checked when the
engine config is made: read `patches/create_engine_config.py` next.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from rkv_vllm.config import CONFIG_KEY, OPTIONS, Option, check_options

GROUP_TITLE = "KV cache compression (rkv-vllm)"
# The first paragraph is also what `vllm serve --help` says of the group.
GROUP_DESCRIPTION = """\
Bounded KV cache per request: tokens that attention hardly needs are evicted while the request
decodes, and the freed blocks go back to the pool. Off unless --kv-compression is given.

The same as JSON: --additional-config '{"kv_compression": {"method": "rkv", "budget": 1024}}'
Where a flag and the JSON name the same option, the flag holds."""


class CompressionFlag(argparse.Action):
    """Checks one option and stores it under "kv_compression".

    The value is also kept under the flag's own name, where `AdditionalConfigFlag` finds out which
    options were given as flags.
    """

    def __init__(self, option_strings: Sequence[str], *, option: Option, **kwargs: Any) -> None:
        super().__init__(option_strings, **kwargs)
        self.option = option

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Stores the value; a bad one ends the program with exit code 2."""
        try:
            value = self.option.check(_read(self.option, values))
        except ValueError as error:
            parser.error(str(error))
        setattr(namespace, self.dest, value)
        # Copies: the parser hands out one and the same default dict every time.
        additional = dict(namespace.additional_config)
        additional[CONFIG_KEY] = {**additional.get(CONFIG_KEY, {}), self.option.name: value}
        namespace.additional_config = additional


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
        given = vars(namespace)
        from_flags = {o.name: given[o.dest] for o in OPTIONS if o.dest in given}
        earlier = namespace.additional_config.get(CONFIG_KEY, {})
        options = {**earlier, **from_json, **from_flags}
        if options or CONFIG_KEY in values:
            values = {**values, CONFIG_KEY: options}
        setattr(namespace, self.dest, values)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flag group to a parser that already has vLLM's engine options.

    Args:
        parser: the parser that `EngineArgs.add_cli_args` has filled.
    """
    group = parser.add_argument_group(GROUP_TITLE, GROUP_DESCRIPTION)
    for option in OPTIONS:
        default = "off" if option.name == "method" else option.default
        group.add_argument(
            option.flag,
            action=CompressionFlag,
            option=option,
            dest=option.dest,
            metavar=option.metavar,
            # Without a default in the namespace, a flag that is not given leaves no trace.
            default=argparse.SUPPRESS,
            help=f"{option.meaning} Takes {option.wanted}. (default: {default})",
        )
    # The stock action keeps its help, type and default; only what it does on a match changes.
    parser._option_string_actions["--additional-config"].__class__ = AdditionalConfigFlag


def _read(option: Option, text: str) -> str | int | float:
    """Returns the text as the option's type, or as it is for `Option.check` to refuse."""
    try:
        return option.type(text)
    except ValueError:
        return text
