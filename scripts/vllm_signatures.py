"""Write the signature table of a vLLM version from its source text, nothing imported or installed.

    pip download vllm==0.33.0 --no-deps -d /tmp/wheel
    python scripts/vllm_signatures.py /tmp/wheel/vllm-0.33.0-*.whl

`rkv_vllm/signatures/touched.py` says which symbols go in; `rkv_vllm/signatures/inspected.py`
explains the words of the table and reads the same from an imported vLLM.
"""

import ast
import inspect
import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from rkv_vllm.signatures import table_path
from rkv_vllm.signatures.inspected import MISSING, format_parameters
from rkv_vllm.signatures.touched import TOUCHED

# What a definition may be: a class, a function, a variable, or an import of one of these.
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.stmt
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
PROPERTIES = {"property", "cached_property", "functools.cached_property"}


class Source:
    """vLLM's source text, in a wheel or in the folder that contains the package `vllm`."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir() and not zipfile.is_zipfile(path):
            raise typer.BadParameter(f"got {path}, wanted a wheel or a folder that holds vllm")
        self._root = path if path.is_dir() else zipfile.Path(path)
        self.parse = cache(self._parse)

    def version(self) -> str:
        """The version that the source states."""
        text = self._read("vllm._version") or ""
        if found := re.search(r"^__version__ .*'([^'\n]+)'", text, re.MULTILINE):
            return found.group(1)
        raise typer.BadParameter("got no vllm/_version.py with a version, wanted a vLLM wheel")

    def describe(self, symbol: str) -> str:
        """Describes a symbol, as `inspected.describe` does for an imported vLLM."""
        module, _, path = symbol.partition(":")
        owner, _, name = path.rpartition(".")
        found = self._find(module, owner or name)
        if found is None:
            return MISSING
        module, node = found
        return self._describe_member(module, node, name) if owner else self._describe(module, node)

    def _read(self, module: str) -> str | None:
        folder = module.replace(".", "/")
        for file in (f"{folder}.py", f"{folder}/__init__.py"):
            if (path := self._root / file).is_file():
                return path.read_text(encoding="utf-8")
        return None

    def _parse(self, module: str) -> dict[str, Definition]:
        """The names that a module defines or imports, whatever branch they stand in."""
        text = self._read(module)
        return {} if text is None else _definitions(ast.parse(text).body)

    def _find(self, module: str, name: str) -> tuple[str, Definition] | None:
        """Where a name of a module is defined, through imports."""
        node = self.parse(module).get(name)
        if not isinstance(node, ast.ImportFrom):
            return None if node is None else (module, node)
        original = next(each.name for each in node.names if (each.asname or each.name) == name)
        return self._find(self._imported_module(module, node), original)

    def _imported_module(self, module: str, node: ast.ImportFrom) -> str:
        if node.level == 0:
            return node.module or ""
        parts = module.split(".")
        is_package = (self._root / "/".join(parts) / "__init__.py").is_file()
        base = parts[: len(parts) - node.level + is_package]
        return ".".join([*base, *([node.module] if node.module else [])])

    def _describe(self, module: str, node: Definition) -> str:
        if isinstance(node, FUNCTIONS):
            return _describe_function(node, is_method=False)
        if not isinstance(node, ast.ClassDef):
            return "attribute"
        lineage = list(self._lineage(module, node))
        if not any(_is_dataclass(each) for each in lineage):
            return "class"
        fields: dict[str, None] = {}
        for each in reversed(lineage):
            fields.update(dict.fromkeys(_own_fields(each)))
        return f"fields: {', '.join(fields)}"

    def _describe_member(self, module: str, owner: Definition, name: str) -> str:
        if not isinstance(owner, ast.ClassDef):
            return MISSING
        lineage = list(self._lineage(module, owner))
        for each in lineage:
            node = _definitions(each.body).get(name)
            if isinstance(node, FUNCTIONS):
                return _describe_function(node, is_method=True)
            if node is not None:
                return "attribute"
        return "attribute" if any(name in _assigned(each) for each in lineage) else MISSING

    def _lineage(self, module: str, node: ast.ClassDef) -> Iterator[ast.ClassDef]:
        """The class and its bases within vLLM, nearest first."""
        yield node
        for base in node.bases:
            if isinstance(base, ast.Subscript):
                base = base.value
            found = self._find(module, base.id) if isinstance(base, ast.Name) else None
            if found is not None and isinstance(found[1], ast.ClassDef):
                yield from self._lineage(found[0], found[1])


def _definitions(body: Iterable[ast.stmt]) -> dict[str, Definition]:
    found: dict[str, Definition] = {}
    for node in body:
        if isinstance(node, (ast.ClassDef, *FUNCTIONS)):
            found[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            found.update({each.asname or each.name: node for each in node.names})
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update({each.id: node for each in targets if isinstance(each, ast.Name)})
        elif isinstance(node, (ast.If, ast.Try)):
            # The first branch that defines a name counts.
            for branch in (node.body, node.orelse):
                found = {**_definitions(branch), **found}
    return found


def _describe_function(node: ast.FunctionDef | ast.AsyncFunctionDef, is_method: bool) -> str:
    decorators = {ast.unparse(each) for each in node.decorator_list}
    if decorators & PROPERTIES:
        return "property"
    kind = inspect.Parameter
    given = node.args
    positional = [
        *((each, kind.POSITIONAL_ONLY) for each in given.posonlyargs),
        *((each, kind.POSITIONAL_OR_KEYWORD) for each in given.args),
    ]
    first_default = len(positional) - len(given.defaults)
    parameters = [(each.arg, k, i >= first_default) for i, (each, k) in enumerate(positional)]
    if is_method and "classmethod" in decorators:
        del parameters[0]
    if given.vararg:
        parameters.append((given.vararg.arg, kind.VAR_POSITIONAL, False))
    for each, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        parameters.append((each.arg, kind.KEYWORD_ONLY, default is not None))
    if given.kwarg:
        parameters.append((given.kwarg.arg, kind.VAR_KEYWORD, False))
    return format_parameters(parameters)


def _is_dataclass(node: ast.ClassDef) -> bool:
    # `config` is vLLM's own decorator for the dataclasses of its configuration.
    names = {ast.unparse(each).partition("(")[0] for each in node.decorator_list}
    return not names.isdisjoint({"dataclass", "dataclasses.dataclass", "config"})


def _own_fields(node: ast.ClassDef) -> Iterator[str]:
    for each in node.body:
        if not isinstance(each, ast.AnnAssign) or not isinstance(each.target, ast.Name):
            continue
        if not ast.unparse(each.annotation).startswith(("ClassVar", "typing.ClassVar")):
            yield each.target.id


def _assigned(node: ast.ClassDef) -> set[str]:
    """The attributes that the methods of a class assign to `self`."""
    return {
        each.attr
        for each in ast.walk(node)
        if isinstance(each, ast.Attribute)
        and isinstance(each.ctx, ast.Store)
        and isinstance(each.value, ast.Name)
        and each.value.id == "self"
    }


def make_table(source: Source, progress: bool = False) -> dict[str, str]:
    """Describes every touched symbol.

    Raises:
        ValueError: symbols that this version lacks.
    """
    symbols = sorted(
        {symbol for files in TOUCHED.values() for each in files.values() for symbol in each}
    )
    listed = track(symbols, "reading vLLM") if progress else symbols
    table = {symbol: source.describe(symbol) for symbol in listed}
    if missing := [symbol for symbol, description in table.items() if description == MISSING]:
        raise ValueError("this version of vLLM lacks what our code needs:\n" + "\n".join(missing))
    return table


def main(
    path: Annotated[
        Path,
        typer.Argument(help="Wheel of vLLM, or the folder that holds its package `vllm`."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write (default: the table of that version in the package)."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with 1 if the file differs.")
    ] = False,
) -> None:
    """Write the signature table of one vLLM version.

    Example: python scripts/vllm_signatures.py /tmp/wheel/vllm-0.33.0-*.whl
    """
    source = Source(path)
    version = source.version()
    out = out or table_path(version)
    try:
        symbols = make_table(source, progress=True)
    except ValueError as error:
        typer.echo(f"vLLM {version}: {error}", err=True)
        raise typer.Exit(1) from error
    text = json.dumps({"vllm": version, "symbols": symbols}, indent=1) + "\n"
    if not check:
        out.write_text(text)
    elif not out.is_file() or out.read_text() != text:
        typer.echo(f"{out} does not fit vLLM {version}; run this script without --check", err=True)
        raise typer.Exit(1)
    typer.echo(f"vLLM {version}: {len(symbols)} symbols, {out}")


if __name__ == "__main__":
    typer.run(main)
