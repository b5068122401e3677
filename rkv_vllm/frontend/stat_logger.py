"""Compression's metrics on vLLM's /metrics: named, labelled and merged like vLLM's own.

Every engine step reaches one API server only. Counters and histograms therefore add up what came
in, and Prometheus' files sum them over the processes; gauges show the most recent value. Knows what
arrived, not how it was counted (step_stats.py). Next: discovery.py.
"""

from prometheus_client import Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.v1.metrics.buckets import histogram_buckets
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from rkv_vllm.fit.overrides import check_overrides, overrides
from rkv_vllm.options import CONFIG_KEY, ServerOptions
from rkv_vllm.scheduling.directive import REASONS
from rkv_vllm.scheduling.step_stats import FALLBACKS, StepStats

_LABELS = ("model_name", "engine")


class CompressionStatLogger(AggregateStatLoggerBase):
    """A stat logger beside vLLM's own ones, which stay what they are.

    Attributes:
        families: the metrics by name, without `_total` as usual in prometheus_client; empty until
            the engine is initialised, and for an engine without compression.
    """

    @overrides("vllm.v1.metrics.loggers:AggregateStatLoggerBase.__init__")
    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        self._vllm_config = vllm_config
        self._engine_indexes = engine_indexes
        self.families: dict[str, Counter | Gauge | Histogram] = {}

    @overrides("vllm.v1.metrics.loggers:AggregateStatLoggerBase.log_engine_initialized")
    def log_engine_initialized(self) -> None:
        """Make the metrics; all start at zero.

        Not earlier: vLLM's Prometheus logger, which is made after this one, first clears every
        `vllm:` metric of the process.
        """
        additional = self._vllm_config.additional_config
        if not isinstance(additional, dict) or CONFIG_KEY not in additional:
            return
        # vLLM imports this module after the engine config was checked.
        check_overrides()
        self._make_counters()
        self._make_gauges()
        self._make_histogram()
        server = ServerOptions.from_dict(additional[CONFIG_KEY])
        for engine in self._engine_indexes:
            self._show(StepStats(), engine)
            self._of("first_due_tokens", engine).set(server.least_room)

    @overrides("vllm.v1.metrics.loggers:AggregateStatLoggerBase.record")
    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """Take in what one step of one engine reported."""
        step = None if scheduler_stats is None else StepStats.take_from(scheduler_stats)
        if step is not None and self.families:
            self._show(step, engine_idx)

    def _make_counters(self) -> None:
        self._add(
            Counter,
            "vllm:kv_compression_compactions",
            "Number of compactions: one request's KV cache cut down to its budget; counted once "
            "for each class of layers that has a budget of its own. Reason labels: 'buffer' = its "
            "buffer was full; 'pressure' = the pool ran short; 'prompt' = between the chunks of "
            "its prompt.",
            "reason",
        )
        self._add(
            Counter,
            "vllm:kv_compression_pressure_steps",
            "Number of engine steps in which the pool of blocks ran short, with --kv-when "
            "pressure; in all others nobody is compacted for want of blocks.",
        )
        self._add(
            Counter,
            "vllm:kv_compression_evicted_tokens",
            "Number of tokens evicted from KV caches, counted once for all heads, and for all "
            "layers of one budget.",
        )
        self._add(
            Counter,
            "vllm:kv_compression_freed_blocks",
            "Number of KV-cache blocks that requests hold less of right after their compactions.",
        )
        self._add(
            Counter,
            "vllm:kv_compression_deferred",
            "Number of compactions that became due and had to wait. Reason labels: 'seat' = no "
            "seat in the query ring, or its window is not full yet; 'blocks' = no free block for a "
            "private copy of a shared one.",
            "reason",
        )
        self._add(
            Counter,
            "vllm:kv_compression_looping_requests",
            "Number of requests whose output began to repeat itself after a compaction. Many of "
            "them: too much is evicted.",
        )
        self._add(
            Counter,
            "vllm:kv_compression_swapped_out",
            "Number of preempted requests whose compacted KV cache was copied to host memory.",
        )
        self._add(
            Counter,
            "vllm:kv_compression_swapped_in",
            "Number of preempted requests that went on with the KV cache from host memory.",
        )
        self._add(
            Counter,
            "vllm:kv_compression_recomputed",
            "Number of preempted requests that lost a compacted KV cache although there is a swap "
            "space. Reason labels: 'space' = it was full; 'groups' = the model has layers with a "
            "window or a state; 'prompt_logprobs' = the request wants every prompt token computed; "
            "'reset' = the cache was reset.",
            "reason",
        )

    def _make_gauges(self) -> None:
        for name, documentation in (
            ("logical_tokens", "Tokens that the running requests have computed."),
            ("physical_tokens", "Tokens that the running requests hold in the KV cache."),
            ("seats_in_use", "Seats of the query ring that belong to a request."),
            ("swap_bytes", "Host memory that holds swapped requests, over all ranks, in bytes."),
            (
                "first_due_tokens",
                "Tokens of a request from which on it is compacted, by the server's own options: "
                "where requests stay shorter, nothing is.",
            ),
        ):
            self._add(
                Gauge,
                f"vllm:kv_compression_{name}",
                documentation,
                multiprocess_mode="mostrecent",
            )

    def _make_histogram(self) -> None:
        self._add(
            Histogram,
            "vllm:kv_compression_evicted_tokens_per_compaction",
            "Histogram of tokens evicted by one compaction.",
            buckets=histogram_buckets(
                "request_tokens",
                self._vllm_config.model_config.max_model_len,
                self._vllm_config.observability_config.custom_histogram_buckets,
            ),
        )

    def _add(
        self,
        kind: type[Counter] | type[Gauge] | type[Histogram],
        name: str,
        documentation: str,
        *labels: str,
        **options: object,
    ) -> None:
        self.families[name] = kind(name, documentation, labelnames=(*_LABELS, *labels), **options)

    def _show(self, step: StepStats, engine: int) -> None:
        for reason in REASONS:
            self._of("compactions", engine, reason).inc(step.reasons.get(reason, 0))
        self._of("pressure_steps", engine).inc(step.pressure_steps)
        self._of("evicted_tokens", engine).inc(sum(step.evicted_tokens))
        self._of("freed_blocks", engine).inc(step.freed_blocks)
        self._of("deferred", engine, "seat").inc(step.deferred_for_seat)
        self._of("deferred", engine, "blocks").inc(step.deferred_for_blocks)
        self._of("looping_requests", engine).inc(step.looping_requests)
        self._of("swapped_out", engine).inc(step.swapped_out)
        self._of("swapped_in", engine).inc(step.swapped_in)
        for reason in FALLBACKS:
            self._of("recomputed", engine, reason).inc(step.recomputed.get(reason, 0))
        self._of("swap_bytes", engine).set(step.swap_bytes)
        self._of("logical_tokens", engine).set(step.logical_tokens)
        self._of("physical_tokens", engine).set(step.physical_tokens)
        self._of("seats_in_use", engine).set(step.seats_in_use)
        per_compaction = self._of("evicted_tokens_per_compaction", engine)
        for num_tokens in step.evicted_tokens:
            per_compaction.observe(num_tokens)

    def _of(self, name: str, engine: int, *labels: str) -> Counter | Gauge | Histogram:
        """One series: of this engine, with these further labels."""
        model = self._vllm_config.model_config.served_model_name
        return self.families[f"vllm:kv_compression_{name}"].labels(model, engine, *labels)
