"""What `collective_rpc` can ask every worker with compaction.

Next: runner.py.
"""

from rkv_vllm.worker.runner import CompressionRunner


class CompressionRPC:
    """Questions to a worker; to be mixed in first."""

    model_runner: CompressionRunner

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
