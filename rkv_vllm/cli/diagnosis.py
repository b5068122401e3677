"""What `rkv-vllm doctor` looks at, as a list of findings.

Asks the code that a start asks: `fit/` for versions, platform, vLLM's functions and the model,
`kernels/` for what was built. Imports torch and vLLM, so call it late.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, NamedTuple

from rkv_vllm.cli.checkpoint import find_config, read_config, read_decoder
from rkv_vllm.cli.errors import CommandError
from rkv_vllm.cli.inspection import inspection_failures
from rkv_vllm.fit import code_table
from rkv_vllm.fit.overrides import check_overrides
from rkv_vllm.fit.refusals import ATTENTION_BACKENDS, REFUSALS
from rkv_vllm.fit.state_blocks import check_budget, state_block_size
from rkv_vllm.fit.versions import (
    SCHEDULER_CLS,
    SUPPORTED_VLLM,
    WORKER_CLS,
    check_vllm_version,
    platform_worker_cls,
)
from rkv_vllm.options import CONFIG_KEY, ServerOptions
from rkv_vllm.variables import switches_on

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

DISTRIBUTIONS = ("rkv-vllm", "vllm", "torch", "triton")
PLUGIN_GROUP = "vllm.general_plugins"


class Verdict(NamedTuple):
    """What came of one look.

    Attributes:
        status: "ok", "note" (works, but worth knowing) or "refused" (a start would fail).
        message: what was found; for a refusal with the cure.
    """

    status: Literal["ok", "note", "refused"]
    message: str


class Finding(NamedTuple):
    """One thing looked at.

    Attributes:
        topic: heading that it belongs to.
        name: what was looked at.
        status: as in `Verdict`.
        message: as in `Verdict`.
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
    yield Finding("versions", "python", "ok", sys.version.split()[0])
    for name in DISTRIBUTIONS:
        yield Finding("versions", name, *_installed(name))
    try:
        import vllm
    # A library that does not fit shows as any of these.
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}; install vLLM and its requirements again"
        yield Finding("versions", "import vllm", "refused", why)
        return
    known = _passes(check_vllm_version, f"in {SUPPORTED_VLLM}")
    yield Finding("versions", "vLLM's version", *known)
    functions = _passes(lambda: check_overrides(SCHEDULER_CLS), "as expected")
    yield Finding("versions", "vLLM's functions", *functions)
    if (compared := code_table.compare(vllm.__version__)) is not None:
        yield Finding("versions", "vLLM's code", *_code(compared))
    yield Finding("plugin", "entry point", *_plugin())
    yield from _platform()
    yield Finding("kernels", "C++ (CPU)", *_cpp_kernels())
    yield Finding("kernels", "Triton (GPU)", *_triton_kernels())
    if folder is not None:
        yield from _model(folder, engine_flags)


def _model(folder: str, engine_flags: Sequence[str]) -> Iterator[Finding]:
    """What compression supports and refuses when this model is served with these flags."""
    engine_args = _engine_args(folder, engine_flags)
    yield Finding("model", "layers", *_layers(folder))
    with inspection_failures() as failures:
        try:
            vllm_config = _engine_config(engine_args)
        # A start ends with whatever vLLM and transformers raise for a config.json or a flag.
        except Exception as error:
            for line in failures or _message(error):
                yield Finding("model", "engine config", "refused", line)
            return
    backend = vllm_config.attention_config.backend
    chosen = "vLLM chooses, checked when the cache is allocated"
    yield Finding("model", "architecture", "ok", ", ".join(vllm_config.model_config.architectures))
    yield Finding("model", "model runner", "ok", _runner(vllm_config))
    yield Finding("model", "attention backend", "ok", chosen if backend is None else backend.name)
    yield Finding("model", "compaction", *_compaction(vllm_config))
    if (block_size := state_block_size(vllm_config)) is not None:
        yield Finding("model", "blocks", *_blocks(vllm_config, block_size))
    for rule in REFUSALS:
        sentence = rule.find(vllm_config)
        status = "ok" if sentence is None else "refused"
        yield Finding("features", rule.feature, status, sentence or "not in use")


def _installed(name: str) -> Verdict:
    try:
        return Verdict("ok", version(name))
    except PackageNotFoundError:
        pass
    if name == "triton":
        return Verdict("note", "not installed; GPUs need it")
    cure = {"vllm": f'pip install "vllm{SUPPORTED_VLLM}"'}.get(name, f"pip install {name}")
    return Verdict("refused", f"not installed; run: {cure}")


def _passes(check: Callable[[], object], otherwise: str) -> Verdict:
    """The verdict of a check that raises ValueError."""
    try:
        check()
    except ValueError as error:
        return Verdict("refused", str(error))
    return Verdict("ok", otherwise)


def _code(compared: code_table.Comparison) -> Verdict:
    """Whether vLLM's functions do what they did when we were tested; reads its source text."""
    if compared.changed:
        return Verdict("note", code_table.describe(compared))
    return Verdict("ok", f"{compared.num_functions} functions as in {compared.release}")


