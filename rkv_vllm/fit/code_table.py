"""Compares the code of vLLM's functions with that of the release we were tested with.

`overrides.py` sees changed parameters and refuses; most changes keep them. So a hash of the code of
each function that we override, call or watch (`watched.py`) lies in `code-0.32.0.json` and so on,
and a release without such a file is compared with the nearest one of its minor version that has
one: what differs is a warning. Releases with a file cost nothing.
"""

import functools
import json
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from packaging.version import Version

from rkv_vllm.fit.source import Source
from rkv_vllm.log import init_logger

FOLDER = Path(__file__).parent


class Comparison(NamedTuple):
    """What came of comparing the installed vLLM with a release.

    Attributes:
        release: with a table, of the same minor version.
        num_functions: that were compared.
        changed: symbols of functions that have other code there, or are missing on one side.
    """

    release: str
    num_functions: int
    changed: tuple[str, ...]


def table_path(release: str) -> Path:
    """Returns where the hashes of a release lie, local parts of its version left out."""
    return FOLDER / f"code-{Version(release).public}.json"


def warn_of_changed_code() -> None:
    """Logs which functions a release without a table has changed, once per process."""
    import vllm

    if table_path(vllm.__version__).is_file():
        return
    compared = compare(vllm.__version__)
    if compared is not None and compared.changed:
        init_logger(__name__).warning_once("%s", describe(compared), scope="process")


def describe(compared: Comparison) -> str:
    """Says what has changed, and what to do about it."""
    import vllm

    return (
        f"vLLM {vllm.__version__}: {len(compared.changed)} of {compared.num_functions} functions "
        f"that KV cache compression rests on have other code than in {compared.release}, with "
        f"which it was tested: {', '.join(compared.changed)}. Their parameters fit, so it starts. "
        "Before you serve, run the tests of rkv-vllm with this vLLM (docs/versions.md), or "
        f'run: pip install "vllm=={compared.release}"'
    )


@functools.cache
def compare(version: str) -> Comparison | None:
    """Compares the source text of the installed vLLM with the nearest release that has a table.

    Takes as long as parsing some 40 of vLLM's files: about half a second.

    Args:
        version: of the installed vLLM, as it states it.

    Returns:
        None where no release of its minor version has a table.
    """
    wanted = Version(version)
    releases = [Version(path.stem.removeprefix("code-")) for path in FOLDER.glob("code-*.json")]
    near = [each for each in releases if each.release[:2] == wanted.release[:2]]
    if not near:
        return None
    older = [each for each in near if each <= wanted]
    release = max(older) if older else min(near)
    table = json.loads(table_path(str(release)).read_text())
    (folder,) = find_spec("vllm").submodule_search_locations
    source = Source(Path(folder).parent)
    changed = tuple(symbol for symbol, code in table.items() if source.code_hash(symbol) != code)
    return Comparison(str(release), len(table), changed)
