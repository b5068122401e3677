"""Counts of a served run from what /metrics said."""

from rkv_vllm.bench.samples import Samples, Scrape

METRICS = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0"}} {running}
vllm:num_requests_running{{engine="1"}} 1.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{{engine="0"}} {usage}
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{{engine="0"}} {preemptions}
# TYPE vllm:generation_tokens counter
vllm:generation_tokens_total{{engine="0"}} {tokens}
# TYPE vllm:kv_compression_compactions counter
vllm:kv_compression_compactions_total{{engine="0"}} {compactions}
# TYPE vllm:kv_compression_deferred counter
vllm:kv_compression_deferred_total{{engine="0",reason="slot"}} {compactions}
vllm:kv_compression_deferred_total{{engine="0",reason="blocks"}} 2.0
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{{block_size="32",num_gpu_blocks="21"}} 1.0
"""


def scrape(running=0.0, usage=0.0, preemptions=0.0, tokens=0.0, compactions=0.0):
    return Scrape.parse(METRICS.format(**locals()))


def test_counters_are_differences_and_gauges_are_means_and_peaks():
    samples = Samples(scrape(preemptions=5, tokens=96, compactions=1))
    samples.add(scrape(running=3, usage=0.5, tokens=100))
    samples.add(scrape(running=1, usage=0.9, tokens=146))
    assert samples.generated_tokens == 50
    assert samples.counts(scrape(preemptions=7, compactions=13)) == {
        "preemptions": 2,
        "compactions": 12,
        "deferred": 12,
        # One of another engine besides.
        "running_mean": 3.0,
        "running_peak": 4,
        "peak_blocks": 18,
        "pool_blocks": 20,
    }


def test_a_server_without_our_metrics_has_compacted_nothing():
    lines = [line for line in METRICS.splitlines() if "kv_compression" not in line]
    text = "\n".join(lines).format(running=2, usage=1.0, preemptions=0, tokens=0) + "\n"
    counts = Samples(Scrape.parse(text)).counts(Scrape.parse(text))
    assert (counts["compactions"], counts["deferred"], counts["running_peak"]) == (0, 0, 0)
