"""A thousand requests of all kinds, some preempted or given up: none is lost or wrong."""

from collections import Counter
from random import Random

import pytest

from rkv_vllm.bench.processes import living
from tests.medley import BY_PRIORITY, FLAGS, NUM_BLOCKS, OFF, OWN, Alone, serve_crowd, texts
from tests.server import Server, serving

pytestmark = [pytest.mark.engine, pytest.mark.nightly, pytest.mark.timeout(3000)]

COMPRESSION = ("--kv-compression=rkv", "--kv-budget=24", "--kv-buffer=12", "--max-model-len=256")
# First come, first served preempts whoever came last, hardly ever somebody who was compacted.
SWAPPING = ("--kv-swap-space=0.05", *BY_PRIORITY)
PREFIXES = ("--enable-prefix-caching",)
# Of a process, from five hundred requests to a thousand.
MOST_GROWTH = 12 << 20


def memory_of(server: Server) -> dict[str, int]:
    """Resident bytes of each process of a server, by its number and what it calls itself."""
    processes = living(server.running.process.pid)
    return {f"{p.pid} {p.cmdline()[0]}": p.memory_info().rss for p in processes if p.cmdline()}


@pytest.mark.parametrize(
    "more", [BY_PRIORITY, SWAPPING, PREFIXES], ids=["by priority", "swapping", "prefixes"]
)
def test_a_thousand_requests_are_each_right_and_memory_stands_still(random_model_dir, more):
    model = random_model_dir("qwen3", 3)
    # A CPU keeps a compiled product for each number of tokens that a step has had.
    env = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
    with serving(model, *COMPRESSION, *FLAGS, *more, num_blocks=NUM_BLOCKS, env=env) as server:
        random, alone, found, memory = Random(2), Alone(server), Counter(), []
        drawn = texts(48, random, 90, (*OWN, OFF))
        for _ in range(4):
            found += serve_crowd(server, 250, alone, drawn, random).found
            memory.append(memory_of(server))
        assert found["whole"] + found["restarted"] > 1000
        assert found["restarted"] >= 20
        assert found["tie"] <= 10
        grown = {name: memory[3][name] - memory[1][name] for name in memory[1]}
        assert max(grown.values()) < MOST_GROWTH, grown
        assert memory[3].keys() == memory[0].keys()
        assert (more is SWAPPING) == (server.stats()["swapped_in"] > 0)
