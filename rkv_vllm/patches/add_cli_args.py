"""Replaces `EngineArgs.add_cli_args`: vLLM's flags, then ours (`rkv_vllm/flags.py`)."""

import functools
import os

from rkv_vllm.fit.overrides import overrides
from rkv_vllm.variables import switches_on


@overrides("vllm.engine.arg_utils:EngineArgs.add_cli_args")
def apply() -> None:
    """Puts the replacement in place; every parser with engine options is made by it."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from rkv_vllm.flags import add_flags, check_requests_by_default

    original = EngineArgs.add_cli_args

    @functools.wraps(original)
    def add_cli_args(parser: FlexibleArgumentParser) -> FlexibleArgumentParser:
        parser = original(parser)
        add_flags(parser)
        # No flag need be given then.
        if switches_on(os.environ):
            check_requests_by_default(parser)
        return parser

    EngineArgs.add_cli_args = staticmethod(add_cli_args)
