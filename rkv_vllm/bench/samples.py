"""What /metrics of a server says before, during and after a load.

Knows the names of vLLM's metrics and of ours. Engines of data parallelism add up: what is counted
is summed over all labels, the pools of blocks engine by engine. Next: served.py, which decides when
to look.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from prometheus_client.parser import text_string_to_metric_families

from rkv_vllm.bench.server import Server

_COUNTERS = {
    "preemptions": "vllm:num_preemptions_total",
    "compactions": "vllm:kv_compression_compactions_total",
    "deferred": "vllm:kv_compression_deferred_total",
}


@dataclass(frozen=True)
class Scrape:
    """One look at /metrics.

    Attributes:
        values: samples by name, summed over their labels; what is missing is 0.
        pools: blocks that requests can hold, by engine.
        usage: the share of them that requests hold, by engine.
    """

    values: Counter[str]
    pools: Mapping[str, int]
    usage: Mapping[str, float]

    @classmethod
    def of(cls, server: Server) -> "Scrape":
        """Look at a server.

        Raises:
            requests.RequestException: it does not answer.
        """
        return cls.parse(server.ask("GET", "/metrics").text)

    @classmethod
    def parse(cls, text: str) -> "Scrape":
        """Read the text of /metrics."""
        values: Counter[str] = Counter()
        blocks_of_all: dict[str, int] = {}
        usage = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                values[sample.name] += sample.value
                if sample.name == "vllm:cache_config_info":
                    blocks_of_all[sample.labels["engine"]] = int(sample.labels["num_gpu_blocks"])
                elif sample.name == "vllm:kv_cache_usage_perc":
                    usage[sample.labels["engine"]] = sample.value
        # Every engine's series gives the blocks of all engines; each engine keeps one empty.
        pools = {
            engine: blocks // len(blocks_of_all) - 1 for engine, blocks in blocks_of_all.items()
        }
        return cls(values, pools, usage)

    @property
    def running(self) -> float:
        """Requests that are being computed."""
        return self.values["vllm:num_requests_running"]

    @property
    def generated_tokens(self) -> float:
        """Output tokens so far."""
        return self.values["vllm:generation_tokens_total"]

    @property
    def pool_blocks(self) -> int:
        """Blocks that requests can hold, of all engines."""
        return sum(self.pools.values())

    @property
    def held_blocks(self) -> int:
        """Blocks that requests hold, of all engines."""
        return sum(
            round(self.usage.get(engine, 0.0) * blocks) for engine, blocks in self.pools.items()
        )


def counts_of_load(before: Scrape, during: Sequence[Scrape], after: Scrape) -> dict[str, float]:
    """What a load did, as `offline.run` names it; peaks and means are those of the samples."""
    running = [scrape.running for scrape in during if scrape.running > 0]
    return {
        **{name: int(after.values[of] - before.values[of]) for name, of in _COUNTERS.items()},
        "running_mean": mean(running) if running else 0.0,
        "running_peak": int(max(running, default=0)),
        "peak_blocks": max((scrape.held_blocks for scrape in during), default=0),
        "engines": len(after.pools),
        "pool_blocks": after.pool_blocks,
    }
