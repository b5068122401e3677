"""Which vLLM and which platform this release runs on, and the classes it gives to vLLM by name.

Knows no features (refusals.py) and no functions (overrides.py).
"""

from importlib.metadata import PackageNotFoundError, version

SUPPORTED_VLLM = ">=0.32.0,<0.34"
# A factory: vLLM calls whatever this names, and it picks the scheduler that fits the config.
SCHEDULER_CLS = "rkv_vllm.scheduling.scheduler.make_scheduler"
# Name of vLLM's platform -> worker class.
WORKER_CLS = {
    "cpu": "rkv_vllm.worker.cpu_worker.CompressionCPUWorker",
    "cuda": "rkv_vllm.worker.gpu_worker.CompressionGPUWorker",
}


def installed_version(distribution: str) -> str | None:
    """Returns the version of a distribution, None where it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def check_vllm_version() -> None:
    """Raises ValueError unless the installed vLLM lies in `SUPPORTED_VLLM`."""
    import vllm
    from packaging.specifiers import SpecifierSet

    if not SpecifierSet(SUPPORTED_VLLM).contains(vllm.__version__, prereleases=True):
        raise ValueError(
            f"KV cache compression is not tested with this vLLM: got {vllm.__version__}, "
            f'wanted {SUPPORTED_VLLM}; run: pip install "vllm{SUPPORTED_VLLM}"'
        )


def platform_worker_cls() -> str:
    """Returns the worker class for the platform that vLLM runs on.

    Raises:
        ValueError: a platform without such a class.
    """
    from vllm.platforms import current_platform

    # Not the device type: ROCm calls its own "cuda".
    platform = current_platform.device_name
    if platform not in WORKER_CLS:
        raise ValueError(
            f"KV cache compression has no worker for this platform: got {platform!r}, wanted "
            f"one of {', '.join(WORKER_CLS)}; use a vLLM built for one of these"
        )
    return WORKER_CLS[platform]
