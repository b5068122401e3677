"""Replaces `EngineArgs.create_engine_config`: the one place where compression is switched on.

All routes end here: flags, `--additional-config`, a YAML file, `LLM(...)`, the environment
(`rkv_vllm/variables.py`), in every process that makes an engine config. Without "kv_compression" in
`additional_config`, which the environment may add, the original is called and nothing else. With it
the options are checked first, scheduler and worker are filled in, and the finished config is
searched for what is not supported (`rkv_vllm/fit/refusals.py`).
"""

import functools
import os
from typing import TYPE_CHECKING, Any

from rkv_vllm.cache_owners import inline
from rkv_vllm.fit import refusals
from rkv_vllm.fit.last_line import refusals_as_last_line
from rkv_vllm.fit.overrides import overrides
from rkv_vllm.fit.versions import SCHEDULER_CLS, WORKER_CLS, platform_worker_cls
from rkv_vllm.frontend.discovery import show_stat_logger
from rkv_vllm.options import CONFIG_KEY, ServerOptions
from rkv_vllm.patches import generate, process_inputs
from rkv_vllm.variables import OFF, SWITCH, complete

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs


@overrides("vllm.engine.arg_utils:EngineArgs.create_engine_config")
def apply() -> None:
    """Puts the replacement in place; `AsyncEngineArgs` inherits it."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    original = EngineArgs.create_engine_config

    servers = (UsageContext.OPENAI_API_SERVER, UsageContext.OPENAI_BATCH_RUNNER)

    @functools.wraps(original)
    def create_engine_config(
        self: "EngineArgs", usage_context: UsageContext | None = None, *args: Any, **kwargs: Any
    ) -> "VllmConfig":
        is_server = usage_context in servers
        with refusals_as_last_line(wanted=is_server):
            add_variables(self)
            switched_on = is_switched_on(self)
        # Otherwise it stays as it is, for an earlier config whose engine is not made yet.
        if switched_on or self.disable_log_stats:
            show_stat_logger(not self.disable_log_stats)
        if not switched_on:
            return original(self, usage_context, *args, **kwargs)
        with refusals_as_last_line(wanted=is_server):
            switch_on(self)
        vllm_config = original(self, usage_context, *args, **kwargs)
        with refusals_as_last_line(wanted=is_server):
            refusals.check(vllm_config)
        process_inputs.apply()
        generate.apply()
        return vllm_config

    EngineArgs.create_engine_config = create_engine_config


def add_variables(engine_args: "EngineArgs") -> None:
    """Adds the options that the environment sets, in place.

    Raises:
        ValueError: they are bad, or the arguments have no room for options.
    """
    additional = engine_args.additional_config
    given = additional.get(CONFIG_KEY, {}) if isinstance(additional, dict) else {}
    options = complete(given, os.environ)
    if options == given:
        return
    if not isinstance(additional, dict):
        raise ValueError(
            f"additional_config: got a {type(additional).__name__}, wanted a dict, to which "
            f"{SWITCH} of the environment can be added; set {SWITCH}={OFF}"
        )
    engine_args.additional_config = {**additional, CONFIG_KEY: options}


def is_switched_on(engine_args: "EngineArgs") -> bool:
    """Tells whether the arguments ask for compression.

    Raises:
        ValueError: our scheduler or worker without the options that they need.
    """
    additional = engine_args.additional_config
    # vLLM also takes an object that only hashes itself; such a one cannot carry our options.
    if isinstance(additional, dict) and CONFIG_KEY in additional:
        return True
    for flag, got, ours in (
        ("--scheduler-cls", engine_args.scheduler_cls, {SCHEDULER_CLS}),
        ("worker_cls", engine_args.worker_cls, set(WORKER_CLS.values())),
    ):
        if got in ours:
            raise ValueError(
                f"{flag}: got {got!r} without options, wanted both or neither; add "
                f"--kv-compression rkv or pass LLM(**rkv_vllm.engine_args())"
            )
    return False


def switch_on(engine_args: "EngineArgs") -> None:
    """Checks the options and completes the arguments in place.

    Args:
        engine_args: their `additional_config` gets every option spelled out, so that equal options
            make equal engines on every route; `scheduler_cls` and `worker_cls` are filled in.

    Raises:
        ValueError: bad options, another scheduler or worker class, or an unsupported feature.
    """
    options = ServerOptions.from_dict(engine_args.additional_config[CONFIG_KEY])
    refusals.check_engine_args(engine_args)
    worker_cls = platform_worker_cls()
    _require_class("--scheduler-cls", engine_args.scheduler_cls, None, SCHEDULER_CLS)
    _require_class("worker_cls", engine_args.worker_cls, "auto", worker_cls)
    engine_args.scheduler_cls = SCHEDULER_CLS
    engine_args.worker_cls = worker_cls
    # A new dict: the old one may be shared with the parser's default or belong to the caller.
    engine_args.additional_config = {
        **engine_args.additional_config,
        CONFIG_KEY: {**options.to_dict(), "share_layers": inline(options.share_layers)},
    }


def _require_class(name: str, got: object, default: str | None, ours: str) -> None:
    if got not in (default, ours):
        raise ValueError(
            f"{name}: got {got!r}, but --kv-compression wanted {ours!r}; leave {name} out, "
            "compression fills it in"
        )
