"""The tables of touched vLLM functions are complete, true, and compared before anything starts."""

import ast
import importlib
import inspect
import json
import pkgutil
import sys
import zipfile
from abc import ABC
from pathlib import Path

import pytest
import vllm
from packaging.specifiers import SpecifierSet
from typer.testing import CliRunner
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.worker.block_table import MultiGroupBlockTable
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

import rkv_vllm
from rkv_vllm import support
from rkv_vllm.plugin import register
from rkv_vllm.signatures import Part, check_signatures, load_table, table_path
from rkv_vllm.signatures.inspected import MISSING, describe
from rkv_vllm.signatures.touched import TOUCHED
from rkv_vllm.worker import attention_hook, runner_v2
from rkv_vllm.worker.runner import compression_runner
from scripts.vllm_signatures import Source, make_table
from scripts.vllm_signatures import main as vllm_signatures
from tests import checkpoint_configs

PACKAGE = Path(rkv_vllm.__file__).parent
SITE_PACKAGES = Path(vllm.__file__).parent.parent
TABLES = sorted(table_path("0.32.0").parent.glob("vllm-*.json"))
SYMBOLS = {symbol for files in TOUCHED.values() for each in files.values() for symbol in each}

# Read from the source text alone: these import what a CPU installation may lack.
NOT_IMPORTED = ("vllm.v1.attention.backends.flashinfer:", "vllm.v1.attention.backends.flash_attn:")


@pytest.fixture(autouse=True, scope="module")
def plugin():
    register()


# The tables


@pytest.mark.parametrize("part", Part, ids=lambda part: part.name)
def test_installed_vllm_is_as_the_table_says(part):
    table = load_table(vllm.__version__)
    wrong = {
        symbol: (describe(symbol), table[symbol])
        for symbols in TOUCHED[part].values()
        for symbol in symbols
        if not symbol.startswith(NOT_IMPORTED) and describe(symbol) != table[symbol]
    }
    assert wrong == {}


def test_source_text_says_the_same_as_the_imported_vllm():
    assert make_table(Source(SITE_PACKAGES)) == load_table(vllm.__version__)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_table_holds_every_touched_symbol_and_no_other(path):
    content = json.loads(path.read_text())
    assert set(content["symbols"]) == SYMBOLS
    assert MISSING not in content["symbols"].values()
    assert table_path(content["vllm"]) == path


def test_every_supported_version_has_a_table_and_no_other():
    minors = [f"0.{minor}" for minor in range(28, 40)]
    supported = SpecifierSet(support.SUPPORTED_VLLM)
    assert [path.stem.removeprefix("vllm-") for path in TABLES] == [
        minor for minor in minors if f"{minor}.0" in supported
    ]


def test_requirement_of_the_package_is_the_supported_range():
    pyproject = (PACKAGE.parent / "pyproject.toml").read_text()
    (required,) = [line for line in pyproject.splitlines() if line.startswith('    "vllm>=')]
    minors = {f"0.{minor}.{patch}" for minor in range(28, 40) for patch in (0, 3)}
    wanted = SpecifierSet(support.SUPPORTED_VLLM)
    got = SpecifierSet(required.strip(' ",').removeprefix("vllm"))
    assert set(got.filter(minors)) == set(wanted.filter(minors))


# Nothing is forgotten


def our_classes():
    """Every class of ours as it runs: our mixins over the vLLM classes they are mixed into."""
    for module in pkgutil.walk_packages([str(PACKAGE)], "rkv_vllm."):
        # The C++ library is no Python module, and a __main__ runs when imported.
        if module.name.rpartition(".")[2] in ("_csrc", "__main__"):
            continue
        for each in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(each) and is_ours(each) and any(map(is_vllms, each.__mro__)):
                yield each
    yield compression_runner(CPUModelRunner, use_v2=False)
    yield compression_runner(GPUModelRunner, use_v2=True)
    yield attention_hook._observing_class(CPUAttentionBackendImpl)
    yield runner_v2._physical_model_state(DefaultModelState)