def _plugin() -> Verdict:
    """Whether vLLM's processes will find the plugin by themselves."""
    found = [entry for entry in entry_points(group=PLUGIN_GROUP) if entry.name == "rkv"]
    if not found:
        return Verdict(
            "refused",
            f"no 'rkv' in the group {PLUGIN_GROUP}: vLLM cannot find the plugin; install this "
            "package with pip instead of putting its folder on the path",
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "rkv" not in allowed.split(","):
        wanted = "wanted 'rkv' in it; add it or unset the variable"
        return Verdict("refused", f"VLLM_PLUGINS: got {allowed!r}, {wanted}")
    return Verdict("ok", f"{found[0].name} = {found[0].value}")


def _platform() -> Iterator[Finding]:
    from vllm.platforms import current_platform

    name = current_platform.device_name or "none"
    if name not in WORKER_CLS:
        yield Finding("device", "platform", *_passes(platform_worker_cls, name))
        return
    yield Finding("device", "platform", "ok", f"{name}: {current_platform.get_device_name()}")
    yield Finding("device", "worker", "ok", WORKER_CLS[name])
    yield Finding("device", "attention backends known", "ok", ", ".join(ATTENTION_BACKENDS))
    yield Finding("device", "model runner", "ok", _default_runner())


def _default_runner() -> str:
    """The runner as far as it follows from the environment; a model may change it."""
    from vllm import envs
    from vllm.triton_utils import HAS_TRITON

    if envs.VLLM_USE_V2_MODEL_RUNNER is not None:
        runner = "V2" if envs.VLLM_USE_V2_MODEL_RUNNER else "V1"
        return f"{runner}: VLLM_USE_V2_MODEL_RUNNER={os.environ['VLLM_USE_V2_MODEL_RUNNER']}"
    if not HAS_TRITON:
        return "V1: vLLM finds no Triton for this device"
    return "V2: vLLM's default; V1 for features that V2 lacks"


def _cpp_kernels() -> Verdict:
    from rkv_vllm.kernels import native

    try:
        library = native.library()
    except (OSError, AttributeError) as error:
        return Verdict("refused", f"built, but not usable: {error}; reinstall rkv-vllm")
    if library is None:
        slow = "torch serves on CPUs, several times slower; reinstall where g++ is found"
        return Verdict("note", f"not built: {slow}")
    return Verdict("ok", library._name)


def _triton_kernels() -> Verdict:
    from vllm.platforms import current_platform

    if current_platform.device_type == "cpu":
        return Verdict("ok", "not needed on this device")
    if find_spec("triton") is None:
        cure = "torch serves on the GPU, slower; run: pip install triton"
        return Verdict("note", f"not installed: {cure}")
    return Verdict("ok", f"compiled by Triton {version('triton')}")


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
    # As with compression on; the environment may name the method.
    switch = [] if switches_on(os.environ) else ["--kv-compression", ServerOptions.method]
    arguments = parser.parse_args([*switch, *engine_flags])
    arguments.model = folder
    # A folder with nothing but config.json is enough.
    arguments.skip_tokenizer_init = True
    return AsyncEngineArgs.from_cli_args(arguments)


def _engine_config(engine_args: "AsyncEngineArgs") -> "VllmConfig":
    """What a start makes, short of `refusals.check`, whose rules are gone through one by one.

    Raises:
        ValueError: options or features that are refused before there is a config.
    """
    from rkv_vllm.patches.create_engine_config import add_variables, switch_on

    add_variables(engine_args)
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


def _runner(vllm_config: "VllmConfig") -> str:
    default = _default_runner()
    runner = "V2" if vllm_config.use_v2_model_runner else "V1"
    if default.startswith(runner):
        return default
    return f"{runner}: a feature of this start decides; vLLM's log names it"


def _layers(folder: str) -> Verdict:
    """What is compacted and what is not, where the fields of config.json are known ones."""
    try:
        decoder = read_decoder(read_config(find_config(folder)))
    except CommandError as error:
        return Verdict("note", f"a start will tell: {error}")
    return Verdict("ok", decoder.layers.describe())


def _blocks(vllm_config: "VllmConfig", block_size: int) -> Verdict:
    options = ServerOptions.from_dict(vllm_config.additional_config[CONFIG_KEY])
    check = partial(check_budget, options, block_size, vllm_config.max_concurrent_batches)
    return _passes(check, f"of {block_size} tokens, which hold one state; freed whole")


def _compaction(vllm_config: "VllmConfig") -> Verdict:
    config = ServerOptions.from_dict(vllm_config.additional_config[CONFIG_KEY])
    max_model_len = vllm_config.model_config.max_model_len
    due = config.least_room
    options = f"budget {config.budget}, buffer {config.buffer}, max_model_len {max_model_len}"
    if due >= max_model_len:
        return Verdict("note", f"{options}: no request will ever be compacted; lower --kv-budget")
    return Verdict("ok", f"{options}: from {due} tokens of a request on")
