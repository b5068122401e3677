"""Every vLLM function that ours stand in for is named, and compared before anything starts."""

import ast
import functools
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
import zipfile
from abc import ABC
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import vllm
from packaging.specifiers import SpecifierSet
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

import rkv_vllm
from rkv_vllm.fit import code_table, overrides, source
from rkv_vllm.fit.code_hash import FUNCTIONS
from rkv_vllm.fit.overrides import check_overrides, describe, load_table, table_path
from rkv_vllm.fit.source import Source
from rkv_vllm.fit.versions import SCHEDULER_CLS, SUPPORTED_VLLM
from rkv_vllm.fit.watched import WATCHED_SYMBOLS
from rkv_vllm.frontend.stat_logger import CompressionStatLogger
from rkv_vllm.patches import PATCHES, generate, process_inputs
from rkv_vllm.worker import attention_hook
from rkv_vllm.worker.runner import compression_runner
from rkv_vllm.worker.runner_v1 import CompressionRunnerV1
from rkv_vllm.worker.runner_v2 import CompressionRunnerV2
from scripts.vllm_signatures import make_code_table, make_table, named_symbols
from tests.fit.conftest import OFF

PACKAGE = Path(rkv_vllm.__file__).parent
SITE_PACKAGES = Path(vllm.__file__).parent.parent
NAMED = {symbol for _, symbol in named_symbols()}

# What compression adds, and the runner it is added to.
RUNNERS = {
    "V1": (CompressionRunnerV1, CPUModelRunner),
    "V2": (CompressionRunnerV2, GPUModelRunner),
}

# Read from the source text alone: these import what a CPU installation may lack.
NOT_IMPORTED = ("vllm.v1.attention.backends.flashinfer:", "vllm.v1.attention.backends.flash_attn:")


