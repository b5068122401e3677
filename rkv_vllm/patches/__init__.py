"""The vLLM functions that this package replaces: one file each, listed in `PATCHES`.

vLLM has no extension point for engine flags and none between "arguments read" and "engine config
made". Everything else uses its own (scheduler class, worker class, cache spec registry). A test
compares the table with the files of this folder, another one with vLLM itself; keep it short.
"""

from typing import NamedTuple


class Patch(NamedTuple):
    """One replaced function.

    Attributes:
        module: file of this folder, without ".py"; its `apply()` puts the replacement in place.
        symbol: what is replaced, as "package.module:Class.function".
        why: the reason that no extension point serves.
        since: first vLLM version that the replacement was tested with.
        until: what has to happen for it to go.
    """

    module: str
    symbol: str
    why: str
    since: str
    until: str


PATCHES = (
    Patch(
        module="add_cli_args",
        symbol="vllm.engine.arg_utils:EngineArgs.add_cli_args",
        why="a plugin cannot add flags to `vllm serve`",
        since="0.32.0",
        until="vLLM lets plugins add flags",
    ),
    Patch(
        module="create_engine_config",
        symbol="vllm.engine.arg_utils:EngineArgs.create_engine_config",
        why="the options must be checked, and scheduler and worker chosen, before the model loads",
        since="0.32.0",
        until="vLLM lets plugins check and complete the engine arguments",
    ),
)
