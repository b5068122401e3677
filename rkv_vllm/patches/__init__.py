"""The vLLM functions that this package replaces: one file each, listed in `PATCHES`.

vLLM has no extension point for engine flags, none between "arguments read" and "engine config
made", and none for checking a request that costs nothing per step. Everything else uses its own
(scheduler class, worker class, cache spec registry). A test compares the table with the files of
this folder, another one with vLLM itself; keep it short.
"""

from typing import NamedTuple


class Patch(NamedTuple):
    """One replaced function.

    Attributes:
        module: file of this folder, without ".py"; its `apply()` puts the replacement in place.
        symbol: what is replaced, as "package.module:Class.function".
        why: the reason that no extension point serves.
        only_when_on: it is put in place when compression is switched on, not when the plugin is
            loaded.
        since: first vLLM version that the replacement was tested with.
        until: what has to happen for it to go.
    """

    module: str
    symbol: str
    why: str
    only_when_on: bool
    since: str
    until: str


PATCHES = (
    Patch(
        module="add_cli_args",
        symbol="vllm.engine.arg_utils:EngineArgs.add_cli_args",
        why="a plugin cannot add flags to `vllm serve`",
        only_when_on=False,
        since="0.32.0",
        until="vLLM lets plugins add flags",
    ),
    Patch(
        module="create_engine_config",
        symbol="vllm.engine.arg_utils:EngineArgs.create_engine_config",
        why="the options must be checked, and scheduler and worker chosen, before the model loads",
        only_when_on=False,
        since="0.32.0",
        until="vLLM lets plugins check and complete the engine arguments",
    ),
    Patch(
        module="process_inputs",
        symbol="vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        why="a request's own options must be checked where its sender still gets an answer",
        only_when_on=True,
        since="0.32.0",
        until="a plugin can check requests without being a logits processor",
    ),
    Patch(
        module="generate",
        symbol="vllm.v1.engine.async_llm:AsyncLLM.generate",
        why="the same for a streamed answer, whose status code is sent before inputs are processed",
        only_when_on=True,
        since="0.32.0",
        until="vLLM processes inputs before it sends the head of a streamed answer",
    ),
)
