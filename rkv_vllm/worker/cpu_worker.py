"""vLLM's CPU worker with compaction (`worker_cls` of the engine).

Next: runner_v1.py.
"""

from vllm.v1.worker.cpu_worker import CPUWorker

from rkv_vllm.fit.overrides import overrides
from rkv_vllm.worker.rpc import CompressionRPC
from rkv_vllm.worker.runner import compression_runner
from rkv_vllm.worker.runner_v1 import CompressionRunnerV1


class CompressionCPUWorker(CompressionRPC, CPUWorker):
    """CPUWorker whose model runner compacts."""

    @overrides("vllm.v1.worker.cpu_worker:CPUWorker.init_device")
    def init_device(self) -> None:
        """Build vLLM's model runner, then ours in its place."""
        super().init_device()
        # CPUWorker constructs its runner inline, where no method can be overridden; up to here that
        # runner has loaded nothing.
        mixin = CompressionRunnerV1
        if self.use_v2_model_runner:
            # Needs Triton, which a CPU build of vLLM may lack.
            from rkv_vllm.worker.runner_v2 import CompressionRunnerV2 as mixin
        runner_class = compression_runner(mixin, type(self.model_runner))
        self.model_runner = runner_class(self.vllm_config, self.device)
