"""Counts of a served run from what /metrics said."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from rkv_vllm.bench.samples import Scrape, counts_of_load
from rkv_vllm.bench.server import Server

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
vllm:cache_config_info{{block_size="32",engine="0",num_gpu_blocks="21"}} 1.0
"""


def scrape(running=0.0, usage=0.0, preemptions=0.0, tokens=0.0, compactions=0.0):
    return Scrape.parse(METRICS.format(**locals()))


def test_counters_are_differences_and_gauges_are_means_and_peaks():
    before, after = scrape(preemptions=5, compactions=1), scrape(preemptions=7, compactions=13)
    during = [scrape(running=3, usage=0.5, tokens=100), scrape(running=1, usage=0.9)]
    assert during[0].generated_tokens == 100
    assert counts_of_load(before, during, after) == {
        "preemptions": 2,
        "compactions": 12,
        "deferred": 12,
        # One of another engine besides.
        "running_mean": 3.0,
        "running_peak": 4,
        "peak_blocks": 18,
        "engines": 1,
        "pool_blocks": 20,
    }


def test_a_server_without_our_metrics_has_compacted_nothing():
    lines = [line for line in METRICS.splitlines() if "kv_compression" not in line]
    text = "\n".join(lines).format(running=2, usage=1.0, preemptions=0, tokens=0) + "\n"
    counts = counts_of_load(Scrape.parse(text), [], Scrape.parse(text))
    assert (counts["compactions"], counts["deferred"], counts["running_peak"]) == (0, 0, 0)


# vLLM's front end adds the blocks of its engines up and says the sum in the name of each.
TWO_ENGINES = """\
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0"} 0.5
vllm:kv_cache_usage_perc{engine="1"} 0.25
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{engine="0",num_gpu_blocks="42"} 1.0
vllm:cache_config_info{engine="1",num_gpu_blocks="42"} 1.0
"""


def test_engines_have_a_pool_each():
    both = Scrape.parse(TWO_ENGINES)
    counts = counts_of_load(both, [both], both)
    assert (counts["engines"], counts["pool_blocks"], counts["peak_blocks"]) == (2, 40, 15)


@pytest.fixture
def server():
    """A server on this machine that answers with `TWO_ENGINES`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(TWO_ENGINES.encode())

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Server(f"http://127.0.0.1:{server.server_port}", None, None)
        server.shutdown()
        thread.join()


def test_the_server_is_asked_without_a_proxy(server, monkeypatch):
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    for name in ("http_proxy", "HTTP_PROXY"):
        # Nobody listens there.
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert Scrape.of(server).pool_blocks == 40