def is_ours(each):
    # Subclasses of abstract classes that type() makes are said to come from `abc`.
    return each.__module__.startswith("rkv_vllm.") or (each.__module__ == "abc" and each is not ABC)


def is_vllms(each):
    return each.__module__.startswith("vllm.")


def overridden(each):
    """(vLLM class, name) of everything that a class of ours redefines."""
    for base in filter(is_ours, each.__mro__):
        for name, value in vars(base).items():
            # Whatever Python keeps in every class is data; dataclasses get their methods made.
            if not inspect.isroutine(value) or "__dataclass_fields__" in vars(base):
                continue
            yield from (
                (theirs, name) for theirs in filter(is_vllms, each.__mro__) if name in vars(theirs)
            )


def listed_members():
    """(vLLM class, name) of every listed member, for the class and all that inherit it."""
    for symbol in SYMBOLS:
        module, _, path = symbol.partition(":")
        owner, _, name = path.partition(".")
        if name and not symbol.startswith(NOT_IMPORTED):
            yield from (
                (each, name) for each in getattr(importlib.import_module(module), owner).__mro__
            )


def test_every_override_is_listed():
    found = {pair: each for each in our_classes() for pair in overridden(each)}
    # One of each kind, or the walk itself is broken.
    for pair in (
        (Scheduler, "_update_after_schedule"),
        (CPUAttentionBackendImpl, "forward"),
        (DefaultModelState, "prepare_attn"),
        (BlockTables, "compute_slot_mappings"),
        (MultiGroupBlockTable, "compute_slot_mapping"),
        (GPUModelRunner, "add_requests"),
    ):
        assert pair in found
    listed = set(listed_members())
    forgotten = [
        f"{each.__name__} overrides {theirs.__qualname__}.{name}"
        for (theirs, name), each in found.items()
        if (theirs, name) not in listed
    ]
    assert forgotten == [], "list it in rkv_vllm/signatures/touched.py and make the tables anew"


