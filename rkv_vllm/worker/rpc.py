"""What every worker with compaction adds to vLLM's: answers to `collective_rpc`, and its sleep.

Next: runner.py.
"""

from rkv_vllm.fit.overrides import overrides
from rkv_vllm.worker.runner import CompressionRunner


class CompressionRPC:
    """Requests to a worker; to be mixed in first."""

    model_runner: CompressionRunner

    @overrides(
        "vllm.v1.worker.cpu_worker:CPUWorker.sleep",
        "vllm.v1.worker.gpu_worker:Worker.sleep",
    )
    def sleep(self, level: int = 1) -> None:
        """Carry out what is pending while there is a cache."""
        self.model_runner.flush_compaction()
        super().sleep(level)

    @overrides(
        "vllm.v1.worker.cpu_worker:CPUWorker.wake_up",
        "vllm.v1.worker.gpu_worker:Worker.wake_up",
    )
    def wake_up(self, tags: list[str] | None = None) -> None:
        """Wake up with nobody watched."""
        super().wake_up(tags)
        if tags is None or "weights" in tags:
            self.model_runner.forget_windows()

    def kv_compression_stats(self) -> dict[str, int]:
        """Counters of this worker; pending compactions are carried out first."""
        self.model_runner.flush_compaction()
        return self.model_runner.compactor.stats()

    def kv_compression_requests(self) -> list[dict[str, int | str]]:
        """Lengths and blocks of the live and the last finished requests.

        Of several ranks the last one is up to date: an earlier pipeline stage learns a token only
        with the next step.
        """
        return self.model_runner.request_reports()
