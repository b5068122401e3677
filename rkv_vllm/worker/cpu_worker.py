"""vLLM's CPU worker with compaction (`worker_cls` of the engine).

Next: runner_v1.py.
"""

from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from rkv_vllm.worker.runner_v1 import CompressionCPURunner


class CompressionCPUWorker(CPUWorker):
    """CPUWorker whose model runner compacts."""

    def init_device(self) -> None:
        """Build vLLM's model runner, then exchange its class.

        CPUWorker constructs its runner inline; exchanging the class of the instance replaces no
        vLLM symbol.

        Raises:
            ValueError: the runner is not the V1 CPU runner.
        """
        super().init_device()
        if type(self.model_runner) is not CPUModelRunner:
            raise ValueError(
                "KV cache compression expected vLLM's V1 CPU model runner, got "
                f"{type(self.model_runner).__qualname__}; set VLLM_USE_V2_MODEL_RUNNER=0"
            )
        self.model_runner.__class__ = CompressionCPURunner
        self.model_runner.init_compression()

    def kv_compression_stats(self) -> dict[str, int]:
        """Counters of this worker; pending compactions are carried out first."""
        self.model_runner.flush_compaction()
        return self.model_runner.compactor.stats()

    def kv_compression_requests(self) -> list[dict[str, int | str]]:
        """Lengths and blocks of the live and the last finished requests."""
        return self.model_runner.request_reports()
