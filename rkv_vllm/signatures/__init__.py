"""Compares the vLLM functions this package rests upon with a table kept for each vLLM version.

A plugin that overrides functions breaks quietly when their parameters change. So every process
compares what it is about to use, before a model is loaded, with the table of the installed minor
version (`vllm-0.32.json` and so on). The tables are made by `scripts/vllm_signatures.py` from a
wheel; `touched.py` says what belongs in them, `inspected.py` how an entry is read at run time.
"""

import json
from pathlib import Path

from rkv_vllm.signatures.touched import TOUCHED, Part

__all__ = ["Part", "check_signatures", "load_table", "table_path"]


def table_path(version: str) -> Path:
    """Returns where the table for a vLLM version lies; patch releases share one.

    Args:
        version: as vLLM states it, e.g. "0.32.0" or "0.32.1+cpu".
    """
    from packaging.version import Version

    release = Version(version)
    return Path(__file__).with_name(f"vllm-{release.major}.{release.minor}.json")


def load_table(version: str) -> dict[str, str]:
    """Returns symbol -> description for a vLLM version.

    Raises:
        ValueError: no table for this version.
    """
    path = table_path(version)
    if not path.is_file():
        known = sorted(found.stem.removeprefix("vllm-") for found in path.parent.glob("*.json"))
        raise ValueError(
            f"KV cache compression has no signature table for this vLLM: got {version}, wanted "
            f'one of {", ".join(known)}; run: pip install "vllm=={known[-1]}.*"'
        )
    return json.loads(path.read_text())["symbols"]


def check_signatures(part: Part) -> None:
    """Raises ValueError when a vLLM symbol is not what our code was written against.

    Imports only what the calling process is about to use anyway.

    Args:
        part: which of our code is about to run in this process.
    """
    import vllm

    from rkv_vllm.signatures.inspected import describe

    table = load_table(vllm.__version__)
    found = [
        f"{symbol} (needed by rkv_vllm/{file}): got {got}, wanted {table[symbol]}"
        for file, symbols in TOUCHED[part].items()
        for symbol in symbols
        if (got := describe(symbol)) != table[symbol]
    ]
    if found:
        raise ValueError(
            f"KV cache compression does not fit this build of vLLM {vllm.__version__}; install an "
            "unchanged release, update rkv-vllm, remove the plugin that replaces the function, or "
            "serve without --kv-compression:\n" + "\n".join(found)
        )