def overriding_functions():
    """Every (symbol, parameters of ours without types) of an `@overrides`."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            for mark in node.decorator_list:
                if not (isinstance(mark, ast.Call) and ast.unparse(mark.func) == "overrides"):
                    continue
                for symbol in map(ast.literal_eval, mark.args):
                    # What is marked may make the function, or the class that has it.
                    name = symbol.rpartition(":")[2].rpartition(".")[2]
                    (ours, *_) = (
                        each
                        for each in ast.walk(node)
                        if isinstance(each, FUNCTIONS) and each.name == name
                    )
                    yield symbol, source._spell(ours).replace("(cls, ", "(")


def calls_that(signature):
    """The ways to call a function: all by place, all by name, as little as possible."""
    first, *others = [
        each for each in signature.parameters.values() if each.kind < each.VAR_KEYWORD
    ]
    listed = [each for each in others if each.kind == each.POSITIONAL_OR_KEYWORD]
    by_name = [each for each in others if each.kind == each.KEYWORD_ONLY]
    needed = [each for each in listed if each.default is each.empty]
    yield [first, *listed], by_name
    yield [first], [*listed, *by_name]
    yield [first, *needed], [each for each in by_name if each.default is each.empty]


def our_modules():
    for module in pkgutil.walk_packages([str(PACKAGE)], "rkv_vllm."):
        # The C++ library is no Python module, and a __main__ runs when imported.
        if module.name.rpartition(".")[2] not in ("_csrc", "__main__"):
            yield importlib.import_module(module.name)


def our_classes():
    """Every class of ours as it runs: our mixins in front of the vLLM classes they are mixed into.

    Classes that are made when an engine starts are made here as it would.
    """
    for module in our_modules():
        for each in vars(module).values():
            if inspect.isclass(each) and is_ours(each) and any(map(is_vllms, each.__mro__)):
                yield each
    for mixin, base in RUNNERS.values():
        yield compression_runner(mixin, base)
    yield attention_hook._observing_class(CPUAttentionBackendImpl)


def is_ours(each):
    # Subclasses of abstract classes that type() makes are said to come from `abc`.
    return each.__module__.startswith("rkv_vllm.") or (each.__module__ == "abc" and each is not ABC)


def is_vllms(each):
    return each.__module__.startswith("vllm.")


def overridden(each):
    """Every vLLM function that a class of ours redefines, as the symbols that may name it.

    That is: under the name of any vLLM class from the first behind ours to the one that has it.
    """
    for ours in filter(is_ours, each.__mro__):
        for name, value in vars(ours).items():
            # Whatever Python keeps in every class is data.
            if not inspect.isroutine(value):
                continue
            # A dataclass gets its special methods made.
            if "__dataclass_fields__" in vars(ours) and name.startswith("__"):
                continue
            # Takes whatever comes and passes it on.
            if name == "__init__" and overrides._spell(value) == "(self, *args, **kwargs)":
                continue
            symbols = []
            for theirs in filter(is_vllms, each.__mro__):
                symbols.append(f"{theirs.__module__}:{theirs.__qualname__}.{name}")
                if name in vars(theirs):
                    yield symbols
                    break


def code_releases():
    return [path.stem.removeprefix("code-") for path in code_table.FOLDER.glob("code-*.json")]


# Nothing is forgotten


def test_every_override_names_the_function_it_overrides():
    found = {symbols[-1]: (each, symbols) for each in our_classes() for symbols in overridden(each)}
    # One of each kind, or the walk itself is broken.
    assert found.keys() >= {
        "vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_after_schedule",
        "vllm.v1.core.sched.scheduler:Scheduler._update_after_schedule",
        "vllm.v1.kv_cache_interface:FullAttentionSpec.merge",
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward",
        "vllm.v1.worker.utils:AttentionGroup.build_metadata",
        "vllm.v1.worker.gpu_worker:Worker.sleep",
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner.load_model",
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.load_model",
    }
    forgotten = [
        f"{each.__name__}: {symbols[-1]}"
        for each, symbols in found.values()
        if NAMED.isdisjoint(symbols)
    ]
    assert forgotten == [], 'mark it with @overrides("...") and run scripts/vllm_signatures.py'


@pytest.mark.parametrize("path", sorted(table_path("0.32.0").parent.glob("vllm-*.json")), ids=str)
def test_what_overrides_a_function_can_be_called_as_every_version_calls_it(path):
    table = json.loads(path.read_text())
    found = dict(overriding_functions())
    assert len(found) > 50
    for symbol, spelled in found.items():
        ours, theirs = (
            inspect.signature(eval(f"lambda {each[1:-1]}: 0")) for each in (spelled, table[symbol])
        )
        for by_place, by_name in calls_that(theirs):
            try:
                ours.bind(*by_place, **{each.name: each for each in by_name})
            except TypeError as error:
                pytest.fail(f"{symbol}: {error}: ours {spelled}, theirs {table[symbol]}")


def test_every_replaced_function_is_named():
    assert {patch.symbol for patch in PATCHES} <= NAMED


def test_what_stands_in_the_text_is_what_an_import_registers():
    list(our_modules())
    files = defaultdict(set)
    for file, symbol in named_symbols():
        files[symbol].add(file)
    assert overrides._needed_by.keys() == files.keys()
    assert [s for s, file in overrides._needed_by.items() if file not in files[s]] == []


# The tables are true


def test_every_supported_version_has_a_table_of_every_named_function_and_no_other():
    minors = [f"0.{minor}.0" for minor in range(28, 40)]
    supported = {table_path(minor) for minor in SpecifierSet(SUPPORTED_VLLM).filter(minors)}
    assert set(table_path("0.32.0").parent.glob("vllm-*.json")) == supported
    assert {table_path(each) for each in code_releases()} == supported
    for each in code_releases():
        code = json.loads(code_table.table_path(each).read_text())
        assert code.keys() == NAMED | set(WATCHED_SYMBOLS), "run scripts/vllm_signatures.py"
        assert {symbol for symbol in NAMED if code[symbol] == overrides.MISSING} == set()
    for path in supported:
        table = json.loads(path.read_text())
        assert table.keys() == NAMED, "run scripts/vllm_signatures.py for every supported version"
        assert all(text.startswith("(") for text in table.values())


def test_installed_vllm_is_as_the_table_says():
    table, source = load_table(vllm.__version__), Source(SITE_PACKAGES)
    assert make_table(source) == table
    code = code_table.table_path(vllm.__version__)
    assert make_code_table(source) == json.loads(code.read_text())
    for symbol in NAMED:
        if not symbol.startswith(NOT_IMPORTED):
            importlib.import_module(symbol.partition(":")[0])
            assert describe(symbol) == table[symbol], symbol


SAMPLE = {
    "sample/__init__.py": "from .base import Base as Renamed, chosen\n",
    "sample/base.py": """
if True:
    def chosen(a): ...
else:
    def chosen(b): ...

