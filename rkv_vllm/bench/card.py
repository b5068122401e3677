"""What the numbers of a benchmark depend on: machine, versions, environment, command."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rkv_vllm.fit.versions import installed_version

PACKAGE = Path(__file__).resolve().parent.parent
_DISTRIBUTIONS = ("rkv-vllm", "vllm", "torch", "transformers")
_VARIABLES = ("OMP_", "VLLM_", "CUDA_VISIBLE_DEVICES")
# In the names of variables whose values nobody wants in a published result.
_SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD")


def make_card(model: str) -> dict[str, Any]:
    """Returns the card, plain JSON.

    Args:
        model: folder or hub id.
    """
    card: dict[str, Any] = {
        "command": shlex.join(["rkv-vllm", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": f"{os.cpu_count()} x {cpu_name()}",
    }
    if gpus := _gpu_names():
        card["gpu"] = ", ".join(gpus)
    card["load_average"] = [round(load, 2) for load in os.getloadavg()]
    card["python"] = platform.python_version()
    for name in _DISTRIBUTIONS:
        card[name] = installed_version(name) or "not installed"
    if commit := _commit():
        card["commit"] = commit
    card["environment"] = {
        name: value for name, value in sorted(os.environ.items()) if _is_shown(name)
    }
    card["model"] = model
    return card


def _is_shown(variable: str) -> bool:
    is_secret = any(word in variable.upper() for word in _SECRETS)
    return variable.startswith(_VARIABLES) and not is_secret


def cpu_name() -> str:
    """The model of the processor as the system names it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or "unknown"


def _gpu_names() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    return _printed("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()


def _commit() -> str:
    """The commit of this package, empty where it does not lie in a git repository of its own."""
    if shutil.which("git") is None:
        return ""
    git = ("git", "-C", str(PACKAGE))
    # Installed packages may lie in somebody else's repository.
    if not _printed(*git, "ls-files", "__init__.py"):
        return ""
    return _printed(*git, "describe", "--always", "--dirty")


def _printed(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""
