"""What the numbers of a benchmark depend on: machine, versions, environment, command."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rkv_vllm.fit.versions import installed_version

PACKAGE = Path(__file__).resolve().parent.parent
_DISTRIBUTIONS = ("rkv-vllm", "vllm", "torch", "transformers")
# What of a card tells which code ran.
CODE = (*_DISTRIBUTIONS, "commit")
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
    if gpus := printed("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"):
        card["gpu"] = ", ".join(gpus.splitlines())
    card["load_average"] = [round(load, 2) for load in os.getloadavg()]
    card["python"] = platform.python_version()
    for name in _DISTRIBUTIONS:
        card[name] = installed_version(name) or "not installed"
    git = ("git", "-C", str(PACKAGE))
    # Installed packages may lie in somebody else's repository.
    if printed(*git, "ls-files", "__init__.py"):
        card["commit"] = printed(*git, "describe", "--always", "--dirty")
    card["environment"] = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_VARIABLES) and not any(word in name.upper() for word in _SECRETS)
    }
    card["model"] = model
    return card


def cpu_name() -> str:
    """The model of the processor as the system names it."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or "unknown"


def printed(*command: str) -> str:
    """What a program prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
