"""The numbers on /metrics of a served engine, while 32 clients are busy and when they are done.

What stands on the page and how it is counted is tested in tests/metrics without an engine; one API
server is looked at in test_served.py.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from tests.models import random_prompt
from tests.server import Server, serving

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

OURS = "vllm:kv_compression_"
CLIENTS = 32
SLOTS = 3
FLAGS = (
    "--kv-compression=rkv",
    "--kv-budget=64",
    "--kv-buffer=32",
    f"--kv-observation-slots={SLOTS}",
    "--api-server-count=2",
)
GAUGES = ("logical_tokens", "physical_tokens", "observation_slots_in_use")


@pytest.fixture(scope="module")
def model(random_model_dir) -> Path:
    return random_model_dir("qwen3", 3)


def page(server: Server) -> str:
    answer = requests.get(f"{server.base_url}/metrics", timeout=30)
    answer.raise_for_status()
    return answer.text


def our_samples(server: Server) -> dict[str, float]:
    """Samples of this package by name; those with a reason or a bucket as "name:label".

    There is one engine, so further labels must not tell two samples apart.
    """
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(page(server)):
        for sample in family.samples:
            if sample.name.startswith(OURS):
                labels = dict(sample.labels)
                assert labels.pop("model_name") == server.model
                assert labels.pop("engine") == "0"
                key = ":".join([sample.name.removeprefix(OURS), *labels.values()])
                assert key not in samples
                assert labels.keys() <= {"reason", "le"}
                samples[key] = sample.value
    return samples


def scrapes_during(server: Server) -> Iterator[dict[str, float]]:
    """The page, again and again, while clients with long and short requests are served."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [
            pool.submit(server.complete, random_prompt(5 + 11 * i % 80, seed=i), 60 + 17 * i % 120)
            for i in range(CLIENTS)
        ]
        while not all(client.done() for client in clients):
            yield our_samples(server)
            time.sleep(0.1)
        assert [len(client.result().choices[0].token_ids) for client in clients] == [
            60 + 17 * i % 120 for i in range(CLIENTS)
        ]


def counted_by_workers(server: Server) -> dict[str, int]:
    stats = server.stats()
    names = ("compactions", "evicted_tokens", "freed_blocks", "deferred")
    return {name: stats[name] for name in names}


def counted_on_page(samples: dict[str, float]) -> dict[str, float]:
    return {
        "compactions": samples["compactions_total"],
        "evicted_tokens": samples["evicted_tokens_total"],
        "freed_blocks": samples["freed_blocks_total"],
        "deferred": samples["deferred_total:slot"] + samples["deferred_total:blocks"],
    }


def wait_until_equal(server: Server) -> dict[str, float]:
    """The page when it says what the workers say; the last step may reach it after the clients."""
    deadline = time.monotonic() + 10
    while True:
        samples = our_samples(server)
        if counted_on_page(samples) == counted_by_workers(server) and not samples[GAUGES[0]]:
            return samples
        assert time.monotonic() < deadline, (samples, server.stats())
        time.sleep(0.1)


def test_two_api_servers_show_what_the_workers_did(model):
    with serving(model, *FLAGS) as server:
        assert "Started 2 API server processes" in server.log
        scrapes = [our_samples(server), *scrapes_during(server)]
        last = wait_until_equal(server)
        assert counted_on_page(last)["compactions"] >= CLIENTS

    assert not any(scrapes[0].values())
    assert len(scrapes) > 5
    for earlier, later in zip(scrapes, [*scrapes[1:], last], strict=True):
        assert earlier.keys() == later.keys()
        for name in earlier.keys() - set(GAUGES):
            assert later[name] >= earlier[name], name
    assert len({scrape["compactions_total"] for scrape in scrapes}) > 3

    busy = [scrape for scrape in scrapes if scrape["logical_tokens"]]
    assert all(0 < scrape["physical_tokens"] <= scrape["logical_tokens"] for scrape in busy)
    assert any(scrape["physical_tokens"] < scrape["logical_tokens"] for scrape in busy)
    assert max(scrape["observation_slots_in_use"] for scrape in scrapes) == SLOTS
    assert [last[name] for name in GAUGES] == [0, 0, 0]
    # The pool has room for all, the slots have not.
    assert last["deferred_total:slot"] > 0
    assert last["deferred_total:blocks"] == 0
    assert last["evicted_tokens_per_compaction_count"] == last["compactions_total"]
    assert last["evicted_tokens_per_compaction_sum"] == last["evicted_tokens_total"]
    assert last["evicted_tokens_per_compaction_bucket:+Inf"] == last["compactions_total"]


def test_installed_but_off_the_page_is_as_empty_as_the_user_asked_for(model):
    # Any plugin in vLLM's group for stat loggers would switch statistics on again.
    with serving(model, "--disable-log-stats") as server:
        server.complete(random_prompt(20, seed=0), 10)
        assert "vllm:" not in page(server)
        assert "stat_logger_plugins" not in server.log
