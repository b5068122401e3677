"""What /metrics of a server says before, during and after a load.

Knows the names of vLLM's metrics and of ours; sums every metric over its labels, so engines of data
parallelism add up. Next: served.py, which decides when to look.
"""

from collections import Counter
from dataclasses import dataclass, field
from statistics import mean

import requests
from prometheus_client.parser import text_string_to_metric_families

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
        pool_blocks: blocks that requests can hold, of all engines.
    """

    values: Counter[str]
    pool_blocks: int

    @classmethod
    def of(cls, url: str) -> "Scrape":
        """Look at a server.

        Raises:
            requests.RequestException: it does not answer.
        """
        answer = requests.get(f"{url}/metrics", timeout=60)
        answer.raise_for_status()
        return cls.parse(answer.text)

    @classmethod
    def parse(cls, text: str) -> "Scrape":
        """Read the text of /metrics."""
        values: Counter[str] = Counter()
        pool_blocks = 0
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                values[sample.name] += sample.value
                if sample.name == "vllm:cache_config_info":
                    # vLLM keeps one block empty.
                    pool_blocks += int(sample.labels["num_gpu_blocks"]) - 1
        return cls(values, pool_blocks)

    @property
    def running(self) -> float:
        """Requests that are being computed."""
        return self.values["vllm:num_requests_running"]

    @property
    def generated_tokens(self) -> float:
        """Output tokens so far."""
        return self.values["vllm:generation_tokens_total"]

    @property
    def held_blocks(self) -> int:
        """Blocks that requests hold."""
        return round(self.values["vllm:kv_cache_usage_perc"] * self.pool_blocks)


@dataclass
class Samples:
    """Looks at one load.

    Attributes:
        before: the state when it began.
        during: the states since.
    """

    before: Scrape
    during: list[Scrape] = field(default_factory=list)

    def add(self, scrape: Scrape) -> None:
        """Take one more look in."""
        self.during.append(scrape)

    @property
    def generated_tokens(self) -> float:
        """Output tokens of this load so far."""
        last = self.during[-1] if self.during else self.before
        return last.generated_tokens - self.before.generated_tokens

    def counts(self, after: Scrape) -> dict[str, float | int]:
        """What the load did, as `offline_side.run` names it.

        Args:
            after: the state when all requests had ended.
        """
        running = [scrape.running for scrape in self.during if scrape.running > 0]
        counters = {
            name: int(after.values[metric] - self.before.values[metric])
            for name, metric in _COUNTERS.items()
        }
        return {
            **counters,
            "running_mean": mean(running) if running else 0.0,
            "running_peak": int(max(running, default=0)),
            "peak_blocks": max((scrape.held_blocks for scrape in self.during), default=0),
            "pool_blocks": after.pool_blocks,
        }
