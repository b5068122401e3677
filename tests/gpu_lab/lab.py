"""How to start a program on the pretended H100 of .gpu-lab."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LAB = ROOT / ".gpu-lab"
PYTHON = LAB / "venv" / "bin" / "python"
STAMP = LAB / "ready.stamp"


def environment(scratch: Path, **more: str) -> dict[str, str]:
    """Variables of a process that is to see the pretended device.

    Args:
        scratch: folder for caches.
        more: further variables.
    """
    started_by = Path(__file__).resolve().parent / "startup"
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    paths = ("TRITON_CACHE_DIR", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR")
    return {
        **kept,
        "PYTHONPATH": f"{started_by}:{scratch / 'site'}",
        "LD_LIBRARY_PATH": str(LAB),
        "LD_PRELOAD": str(LAB / "libfakert.so"),
        "TRITON_LIBCUDA_PATH": str(LAB),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **{name: str(scratch / name.lower()) for name in paths},
        **more,
    }