def imports_of_vllm(path):
    """What a file imports from vLLM while it runs, as the beginnings that a symbol may have."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in for_types:
            module = node.module or ""
            if node.level == 0 and module.partition(".")[0] == "vllm":
                yield from (f"{module}:{each.name}" for each in node.names)


def covers(symbol, imported):
    as_module = imported.replace(":", ".") + ":"
    return symbol == imported or symbol.startswith((f"{imported}.", as_module))


def test_every_import_from_vllm_is_listed():
    forgotten = []
    for path in PACKAGE.rglob("*.py"):
        file = path.relative_to(PACKAGE).as_posix()
        symbols = [s for files in TOUCHED.values() for s in files.get(file, ())]
        forgotten += [
            f"{file} imports {imported}"
            for imported in imports_of_vllm(path)
            # Only names the type of an argument there.
            if imported != "vllm.v1.core.sched.output:SchedulerOutput"
            and not any(covers(symbol, imported) for symbol in symbols)
        ]
    assert forgotten == [], "list it in rkv_vllm/signatures/touched.py and make the tables anew"


def test_listed_files_exist():
    files = {file for each in TOUCHED.values() for file in each}
    assert [file for file in files if not (PACKAGE / file).is_file()] == []


# What happens at start


@pytest.fixture
def arguments(tmp_path):
    """Makes engine arguments for a small model, with compression unless told otherwise."""

    def make(compression=True):
        return EngineArgs(
            model=checkpoint_configs.write_config(tmp_path / "model", checkpoint_configs.LLAMA),
            skip_tokenizer_init=True,
            **(rkv_vllm.engine_args(budget=96, buffer=32) if compression else {}),
        )

    return make


def test_changed_function_is_refused_before_the_model_loads(arguments, monkeypatch):
    def other(self, scheduler_output, num_steps):
        pass

    monkeypatch.setattr(Scheduler, "_update_after_schedule", other)
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
    arguments(compression=False).create_engine_config()


CHANGES = {
    "function is gone": (Part.ENGINE, Scheduler, "_free_request_blocks", None),
    "parameter got a default": (
        Part.ENGINE,
        FullAttentionManager,
        "allocate_new_blocks",
        lambda self, request_id, num_tokens, num_tokens_main_model=0: [],
    ),
    "method became a property": (
        Part.V1_RUNNER,
        MultiGroupBlockTable,
        "add_row",
        property(lambda self: None),
    ),
    "parameter was renamed": (
        Part.V2_RUNNER,
        GPUModelRunner,
        "add_requests",
        lambda self, output: None,
    ),
    "parameter became keyword-only": (
        Part.V2_RUNNER,
        GPUModelRunner,
        "add_requests",
        lambda self, *, scheduler_output: None,
    ),
    "method became static": (
        Part.V2_RUNNER,
        GPUModelRunner,
        "prepare_attn",
        staticmethod(lambda input_batch: None),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_kind_of_change_is_found(monkeypatch, change):
    part, owner, name, replacement = CHANGES[change]
    check_signatures(part)
    if replacement is None:
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, replacement)
    with pytest.raises(ValueError, match=rf"{name} \(needed by .*: got .*, wanted \(self"):
        check_signatures(part)


@pytest.mark.parametrize(
    ("runner", "use_v2", "table"),
    [(CPUModelRunner, False, MultiGroupBlockTable), (GPUModelRunner, True, BlockTables)],
    ids=["V1", "V2"],
)
def test_worker_refuses_a_changed_function_before_it_builds_a_runner(
    monkeypatch, runner, use_v2, table
):
    name = "compute_slot_mappings" if use_v2 else "compute_slot_mapping"
    monkeypatch.setattr(table, name, lambda self, rows: None)
    with pytest.raises(ValueError, match=rf"{name} \(needed by .*: got \(self, rows\)"):
        compression_runner(runner, use_v2=use_v2)


def test_changed_fields_of_a_dataclass_are_found(monkeypatch):
    fields = dict(SchedulerOutput.__dataclass_fields__)
    fields.pop("finished_req_ids")
    monkeypatch.setattr(SchedulerOutput, "__dataclass_fields__", fields)
    with pytest.raises(ValueError, match=r"SchedulerOutput .*: got fields: .*, wanted fields: "):
        check_signatures(Part.ENGINE)


def test_lost_attribute_is_found(monkeypatch):
    def without_running(self, vllm_config):
        self.requests = {}

    assert describe("vllm.v1.core.sched.scheduler:Scheduler.running") == "attribute"
    for name, method in list(vars(Scheduler).items()):
        if inspect.isfunction(method) and "running" in method.__code__.co_names:
            monkeypatch.setattr(Scheduler, name, without_running)
    assert describe("vllm.v1.core.sched.scheduler:Scheduler.running") == MISSING


def test_version_without_a_table_is_refused(monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    with pytest.raises(ValueError, match=r"got 0\.99\.1, wanted one of 0\.32.*run: pip install"):
        check_signatures(Part.ENGINE)


def test_engine_process_imports_no_worker_for_the_comparison():
    # Importing worker modules there could initialise the device, which forbids forking.
    modules = {
        symbol.partition(":")[0] for each in TOUCHED[Part.ENGINE].values() for symbol in each
    }
    theirs = ("vllm.v1.worker", "vllm.v1.attention", "vllm.model_executor", "vllm.entrypoints")
    assert [module for module in modules if module.startswith(theirs)] == []


def test_no_check_vanishes_when_python_optimises():
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "kernels").rglob("*.py")]
    assert len(files) > 30
    assert [
        f"{path.name}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ] == []


# Reading source text

SAMPLE = {
    "__init__.py": "",
    "base.py": """
import dataclasses
from functools import cached_property
from typing import ClassVar

LIMIT: int = 3

if LIMIT > 2:
    def chosen(a): ...
else:
    def chosen(b): ...

