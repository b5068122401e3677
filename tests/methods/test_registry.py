import ast
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest

from rkv_vllm import methods
from rkv_vllm.methods import Method, available_methods, get_method, option
from rkv_vllm.methods.rkv import RKV

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENTRY_POINTS = PROJECT["entry-points"]["rkv_vllm.methods"]


class Newest(Method):
    """What a file of another distribution may hold."""

    def score(self, heads, batch):
        raise NotImplementedError


class Half(Method):
    """A method that nobody can make."""


class Mutable(Newest):
    @dataclass
    class Options:
        strength: int = option(1, "How strongly.")


class Demanding(Newest):
    @dataclass(frozen=True)
    class Options:
        strength: int
        where: str
        plain: float = 1.0


class Unstructured(Newest):
    Options = dict


@pytest.fixture
def register(monkeypatch):
    """Pretend that exactly the given name=value pairs are installed."""
    module = ModuleType("other_distribution")
    module.Newest = Newest
    module.number = 7
    module.ModuleType = ModuleType
    for cls in (Half, Mutable, Demanding, Unstructured):
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, "other_distribution", module)

    def pretend(**values):
        def entry_points(*, group):
            return tuple(EntryPoint(name, value, group) for name, value in values.items())

        monkeypatch.setattr(methods, "entry_points", entry_points)

    return pretend


def test_the_built_in_methods_are_there_without_distribution_metadata(register):
    register()
    assert available_methods() == sorted(ENTRY_POINTS)
    for name, value in ENTRY_POINTS.items():
        module, _, cls = value.partition(":")
        assert get_method(name) is getattr(import_module(module), cls)


def test_they_are_there_once_when_the_metadata_lists_them_too(register):
    register(**ENTRY_POINTS)
    assert available_methods() == sorted(ENTRY_POINTS)
    assert get_method("rkv") is RKV


def test_another_distribution_adds_a_method(register):
    register(newest="other_distribution:Newest")
    assert available_methods() == sorted([*ENTRY_POINTS, "newest"])
    assert get_method("newest") is Newest
    assert get_method("rkv") is RKV


def test_unknown_name_lists_the_available_ones(register):
    register(newest="other_distribution:Newest")
    names = ", ".join(sorted([*ENTRY_POINTS, "newest"]))
    with pytest.raises(ValueError, match=rf"got 'snap', wanted one of {names} or .*; correct"):
        get_method("snap")


def test_the_group_of_the_entry_points_is_the_documented_one(monkeypatch):
    asked = []
    monkeypatch.setattr(methods, "entry_points", lambda *, group: asked.append(group) or ())
    available_methods()
    assert asked == ["rkv_vllm.methods"]


def test_a_name_registered_twice_is_refused(register):
    register(rkv="other_distribution:Newest")
    with pytest.raises(ValueError, match="got 'rkv', wanted one method of that name, but both"):
        get_method("rkv")


def test_a_qualified_name_needs_no_registration(register):
    register()
    assert get_method("other_distribution.Newest") is Newest
    assert get_method("rkv_vllm.methods.rkv.RKV") is RKV


def test_a_registered_name_with_dots_is_no_qualified_name(register):
    register(**{"other_distribution.Newest": "rkv_vllm.methods.rkv:RKV"})
    assert get_method("other_distribution.Newest") is RKV


# The same classes under the names of an entry point and of an import.
BAD_CLASSES = {
    "missing.module.Newest": "importing 'missing.module' says: No module named 'missing'; .*PYTHON",
    "other_distribution.Oldest": "class of 'other_distribution', which has no 'Oldest'; ",
    "other_distribution.number": "derived from rkv_vllm.methods.Method, .*names 7; ",
    "other_distribution.ModuleType": r"derived from .*<class 'module'>; ",
    "other_distribution.Half": "with all methods of .*, but it lacks score; add",
    "other_distribution.Mutable": "whose Options is a frozen dataclass, but it is .*frozen=True",
    "other_distribution.Unstructured": "whose Options is a frozen .*<class 'dict'>; decorate",
    "other_distribution.Demanding": "all have defaults, but strength, where of Options has none",
}


@pytest.mark.parametrize(("name", "message"), BAD_CLASSES.items())
@pytest.mark.parametrize("registered", [True, False], ids=["entry-point", "qualified"])
def test_what_is_no_method_is_refused_by_name(register, name, message, registered):
    register(**({"newest": ":".join(name.rsplit(".", 1))} if registered else {}))
    name = "newest" if registered else name
    with pytest.raises(ValueError, match=f"^got '{name}', wanted .*{message}"):
        get_method(name)


@pytest.mark.parametrize(
    "name", ["", ".", ".Newest", "rkv.", "..rkv.RKV", "other_distribution:Newest"]
)
def test_what_is_neither_name_is_refused(register, name):
    register()
    with pytest.raises(ValueError, match=f"^got '{re.escape(name)}', wanted .*; "):
        get_method(name)


def test_a_module_that_fails_shows_its_own_error(register, monkeypatch, tmp_path):
    register()
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "needs_more.py").write_text("import not_installed_anywhere\n")
    with pytest.raises(ValueError, match="'needs_more' says: No module named 'not_installed_any"):
        get_method("needs_more.Method")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        get_method("broken.Method")


def test_a_method_must_implement_the_interface():
    with pytest.raises(TypeError, match="abstract"):
        type("Half", (Method,), {})(None, None, None)


def imported_by(path: Path) -> set[str]:
    """Modules that a file imports, at its top or late."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `from rkv_vllm import x` may name a module.
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
            assert node.level == 0, path
    return found


# The ground floor, and the one above it. What a room may import of the project.
ROOMS = {
    "kernels": ("rkv_vllm.kernels",),
    "rkv_vllm/methods": (
        "rkv_vllm.kernels",
        "rkv_vllm.methods",
        "rkv_vllm.model_name",
        "rkv_vllm.option_field",
        "rkv_vllm.whole_file",
    ),
}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_no_vllm_and_only_the_floors_below_it(room):
    files = list((ROOT / room).rglob("*.py"))
    assert len(files) > 2
    for path in files:
        for name in imported_by(path):
            assert name.split(".")[0] != "vllm", (path, name)
            if name.split(".")[0] == "rkv_vllm":
                assert any(f"{name}.".startswith(f"{own}.") for own in ROOMS[room]), (path, name)


def test_the_field_of_an_option_imports_nothing_but_the_standard_library():
    imported = imported_by(ROOT / "rkv_vllm" / "option_field.py")
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names


def test_importing_a_method_does_not_import_vllm():
    code = "import rkv_vllm.methods.rkv, sys; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
