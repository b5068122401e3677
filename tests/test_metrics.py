"""The numbers on /metrics of a served engine, while 32 clients are busy and when they are done.

What stands on the page and how it is counted is tested in tests/metrics without an engine; one API
server is looked at in test_served.py.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
import requests
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.parser import text_string_to_metric_families

from tests.models import random_prompt
from tests.server import Server, serving

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

OURS = "vllm:kv_compression_"
CLIENTS = 32
# Different numbers of compactions that the onlooker waits for, and how long.
CHANGES_SEEN = 6
SCRAPE_SECONDS = 120
SLOTS = 3
FLAGS = (
    "--kv-compression=rkv",
    "--kv-budget=64",
    "--kv-buffer=32",
    f"--kv-observation-slots={SLOTS}",
    "--api-server-count=2",
)
GAUGES = ("logical_tokens", "physical_tokens", "seats_in_use")
# Kept of vLLM's own gauges, to see that the clients are served together.
IN_FLIGHT = ("vllm:num_requests_running", "vllm:num_requests_waiting")


@pytest.fixture(scope="module")
def model(random_model_dir) -> Path:
    return random_model_dir("qwen3", 3)


def page(server: Server) -> str:
    answer = requests.get(f"{server.base_url}/metrics", timeout=30)
    answer.raise_for_status()
    return answer.text


def our_samples(server: Server) -> dict[str, float]:
    """Samples of this package by name, those with a reason or a bucket as "name:label"; IN_FLIGHT.

    There is one engine, so further labels must not tell two samples apart.
    """
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(page(server)):
        for sample in family.samples:
            if sample.name.startswith(OURS) or sample.name in IN_FLIGHT:
                labels = dict(sample.labels)
                assert labels.pop("model_name") == server.model
                assert labels.pop("engine") == "0"
                key = ":".join([sample.name.removeprefix(OURS), *labels.values()])
                assert key not in samples
                assert labels.keys() <= {"reason", "le"}
                samples[key] = sample.value
    return samples


def scrapes_during(server: Server) -> list[dict[str, float]]:
    """The page, again and again, while clients with long and short requests are served."""
    scrapes: list[dict[str, float]] = []
    seen_enough, deadline = Event(), time.monotonic() + SCRAPE_SECONDS
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(keep_asking, server, i, seen_enough) for i in range(CLIENTS)]
        try:
            # On a busy machine one look takes as long as many steps.
            while not has_seen_enough(scrapes):
                assert time.monotonic() < deadline, scrapes
                for client in filter(Future.done, clients):
                    client.result()
                scrapes.append(our_samples(server))
                time.sleep(0.1)
        finally:
            seen_enough.set()
        for client in clients:
            client.result()
    return scrapes


def has_seen_enough(scrapes: list[dict[str, float]]) -> bool:
    """Whether the page was looked at often enough, and at a moment when all seats were taken."""
    changes = {scrape["compactions_total:buffer"] for scrape in scrapes}
    peak = max((scrape["seats_in_use"] for scrape in scrapes), default=0)
    crowd = max((in_flight(scrape) for scrape in scrapes), default=0)
    return len(changes) >= CHANGES_SEEN and peak >= SLOTS and crowd > CLIENTS / 2


def in_flight(scrape: dict[str, float]) -> float:
    return sum(scrape.get(name, 0) for name in IN_FLIGHT)


def keep_asking(server: Server, client: int, seen_enough: Event) -> None:
    """One client: a request of its own length, once more until everything was seen."""
    prompt, num_tokens = random_prompt(5 + 11 * client % 80, seed=client), 60 + 17 * client % 120
    while True:
        response = server.complete(prompt, num_tokens)
        assert len(response.choices[0].token_ids) == num_tokens
        if seen_enough.is_set():
            break


def counted_by_workers(server: Server) -> dict[str, int]:
    stats = server.stats()
    names = ("compactions", "evicted_tokens", "freed_blocks", "deferred")
    return {name: stats[name] for name in names}


def counted_on_page(samples: dict[str, float]) -> dict[str, float]:
    return {
        "compactions": samples["compactions_total:buffer"],
        "evicted_tokens": samples["evicted_tokens_total"],
        "freed_blocks": samples["freed_blocks_total"],
        "deferred": samples["deferred_total:seat"] + samples["deferred_total:blocks"],
    }


def compactions_by_process(directory: Path) -> list[float]:
    """What each API server process wrote into its own file, zeros left out."""
    counts = []
    for file in directory.glob("counter_*.db"):
        values = MmapedDict.read_all_values_from_file(str(file))
        counts.append(sum(value for key, value, *_ in values if f"{OURS}compactions_total" in key))
    return [count for count in counts if count]


def wait_until_equal(server: Server) -> dict[str, float]:
    """The page when it says what the workers say; the last step may reach it after the clients."""
    deadline = time.monotonic() + 10
    while True:
        samples = our_samples(server)
        if counted_on_page(samples) == counted_by_workers(server) and not samples[GAUGES[0]]:
            return samples
        assert time.monotonic() < deadline, (samples, server.stats())
        time.sleep(0.1)


@pytest.mark.nightly
def test_two_api_servers_show_what_the_workers_did(model, tmp_path):
    with serving(model, *FLAGS, env={"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}) as server:
        assert "Started 2 API server processes" in server.log
        scrapes = [our_samples(server), *scrapes_during(server)]
        last = wait_until_equal(server)
        assert counted_on_page(last)["compactions"] >= CLIENTS
        parts = compactions_by_process(tmp_path)

    # A step is reported to one of the two.
    assert len(parts) == 2
    assert sum(parts) == last["compactions_total:buffer"]
    first_due = {name: value for name, value in scrapes[0].items() if value}
    assert first_due.keys() == {"first_due_tokens"}
    for earlier, later in zip(scrapes, [*scrapes[1:], last], strict=True):
        # vLLM's own gauges are not there before the first step.
        assert earlier.keys() ^ later.keys() <= set(IN_FLIGHT)
        for name in earlier.keys() - {*GAUGES, *IN_FLIGHT}:
            assert later[name] >= earlier[name], name
    assert max(map(in_flight, scrapes)) > CLIENTS / 2

    busy = [scrape for scrape in scrapes if scrape["logical_tokens"]]
    assert all(0 < scrape["physical_tokens"] <= scrape["logical_tokens"] for scrape in busy)
    assert any(scrape["physical_tokens"] < scrape["logical_tokens"] for scrape in busy)
    assert max(scrape["seats_in_use"] for scrape in scrapes) == SLOTS
    assert [last[name] for name in GAUGES] == [0, 0, 0]
    # The pool has room for all, the slots have not.
    assert last["deferred_total:seat"] > 0
    assert last["deferred_total:blocks"] == 0
    assert last["evicted_tokens_per_compaction_count"] == last["compactions_total:buffer"]
    assert last["evicted_tokens_per_compaction_sum"] == last["evicted_tokens_total"]
    assert last["evicted_tokens_per_compaction_bucket:+Inf"] == last["compactions_total:buffer"]


@pytest.mark.nightly
def test_installed_but_off_the_page_is_as_empty_as_the_user_asked_for(model):
    # Any plugin in vLLM's group for stat loggers would switch statistics on again.
    with serving(model, "--disable-log-stats") as server:
        server.complete(random_prompt(20, seed=0), 10)
        assert "vllm:" not in page(server)
        assert "stat_logger_plugins" not in server.log
