"""What `rkv-vllm doctor` looks at, as a list of findings.

Asks the code that a start asks: `fit/` for versions, platform, vLLM's functions and the model,
`kernels/` for what was built. Imports torch and vLLM, so call it late.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, NamedTuple

from rkv_vllm.cli.errors import CommandError
from rkv_vllm.fit.overrides import check_overrides
from rkv_vllm.fit.refusals import ATTENTION_BACKENDS, REFUSALS
from rkv_vllm.fit.versions import (
    SCHEDULER_CLS,
    SUPPORTED_VLLM,
    WORKER_CLS,
    check_vllm_version,
    platform_worker_cls,
)
from rkv_vllm.options import CONFIG_KEY, ServerOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

DISTRIBUTIONS = ("rkv-vllm", "vllm", "torch", "triton")
PLUGIN_GROUP = "vllm.general_plugins"


class Finding(NamedTuple):
    """One thing looked at.

    Attributes:
        topic: heading that it belongs to.
        name: what was looked at.
        status: "ok", "note" (works, but worth knowing) or "refused" (a start would fail).
        message: what was found; for a refusal with the cure.
    """

    topic: str
    name: str
    status: Literal["ok", "note", "refused"]
    message: str


def examine(folder: str | None, engine_flags: Sequence[str]) -> Iterator[Finding]:
    """Examine this environment, and a model where one is named and vLLM can be imported.

    Args:
        folder: holds config.json; nothing else of it is read.
        engine_flags: as for `vllm serve`.

    Raises:
        CommandError: a flag that `vllm serve` does not take.
    """
    yield from _versions()
    try:
        import vllm  # noqa: F401
    # A library that does not fit shows as any of these.
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        yield Finding(
            "versions",
            "import vllm",
            "refused",
            f"{type(error).__name__}: {error}; install vLLM and its requirements again",
        )
        return
    yield _passes("vLLM's version", check_vllm_version, f"in {SUPPORTED_VLLM}")
    yield _passes("vLLM's functions", lambda: check_overrides(SCHEDULER_CLS), "as expected")
    yield _plugin()
    yield from _platform()
    yield _cpp_kernels()
    yield _triton_kernels()
    if folder is not None:
        yield from _model(folder, engine_flags)


def _model(folder: str, engine_flags: Sequence[str]) -> Iterator[Finding]:
    """What compression supports and refuses when this model is served with these flags."""
    engine_args = _engine_args(folder, engine_flags)
    try:
        vllm_config = _engine_config(engine_args)
    # A start ends with whatever vLLM and transformers raise for a config.json or a flag.
    except Exception as error:
        for line in _message(error):
            yield Finding("model", "engine config", "refused", line)
        return
    yield Finding("model", "architecture", "ok", ", ".join(vllm_config.model_config.architectures))
    yield _runner(vllm_config)
    yield _backend(vllm_config)
    yield _compaction(vllm_config)
    for rule in REFUSALS:
        sentence = rule.find(vllm_config)
        if sentence is None:
            yield Finding("features", rule.feature, "ok", "not in use")
        else:
            yield Finding("features", rule.feature, "refused", sentence)


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "python", "ok", sys.version.split()[0])
    for name in DISTRIBUTIONS:
        yield _installed(name)


def _installed(name: str) -> Finding:
    try:
        return Finding("versions", name, "ok", version(name))
    except PackageNotFoundError:
        pass
    if name == "triton":
        return Finding("versions", name, "note", "not installed; GPUs need it")
    cure = {"vllm": f'pip install "vllm{SUPPORTED_VLLM}"'}.get(name, f"pip install {name}")
    return Finding("versions", name, "refused", f"not installed; run: {cure}")


def _passes(name: str, check: Callable[[], object], otherwise: str) -> Finding:
    """Turn a check that raises ValueError into a finding."""
    try:
        check()
    except ValueError as error:
        return Finding("versions", name, "refused", str(error))
    return Finding("versions", name, "ok", otherwise)


def _plugin() -> Finding:
    """Whether vLLM's processes will find the plugin by themselves."""
    found = [entry for entry in entry_points(group=PLUGIN_GROUP) if entry.name == "rkv"]
    if not found:
        return Finding(
            "plugin",
            "entry point",
            "refused",
            f"no 'rkv' in the group {PLUGIN_GROUP}: vLLM cannot find the plugin; install this "
            "package with pip instead of putting its folder on the path",
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "rkv" not in allowed.split(","):
        return Finding(
            "plugin",
            "entry point",
            "refused",
            f"VLLM_PLUGINS: got {allowed!r}, wanted 'rkv' in it; add it or unset the variable",
        )
    return Finding("plugin", "entry point", "ok", f"{found[0].name} = {found[0].value}")


def _platform() -> Iterator[Finding]:
    from vllm.platforms import current_platform

    name = current_platform.device_name or "none"
    if name in WORKER_CLS:
        device = f"{name}: {current_platform.get_device_name()}"
        yield Finding("device", "platform", "ok", device)
        yield Finding("device", "worker", "ok", WORKER_CLS[name])
        backends = ", ".join(ATTENTION_BACKENDS)
        yield Finding("device", "attention backends known", "ok", backends)
        yield _default_runner()
        return
    try:
        platform_worker_cls()
    except ValueError as error:
        yield Finding("device", "platform", "refused", str(error))


def _default_runner() -> Finding:
    """The runner as far as it follows from the environment; a model may change it."""
    from vllm import envs
    from vllm.triton_utils import HAS_TRITON

    if envs.VLLM_USE_V2_MODEL_RUNNER is not None:
        runner = "V2" if envs.VLLM_USE_V2_MODEL_RUNNER else "V1"
        value = os.environ["VLLM_USE_V2_MODEL_RUNNER"]
        return Finding(
            "device", "model runner", "ok", f"{runner}: VLLM_USE_V2_MODEL_RUNNER={value}"
        )
    if not HAS_TRITON:
        return Finding("device", "model runner", "ok", "V1: vLLM finds no Triton for this device")
    return Finding(
        "device", "model runner", "ok", "V2: vLLM's default; V1 for features that V2 lacks"
    )


def _cpp_kernels() -> Finding:
    from rkv_vllm.kernels import native

    try:
        library = native.library()
    except (OSError, AttributeError) as error:
        return Finding(
            "kernels",
            "C++ (CPU)",
            "refused",
            f"built, but not usable: {error}; reinstall rkv-vllm",
        )
    if library is None:
        return Finding(
            "kernels",
            "C++ (CPU)",
            "note",
            "not built: torch serves on CPUs, several times slower; reinstall where g++ is found",
        )
    return Finding("kernels", "C++ (CPU)", "ok", library._name)


def _triton_kernels() -> Finding:
    from vllm.platforms import current_platform

    if current_platform.device_type == "cpu":
        return Finding("kernels", "Triton (GPU)", "ok", "not needed on this device")
    if find_spec("triton") is None:
        return Finding(
            "kernels",
            "Triton (GPU)",
            "note",
            "not installed: torch serves on the GPU, slower; run: pip install triton",
        )
    return Finding("kernels", "Triton (GPU)", "ok", f"compiled by Triton {version('triton')}")


def _engine_args(folder: str, engine_flags: Sequence[str]) -> "AsyncEngineArgs":
    """Reads the flags as `vllm serve` does, with compression switched on."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from rkv_vllm.plugin import register

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> None:
            raise CommandError(f"ENGINE_FLAGS: {message}; vllm serve --help lists the flags")

    register()
    parser = AsyncEngineArgs.add_cli_args(Parser(prog="vllm serve", add_help=False))
    arguments = parser.parse_args(["--kv-compression", ServerOptions.method, *engine_flags])
    arguments.model = folder
    # A folder with nothing but config.json is enough.
    arguments.skip_tokenizer_init = True
    return AsyncEngineArgs.from_cli_args(arguments)


def _engine_config(engine_args: "AsyncEngineArgs") -> "VllmConfig":
    """What a start makes, short of `refusals.check`, whose rules are gone through one by one.

    Raises:
        ValueError: options or features that are refused before there is a config.
    """
    from rkv_vllm.patches.create_engine_config import switch_on

    switch_on(engine_args)
    # The function beneath our own replacement (patches/create_engine_config.py).
    return type(engine_args).create_engine_config.__wrapped__(engine_args)


def _message(error: Exception) -> list[str]:
    """The sentences of an error, without what pydantic puts around them."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        sentences = [each["msg"].removeprefix("Value error, ") for each in error.errors()]
        return [" ".join(sentence.split()) for sentence in sentences]
    if isinstance(error, ValueError):
        return str(error).splitlines()
    return [f"{type(error).__name__}: {' '.join(str(error).split())}"]


def _runner(vllm_config: "VllmConfig") -> Finding:
    default = _default_runner().message
    runner = "V2" if vllm_config.use_v2_model_runner else "V1"
    if default.startswith(runner):
        return Finding("model", "model runner", "ok", default)
    why = "a feature of this start decides; vLLM's log names it"
    return Finding("model", "model runner", "ok", f"{runner}: {why}")


def _backend(vllm_config: "VllmConfig") -> Finding:
    backend = vllm_config.attention_config.backend
    chosen = (
        "vLLM chooses, checked when the cache is allocated" if backend is None else backend.name
    )
    return Finding("model", "attention backend", "ok", chosen)


def _compaction(vllm_config: "VllmConfig") -> Finding:
    config = ServerOptions.from_dict(vllm_config.additional_config[CONFIG_KEY])
    max_model_len = vllm_config.model_config.max_model_len
    due = config.budget + config.buffer
    options = f"budget {config.budget}, buffer {config.buffer}, max_model_len {max_model_len}"
    if due >= max_model_len:
        cure = "no request will ever be compacted; lower --kv-budget"
        return Finding("model", "compaction", "note", f"{options}: {cure}")
    return Finding("model", "compaction", "ok", f"{options}: from {due} tokens of a request on")
