"""The GPU worker, as far as it goes without a GPU: what it builds, and when it warms up."""

from types import SimpleNamespace

import torch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from rkv_vllm.fit.versions import WORKER_CLS
from rkv_vllm.worker.gpu_worker import CompressionGPUWorker
from rkv_vllm.worker.runner_v2 import CompressionRunnerV2


def new_worker(**attributes) -> CompressionGPUWorker:
    """A worker on which vLLM's own `__init__` has not run: it wants a device."""
    worker = CompressionGPUWorker.__new__(CompressionGPUWorker)
    vars(worker).update(attributes)
    return worker


def test_a_gpu_is_served_by_this_worker():
    path = f"{CompressionGPUWorker.__module__}.{CompressionGPUWorker.__qualname__}"
    assert WORKER_CLS["cuda"] == path


def test_it_builds_the_v2_runner_with_compression(monkeypatch):
    built = []
    monkeypatch.setattr(CompressionRunnerV2, "__init__", lambda self, *args: built.append(args))
    runner = new_worker(vllm_config="config", device="cuda:0")._make_model_runner()
    assert isinstance(runner, CompressionRunnerV2)
    assert isinstance(runner, GPUModelRunner)
    assert built == [("config", "cuda:0")]


def test_compaction_is_compiled_before_vllm_captures_and_watches_for_late_kernels(monkeypatch):
    calls = []

    def warm_up() -> None:
        calls.append(("ours", torch.is_inference_mode_enabled()))

    def warm_up_vllm(worker: Worker) -> str:
        calls.append(("vllm", torch.is_inference_mode_enabled()))
        return "times"

    monkeypatch.setattr(Worker, "compile_or_warm_up_model", warm_up_vllm)
    compactor = SimpleNamespace(warm_up=warm_up)
    worker = new_worker(model_runner=SimpleNamespace(compactor=compactor))
    assert worker.compile_or_warm_up_model() == "times"
    assert calls == [("ours", True), ("vllm", False)]
