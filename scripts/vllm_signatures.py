"""Write the signature tables of vLLM versions from their source text, nothing imported.

    pip download vllm==0.33.0 --no-deps -d /tmp/wheel
    python scripts/vllm_signatures.py .venv/lib/python3*/site-packages /tmp/wheel/vllm-*.whl

Run it for every supported version whenever a function of ours gets or loses an `@overrides` or
`@calls` (`rkv_vllm/fit/overrides.py`, which reads the same from an imported vLLM).
"""

import ast
import copy
import importlib.util
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from rkv_vllm.fit.overrides import MISSING, table_path

PACKAGE = Path(__file__).parent.parent / "rkv_vllm"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def named_symbols(package: Path = PACKAGE) -> Iterator[tuple[str, str]]:
    """Yields (our file, vLLM's symbol) of every `@overrides` and `@calls`."""
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            if node.func.id in ("overrides", "calls"):
                file = path.relative_to(package.parent).as_posix()
                yield from ((file, ast.literal_eval(each)) for each in node.args)


class Source:
    """vLLM's source text, in a wheel or in the folder that contains the package `vllm`."""

    def __init__(self, path: Path) -> None:
        self._root = path if path.is_dir() else zipfile.Path(path)
        self._parsed = cache(self._parse)

    def version(self) -> str:
        """Returns the version that the source states."""
        text = (self._root / "vllm" / "_version.py").read_text(encoding="utf-8")
        return re.search(r"^__version__ .*'([^'\n]+)'", text, re.MULTILINE).group(1)

    def describe(self, symbol: str) -> str:
        """Spells the parameters of a function as `overrides.describe` does."""
        module, _, path = symbol.partition(":")
        owner, _, name = path.rpartition(".")
        node = self._method(module, owner, name) if owner else self._define(module, name)[1]
        return _spell(node) if isinstance(node, FUNCTIONS) else MISSING

    def _parse(self, module: str) -> ast.Module:
        folder = module.replace(".", "/")
        for file in (f"{folder}.py", f"{folder}/__init__.py"):
            if (path := self._root / file).is_file():
                return ast.parse(path.read_text(encoding="utf-8"))
        return ast.Module([], [])

    def _define(self, module: str, name: str) -> tuple[str, ast.stmt | None]:
        """Finds where a name of a module is defined, through imports; what is nested comes last."""
        for node in ast.walk(self._parsed(module)):
            if isinstance(node, (ast.ClassDef, *FUNCTIONS)) and node.name == name:
                return module, node
            if isinstance(node, ast.ImportFrom):
                for each in node.names:
                    if name == (each.asname or each.name):
                        return self._define(self._imported(module, node), each.name)
        return module, None

    def _imported(self, module: str, node: ast.ImportFrom) -> str:
        is_package = (self._root / module.replace(".", "/") / "__init__.py").is_file()
        package = module if is_package else module.rpartition(".")[0]
        return importlib.util.resolve_name("." * node.level + (node.module or ""), package)

    def _method(self, module: str, owner: str, name: str) -> ast.stmt | None:
        """Finds a method of a class, its own or an inherited one."""
        module, node = self._define(module, owner)
        for each in getattr(node, "body", ()):
            if isinstance(each, FUNCTIONS) and each.name == name:
                return each
        bases = (
            [each.value if isinstance(each, ast.Subscript) else each for each in node.bases]
            if node
            else ()
        )
        found = (
            self._method(module, each.id, name) for each in bases if isinstance(each, ast.Name)
        )
        return next(filter(None, found), None)


def _spell(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The parameters without types, and "..." for every value."""
    decorators = {ast.unparse(each) for each in node.decorator_list}
    if decorators & {"property", "cached_property"}:
        return "a property"
    given = copy.deepcopy(node.args)
    for each in ast.walk(given):
        if isinstance(each, ast.arg):
            each.annotation = None
    given.defaults = [ast.Constant(...) for _ in given.defaults]
    given.kw_defaults = [each and ast.Constant(...) for each in given.kw_defaults]
    if "classmethod" in decorators:
        del given.args[0]
    return f"({ast.unparse(given)})"


def make_table(source: Source) -> dict[str, str]:
    """Describes every named symbol.

    Raises:
        ValueError: functions that this version lacks.
    """
    symbols = sorted(named_symbols())
    table = {symbol: source.describe(symbol) for _, symbol in symbols}
    if lost := [
        f"{symbol} (needed by {file})" for file, symbol in symbols if table[symbol] == MISSING
    ]:
        raise ValueError("this version of vLLM lacks what our code needs:\n" + "\n".join(lost))
    return dict(sorted(table.items()))


def main() -> None:
    """Writes one table for each wheel or folder named on the command line."""
    for path in map(Path, sys.argv[1:]):
        source = Source(path)
        table = make_table(source)
        table_path(source.version()).write_text(json.dumps(table, indent=1) + "\n")
        print(f"vLLM {source.version()}: {len(table)} functions")


if __name__ == "__main__":
    main()
