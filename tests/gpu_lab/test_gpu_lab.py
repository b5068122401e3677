"""The host side of the GPU path on a pretended H100: compilations, waits, captures, launches."""

import json
import re
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.gpu_lab.lab import PYTHON, ROOT, STAMP, environment

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.engine,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not STAMP.is_file(), reason="`make gpu-lab` installs the pretended H100"),
]

GPU_CHECKS = ROOT / "benchmarks" / "gpu"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpu-lab")
    runpy.run_path(str(GPU_CHECKS / "site_folder.py"))["make_site_folder"](folder / "site")
    return folder


def run(scratch: Path, script: str, *args: str, **env: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [PYTHON, GPU_CHECKS / script, *args],
        env=environment(scratch, **env),
        cwd=scratch,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done


@pytest.mark.parametrize(
    ("mode", "backend", "dtype", "replays"),
    [
        # 300 tokens of four requests take 300 steps, the first of which is no decode step.
        ("full", "FLASH_ATTN", "float16", 299),
        # With vLLM's own check that no step waits for the device; it is host code, so it is real.
        ("unsynced", "FLASH_ATTN", "float16", 299),
        ("default", "FLASH_ATTN", "float16", 299),
        # Four layers are five pieces.
        ("piecewise", "FLASH_ATTN", "float16", 5 * 299),
        ("default", "TRITON_ATTN", "float32", 299),
    ],
)
def test_engine_captures_replays_and_never_waits_nor_compiles_in_mid_serving(
    scratch, mode, backend, dtype, replays
):
    result = scratch / f"{mode}-{backend}.json"
    args = ["--mode", mode, "--backend", backend, "--dtype", dtype, "--result", str(result)]
    env = {"VLLM_GPU_SYNC_CHECK": "error"} if mode == "unsynced" else {}
    done = run(scratch, "one_engine.py", *args, "--model", str(scratch / "model"), **env)
    found = json.loads(result.read_text())
    assert found["compactions"] == 36
    assert found["async_scheduling"]
    assert found["graph_replays"] == replays
    assert [len(tokens) for tokens in found["token_ids"]] == [300] * 4
    log = done.stdout + done.stderr
    # The pretended runtime refuses what CUDA refuses during a capture, and says so.
    assert "during capture" not in log
    compiled = set(re.findall(r"JIT compilation during inference: (\w+)", log))
    # vLLM's own, for the log-probabilities that are asked for here.
    assert compiled <= {"_topk_log_softmax_kernel"}


@pytest.fixture(scope="module")
def flushes(scratch) -> dict[str, Any]:
    return json.loads(run(scratch, "host_cost.py").stdout.splitlines()[-1])


def test_flushes_of_any_size_compile_nothing_after_warm_up(flushes):
    assert flushes["compiled_after_warm_up"] == []


def test_requests_that_fit_into_one_call_share_their_launches(flushes):
    launches = flushes["launches"]
    assert launches["flush of 1"] == launches["flush of 8"]
    assert len(launches["flush of 1"]) == MOST_LAUNCHES


# Of one flush; fewer is better, and to be written here.
MOST_LAUNCHES = 6