class Base:
    def method(self, a, /, b: int, c=1, *args: int, d, e=2, **kwargs) -> None: ...
    def keyword(self, *, only): ...
    @classmethod
    def make(cls, a): ...
    @staticmethod
    def plain(a, b=None): ...
    @property
    def view(self): ...
""",
    "sample/derived.py": """
from typing import Generic, TypeVar
from sample import Renamed

T = TypeVar("T")

class Derived(Renamed, Generic[T]):
    def keyword(self, *, other): ...

class Narrow(Derived[int]): ...
""",
}

DESCRIPTIONS = {
    "sample:chosen": "(a)",
    "sample.base:Base.method": "(self, a, /, b, c=..., *args, d, e=..., **kwargs)",
    "sample:Renamed.make": "(a)",
    "sample.derived:Narrow.keyword": "(self, *, other)",
    "sample.derived:Narrow.plain": "(a, b=...)",
    "sample.derived:Narrow.view": "a property",
    "sample.derived:Narrow.nothing": overrides.MISSING,
    "sample.derived:Nothing.method": overrides.MISSING,
}


def test_source_text_and_import_are_described_alike(tmp_path, monkeypatch):
    (tmp_path / "sample").mkdir()
    with zipfile.ZipFile(tmp_path / "sample.whl", "w") as wheel:
        for name, text in SAMPLE.items():
            (tmp_path / name).write_text(text)
            wheel.writestr(name, text)
    monkeypatch.syspath_prepend(tmp_path)
    for symbol, description in DESCRIPTIONS.items():
        importlib.import_module(symbol.partition(":")[0])
        assert describe(symbol) == description, symbol
        assert Source(tmp_path).describe(symbol) == description, symbol
        assert Source(tmp_path / "sample.whl").describe(symbol) == description, symbol


def test_script_names_what_a_version_lacks(tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "_version.py").write_text("__version__ = version = '0.34.0'\n")
    assert Source(tmp_path).version() == "0.34.0"
    with pytest.raises(
        ValueError,
        match=r"lacks what our code needs:(\n.*)*EngineArgs.add_cli_args \(needed by rkv_",
    ):
        make_table(Source(tmp_path))


# What happens at start


def test_changed_function_is_refused_before_the_model_loads(arguments, monkeypatch):
    monkeypatch.setattr(
        Scheduler, "_update_after_schedule", lambda self, scheduler_output, num_steps: None
    )
    with pytest.raises(ValueError, match="does not fit this build of vLLM") as refusal:
        arguments().create_engine_config()
    message = str(refusal.value)
    assert (
        "vllm.v1.core.sched.scheduler:Scheduler._update_after_schedule (needed by "
        "rkv_vllm/scheduling/scheduler.py): got (self, scheduler_output, num_steps), "
        "wanted (self, scheduler_output)"
    ) in message
    assert "install an unchanged release" in message


def test_changed_function_does_not_matter_while_compression_is_off(arguments, monkeypatch):
    monkeypatch.delattr(Scheduler, "_update_after_schedule")
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    arguments(**OFF).create_engine_config()


SCHED, WORKER = "vllm.v1.core", "vllm.v1.worker"
CHANGES = {
    "function is gone": (f"{SCHED}.sched.scheduler:Scheduler._free_request_blocks", None),
    "parameter got a default": (
        f"{SCHED}.single_type_kv_cache_manager:FullAttentionManager.allocate_new_blocks",
        lambda self, request_id, num_tokens, num_tokens_main_model=0: [],
    ),
    "method became a property": (
        f"{WORKER}.block_table:MultiGroupBlockTable.compute_slot_mapping",
        property(lambda self: None),
    ),
    "parameter was renamed": (
        f"{WORKER}.gpu.model_runner:GPUModelRunner.load_model",
        lambda self, dummy_weights=False, load_dummy_weights=False: None,
    ),
    "parameter became keyword-only": (
        f"{WORKER}.gpu.block_table:BlockTables.compute_slot_mappings",
        lambda self, *, idx_mapping: None,
    ),
    "method became static": (
        f"{WORKER}.gpu_worker:Worker._make_model_runner",
        staticmethod(lambda: None),
    ),
    "called function changed": (
        f"{SCHED}.block_pool:BlockPool.get_new_blocks",
        lambda self, count: [],
    ),
    "another plugin replaced it": (
        "vllm.v1.engine.async_llm:AsyncLLM.generate",
        lambda self, prompt, sampling_params, request_id, priority: None,
    ),
}


@pytest.mark.parametrize(("symbol", "replacement"), CHANGES.values(), ids=CHANGES)
def test_every_kind_of_change_is_found(monkeypatch, symbol, replacement):
    list(our_modules())
    check_overrides(SCHEDULER_CLS)
    if replacement is None:
        monkeypatch.delattr(symbol.replace(":", "."))
    else:
        monkeypatch.setattr(symbol.replace(":", "."), replacement)
    with pytest.raises(ValueError, match=r"needed by .*: got .*, wanted \(self") as error:
        check_overrides(SCHEDULER_CLS)
    assert [line.partition(" ")[0] for line in str(error.value).splitlines()[1:]] == [symbol]


@pytest.mark.parametrize(
    ("runner", "changed"),
    [
        ("V1", f"{WORKER}.block_table.MultiGroupBlockTable.compute_slot_mapping"),
        ("V2", f"{WORKER}.gpu.block_table.BlockTables.compute_slot_mappings"),
    ],
)
def test_worker_refuses_a_changed_function_before_it_builds_a_runner(monkeypatch, runner, changed):
    monkeypatch.setattr(changed, lambda self, rows: None)
    with pytest.raises(ValueError, match=r"slot_mappings? \(needed by .*: got \(self, rows\)"):
        compression_runner(*RUNNERS[runner])


@pytest.mark.parametrize(("mixin", "base"), RUNNERS.values(), ids=RUNNERS)
def test_worker_compares_the_attention_backend_that_its_model_has_brought(monkeypatch, mixin, base):
    @functools.wraps(base.load_model)
    def bring_backend(self):
        changed = type("TritonAttentionImpl", (), {"forward": lambda self, layer: None})
        backend = SimpleNamespace(TritonAttentionImpl=changed)
        monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.triton_attn", backend)

    monkeypatch.setattr(base, "load_model", bring_backend)
    runner = compression_runner(mixin, base)
    with pytest.raises(ValueError, match=r"Impl\.forward \(needed by .*: got \(self, layer\)"):
        runner.load_model(runner.__new__(runner))


PROCESS = {
    process_inputs: (InputProcessor, "process_inputs"),
    generate: (AsyncLLM, "generate"),
}


@pytest.mark.parametrize("patch", PROCESS, ids=lambda patch: patch.__name__)
def test_function_imported_to_be_replaced_is_compared_first(monkeypatch, patch):
    owner, name = PROCESS[patch]

    def changed(self, request): ...

    monkeypatch.setattr(owner, name, changed)
    with pytest.raises(ValueError, match=rf"{name} \(needed by .*: got \(self, request\)"):
        patch.apply.__wrapped__()
    assert getattr(owner, name) is changed


def test_stat_logger_compares_what_it_overrides(arguments, monkeypatch):
    stat_logger = CompressionStatLogger(arguments().create_engine_config(), [0])
    monkeypatch.setattr(AggregateStatLoggerBase, "record", lambda self, stats: None)
    with pytest.raises(ValueError, match=r"record \(needed by .*: got \(self, stats\)"):
        stat_logger.log_engine_initialized()
    assert stat_logger.families == {}


def test_lost_module_is_refused_in_the_same_words(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.v1.core.sched.async_scheduler", None)
    monkeypatch.delitem(sys.modules, "rkv_vllm.scheduling.scheduler")
    with pytest.raises(ValueError, match=r"does not fit this build(.|\n)*sched.async_scheduler"):
        check_overrides(SCHEDULER_CLS)


def test_version_without_a_table_is_refused(monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    with pytest.raises(ValueError, match=r"got 0\.99\.1, wanted one of 0\.32.*run: pip install"):
        check_overrides()


def test_comparison_imports_no_more_of_vllm_than_its_own_scheduler_does():
    # Importing worker modules could initialise the device, which forbids forking.
    code = f"""
import sys, vllm.engine.arg_utils, vllm.v1.core.sched.async_scheduler
from rkv_vllm.plugin import register
register()
before = set(sys.modules)
from rkv_vllm.fit.overrides import check_overrides
check_overrides({SCHEDULER_CLS!r})
added = set(sys.modules) - before
assert "rkv_vllm.scheduling.scheduler" in added
print([name for name in added if name.startswith("vllm.")])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
