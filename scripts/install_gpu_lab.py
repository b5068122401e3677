"""Build `.gpu-lab`: vLLM 0.32.0's GPU wheel over torch's CUDA build, and a pretended H100 for it.

For the nightly tests in tests/gpu_lab; nothing else needs it. Takes 9 GB. Standard library only.
"""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "tests" / "gpu_lab"
LAB = ROOT / ".gpu-lab"
VENV_PYTHON = LAB / "venv" / "bin" / "python"
STAMP = LAB / "ready.stamp"

# Of a GPU machine on which vLLM's wheel was seen to work. The wheel itself asks for another torch.
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "triton==3.6.0")
VLLM = "vllm==0.32.0"
LOCK = ROOT / "requirements" / "cpu.lock"
LIBRARIES = {
    "libfakert.so": ("cudart.cpp", "cublas.cpp"),
    "libcuda.so.1": ("cuda.cpp",),
    "libnvidia-ml.so.1": ("nvml.cpp",),
}


def main() -> None:
    """Bring `.gpu-lab` up to date, or say that it is."""
    inputs = [Path(__file__), LOCK, *sorted(SOURCES.glob("*.[ch]*"))]
    stamp = hashlib.sha256(b"".join(path.read_bytes() for path in inputs)).hexdigest()
    if STAMP.is_file() and STAMP.read_text() == stamp:
        print(f"{LAB.name} is up to date")
        return
    LAB.mkdir(exist_ok=True)
    STAMP.unlink(missing_ok=True)
    others = LAB / "requirements.txt"
    lines = LOCK.read_text().splitlines()
    others.write_text("\n".join(line for line in lines if not line.startswith("triton==")))
    pip = [str(VENV_PYTHON), "-m", "pip", "install", "--disable-pip-version-check"]
    pip += ["--no-compile", "--quiet"]
    started = time.monotonic()
    steps = [
        ("virtual environment", [sys.executable, "-m", "venv", str(LAB / "venv")]),
        ("torch's CUDA build", [*pip, *TORCH]),
        ("requirements", [*pip, "--no-deps", "-r", str(others)]),
        (VLLM, [*pip, "--no-deps", VLLM]),
        *((name, compile_command(name)) for name in LIBRARIES),
    ]
    for number, (title, command) in enumerate(steps, start=1):
        print(f"[{number}/{len(steps)}] {title} ({time.monotonic() - started:.0f} s)", flush=True)
        subprocess.run(command, check=True, cwd=ROOT)
    (LAB / "libcuda.so").unlink(missing_ok=True)
    (LAB / "libcuda.so").symlink_to("libcuda.so.1")
    STAMP.write_text(stamp)
    print(f"{LAB.name} is ready after {time.monotonic() - started:.0f} s")


def compile_command(library: str) -> list[str]:
    """How one of the pretended libraries is made."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    packages = LAB / "venv" / "lib" / version / "site-packages"
    # The headers of torch's CUDA, whose folder crt is in another wheel; Triton's has an older one.
    headers = [packages / "nvidia" / "cu13", packages / "triton" / "backends" / "nvidia"]
    includes = [f"-I{folder / 'include'}" for folder in headers]
    sources = [str(SOURCES / name) for name in LIBRARIES[library]]
    flags = ["-O1", "-std=c++17", "-shared", "-fPIC", *includes]
    return ["g++", *flags, "-o", str(LAB / library), *sources, "-ldl"]


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"failed with exit code {error.returncode}: {' '.join(error.cmd)}")
