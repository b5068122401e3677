"""Which room of the package may import which: each only what stands on a lower floor, no circles.

`fit` is no rim: everything that touches vLLM says so with its `@overrides`, and the scheduler asks
its refusals once more. So it stands below them, and imports only the log and the options.

Counted are all imports, those inside functions and those for types alone as well: they hide circles
from Python, not from a reader.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import rkv_vllm

PACKAGE = Path(rkv_vllm.__file__).parent
FOLDERS = {"rkv_vllm": PACKAGE, "rkv_vllm.kernels": PACKAGE.parent / "kernels"}

# From the ground up. A room is a file or folder of the package; "" is the package itself.
FLOORS = (
    {"kernels", "option_field", "model_name", "whole_file"},
    {"methods", "model_file", "limits", "log", "policy"},
    {"cache_owners", "layer_budgets"},
    {"options"},
    {"flags", "request_options", "variables", "fit"},
    {"scheduling"},
    {"worker"},
    {"frontend"},
    {"patches"},
    {"plugin"},
    {""},
    {"bench", "calibrate", "trace"},
    {"eval"},
    {"cli"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Rooms that know tensors or plain Python only.
WITHOUT_VLLM = (
    "cache_owners",
    "kernels",
    "layer_budgets",
    "methods",
    "model_file",
    "model_name",
    "option_field",
    "options",
    "flags",
    "request_options",
    "variables",
    "policy",
    "whole_file",
)


def our_modules() -> dict[str, Path]:
    found = {}
    for name, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((name, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = our_modules()


def imported_names(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{each.name}" for each in node.names)


def imports() -> Iterator[tuple[str, str]]:
    """(importing, imported) module of ours."""
    for module, path in MODULES.items():
        for name in imported_names(path):
            if name.partition(".")[0] == "rkv_vllm":
                while name not in MODULES:
                    name = name.rpartition(".")[0]
                yield module, name


def room_of(module: str) -> str:
    return module.removeprefix("rkv_vllm").lstrip(".").partition(".")[0]


def test_every_room_has_a_floor():
    assert {room_of(module) for module in MODULES} <= FLOOR_OF.keys()


def test_no_room_imports_from_its_own_floor_or_above():
    pairs = set(imports())
    assert len(pairs) > 100
    assert [
        f"{module} imports {imported}"
        for module, imported in sorted(pairs)
        if room_of(module) != room_of(imported)
        and FLOOR_OF[room_of(imported)] >= FLOOR_OF[room_of(module)]
    ] == []


def test_no_modules_import_each_other_in_a_circle():
    imports_of = defaultdict(set)
    for module, imported in imports():
        if module != imported:
            imports_of[module].add(imported)
    TopologicalSorter(imports_of).prepare()


def test_rooms_of_plain_python_and_tensors_never_import_vllm():
    assert [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        if room_of(module) in WITHOUT_VLLM
        for name in imported_names(path)
        if name.partition(".")[0] == "vllm"
    ] == []


def test_no_check_vanishes_when_python_optimises():
    assert len(MODULES) > 50
    assert [
        f"{module}:{node.lineno}"
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ] == []
