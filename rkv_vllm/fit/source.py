"""vLLM's functions as its source text has them, nothing imported."""

import ast
import copy
import importlib.util
import re
import zipfile
from functools import cache
from pathlib import Path

from rkv_vllm.fit.code_hash import FUNCTIONS, code_hash
from rkv_vllm.fit.overrides import MISSING


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
        node = self._find(symbol)
        return _spell(node) if isinstance(node, FUNCTIONS) else MISSING

    def code_hash(self, symbol: str) -> str:
        """Hashes what a function or a class does; `MISSING` where there is none."""
        node = self._find(symbol)
        return MISSING if node is None else code_hash(node)

    def _find(self, symbol: str) -> ast.stmt | None:
        module, _, path = symbol.partition(":")
        owner, _, name = path.rpartition(".")
        return self._method(module, owner, name) if owner else self._define(module, name)[1]

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
