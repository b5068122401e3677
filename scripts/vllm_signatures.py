"""Write the tables of vLLM versions from their source text, nothing imported.

    python scripts/vllm_signatures.py .venv/lib/python3*/site-packages .next/vllm-0.33.0.tar.gz

reads wheels, sdists, zip files of either and installed packages, and writes two tables for each:
parameters of the functions that ours stand in for (`rkv_vllm/fit/vllm-0.32.json`, which
`overrides.py` compares with an imported vLLM), and hashes of the code of these and of the watched
ones (`code-0.32.0.json`, for `code_table.py`). Run it for every supported version whenever a
function of ours gets or loses an `@overrides` or `@calls`, or `watched.py` changes: tests say so.
docs/versions.md tells the whole way to a new release.
"""

import argparse
import ast
import json
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rkv_vllm.fit import code_table
from rkv_vllm.fit.overrides import MISSING, table_path
from rkv_vllm.fit.source import Source
from rkv_vllm.fit.watched import WATCHED_SYMBOLS

PACKAGE = Path(__file__).parent.parent / "rkv_vllm"


def named_symbols(package: Path = PACKAGE) -> Iterator[tuple[str, str]]:
    """Yields (our file, vLLM's symbol) of every `@overrides` and `@calls`."""
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            if node.func.id in ("overrides", "calls"):
                file = path.relative_to(package.parent).as_posix()
                yield from ((file, ast.literal_eval(each)) for each in node.args)


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


def make_code_table(source: Source) -> dict[str, str]:
    """Hashes the code of every named and every watched symbol."""
    symbols = {symbol for _, symbol in named_symbols()} | set(WATCHED_SYMBOLS)
    return {symbol: source.code_hash(symbol) for symbol in sorted(symbols)}


@contextmanager
def opened(path: Path) -> Iterator[Source]:
    """Opens a wheel, a zip file or a folder with the package, or an sdist, as tar or unpacked."""
    if path.suffixes[-2:] != [".tar", ".gz"]:
        yield Source(path)
        return
    with tempfile.TemporaryDirectory() as folder, tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")
        (root,) = Path(folder).iterdir()
        yield Source(root)


def main() -> None:
    """Writes the tables of each version named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vllm", type=Path, nargs="+", help="wheel, sdist, zip, or site-packages")
    for path in parser.parse_args().vllm:
        if not path.exists():
            parser.error(f"{path}: not found, wanted a wheel, an sdist, a zip file or a folder")
        with opened(path) as source:
            version = source.version()
            signatures, code = make_table(source), make_code_table(source)
        table_path(version).write_text(json.dumps(signatures, indent=1) + "\n")
        code_table.table_path(version).write_text(json.dumps(code, indent=1) + "\n")
        print(f"vLLM {version}: {len(signatures)} functions, code of {len(code)}")


if __name__ == "__main__":
    main()