@dataclasses.dataclass
class Record:
    first: int
    second: str = ""
    shared: ClassVar[int] = 1

class Base:
    label = "x"

    def __init__(self, size):
        self.size, self.other = size, 0

    def method(self, a, /, b, c=1, *args, d, e=2, **kwargs): ...
    def keyword(self, *, only): ...
    def positional(self, a, b, /): ...
    @classmethod
    def make(cls, a): ...
    @staticmethod
    def plain(a, b=None): ...
    @property
    def view(self): ...
    @cached_property
    def cached(self): ...
""",
    "sub/__init__.py": "from ..base import Base as Renamed\n",
    "sub/derived.py": """
from dataclasses import dataclass
from typing import Generic, TypeVar

from rkv_sample.base import Record
from . import Renamed

T = TypeVar("T")

@dataclass
class Longer(Record):
    third: int = 0

class Derived(Renamed, Generic[T]):
    def keyword(self, *, other): ...

class Narrow(Derived[int]): ...
""",
}

DESCRIPTIONS = {
    "base:LIMIT": "attribute",
    "base:chosen": "(a)",
    "base:Base": "class",
    "base:Base.__init__": "(self, size)",
    "base:Base.label": "attribute",
    "base:Base.size": "attribute",
    "base:Base.other": "attribute",
    "base:Base.method": "(self, a, /, b, c=, *args, d, e=, **kwargs)",
    "base:Base.keyword": "(self, *, only)",
    "base:Base.positional": "(self, a, b, /)",
    "base:Base.make": "(a)",
    "base:Base.plain": "(a, b=)",
    "base:Base.view": "property",
    "base:Base.cached": "property",
    "base:Record": "fields: first, second",
    "base:Record.first": "attribute",
    "sub:Renamed.make": "(a)",
    "sub.derived:Longer": "fields: first, second, third",
    "sub.derived:Narrow.keyword": "(self, *, other)",
    "sub.derived:Narrow.plain": "(a, b=)",
    "sub.derived:Narrow.size": "attribute",
    "sub.derived:Narrow.nothing": MISSING,
    "sub.derived:Nothing": MISSING,
    "sub.derived:Nothing.method": MISSING,
    "nothing:Base": MISSING,
}


@pytest.fixture(scope="module", params=["folder", "wheel"])
def sample(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("sample")
    for name, text in SAMPLE.items():
        file = root / "rkv_sample" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    sys.path.insert(0, str(root))
    if request.param == "wheel":
        with zipfile.ZipFile(root / "sample.whl", "w") as wheel:
            for name in SAMPLE:
                wheel.write(root / "rkv_sample" / name, f"rkv_sample/{name}")
        root = root / "sample.whl"
    yield Source(root)
    sys.path.pop(0)


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_text_and_import_are_described_alike(sample, name):
    symbol = f"rkv_sample.{name}"
    assert sample.describe(symbol) == DESCRIPTIONS[name]
    assert describe(symbol) == DESCRIPTIONS[name]


def test_script_checks_a_table(tmp_path):
    app = CliRunner()
    command = importlib.import_module("typer").Typer()
    command.command()(vllm_signatures)
    arguments = [str(SITE_PACKAGES), "--out", str(tmp_path / "table.json")]
    assert app.invoke(command, arguments).exit_code == 0
    assert (tmp_path / "table.json").read_text() == table_path(vllm.__version__).read_text()
    assert app.invoke(command, [*arguments, "--check"]).exit_code == 0
    (tmp_path / "table.json").write_text("{}")
    assert app.invoke(command, [*arguments, "--check"]).exit_code == 1
    assert app.invoke(command, [str(tmp_path / "nothing.whl")]).exit_code == 2


def test_script_names_what_a_version_lacks(tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "_version.py").write_text("__version__ = version = '0.34.0'\n")
    with pytest.raises(ValueError, match=r"lacks what our code needs:(\n.*)*:Attention\.impl\n"):
        make_table(Source(tmp_path))
    assert Source(tmp_path).version() == "0.34.0"
