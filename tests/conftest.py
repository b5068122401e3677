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
# vLLM looks n-grams up by a function that takes Numba longer to compile than these texts to search.
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Triton's interpreter and the stub in tests/triton_stub let this process run the V2 model runner.
# Engines get it on demand only (fixture `runner`). Children do not: they find no stub.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

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


class Runner(NamedTuple):
    """One of vLLM's model runners, and how its engine schedules.

    Attributes:
        name: "v1", "v2" or "v2-async".
        use_v2: whether it is the V2 runner, here under Triton's interpreter.
        unprocessed_steps: steps whose output the scheduler has not seen when it plans the next.
    """

    name: str
    use_v2: bool
    unprocessed_steps: int


RUNNERS = {
    runner.name: runner
    for runner in (Runner("v1", False, 0), Runner("v2", True, 0), Runner("v2-async", True, 1))
}


@pytest.fixture
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Makes the engines of a test use one model runner: parametrise it indirectly by name."""
    from vllm.platforms import current_platform

    chosen = RUNNERS[request.param]
    if current_platform.is_cuda():
        # The only one there that compression knows.
        chosen = chosen._replace(use_v2=True)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(chosen.use_v2)))
    if chosen.unprocessed_steps:
        _schedule_asynchronously(monkeypatch)
    return chosen


def _schedule_asynchronously(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what vLLM's CPU platform forces off; the V2 runner itself knows no difference."""
    from vllm.platforms import current_platform

    from tests.engine import GPU_OPTIONS

    if current_platform.is_cuda():
        monkeypatch.setitem(GPU_OPTIONS, "async_scheduling", True)
        return
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def check_all_but_this(cls, vllm_config) -> None:
        wanted = vllm_config.scheduler_config.async_scheduling
        check(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(check_all_but_this))
