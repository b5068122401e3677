"""What all tests share: vLLM in this process, on one thread, and the random models."""

import os

# Read by vLLM and OpenMP when they are first imported. The models of the tests are so small that
# threads spend their time waiting for each other.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# By default every engine of a machine binds itself to the same first core.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# A failure in CI must be the failure of everybody who runs the same commit.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(scope="session")
def random_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a random model once per session and set of arguments."""
    from tests.models import random_model

    made: dict[tuple, Path] = {}

    def make(family: str = "qwen3", group: int = 3, **arguments: int) -> Path:
        key = (family, group, *sorted(arguments.items()))
        if key not in made:
            directory = tmp_path_factory.mktemp(f"{family}-{group}")
            made[key] = random_model(
                directory, family, num_kv_heads=2, num_heads=2 * group, **arguments
            )
        return made[key]

    return make
