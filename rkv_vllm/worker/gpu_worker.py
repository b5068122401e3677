"""vLLM's GPU worker with compaction (`worker_cls` of the engine).

Next: runner_v2.py.
"""

from typing import Any

import torch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from rkv_vllm.fit.overrides import overrides
from rkv_vllm.worker.rpc import CompressionRPC
from rkv_vllm.worker.runner import compression_runner
from rkv_vllm.worker.runner_v2 import CompressionRunnerV2


class CompressionGPUWorker(CompressionRPC, Worker):
    """GPU worker whose model runner compacts."""

    @overrides("vllm.v1.worker.gpu_worker:Worker._make_model_runner")
    def _make_model_runner(self) -> Any:
        # A V1 runner on a GPU is refused before the engine starts (fit/refusals.py).
        runner_class = compression_runner(CompressionRunnerV2, GPUModelRunner)
        return runner_class(self.vllm_config, self.device)

    @overrides("vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model")
    def compile_or_warm_up_model(self) -> Any:
        """Compile the kernels of a compaction too, before vLLM starts to watch for late ones."""
        with torch.inference_mode():
            self.model_runner.compactor.warm_up()
        return super().compile_or_warm_up_model()
