"""Over HTTP: a starved pool that swaps answers like an ample one, but where it recomputes."""

from concurrent.futures import ThreadPoolExecutor
from time import sleep

import pytest

from tests.models import random_prompt
from tests.server import Server, serving

pytestmark = [pytest.mark.engine, pytest.mark.nightly]

FLAGS = (
    "--kv-compression=rkv",
    "--kv-budget=64",
    "--kv-buffer=32",
    "--kv-swap-space=0.05",
    "--max-model-len=512",
    # Without vLLM's gate on whole prompts nothing is reserved for growth: requests crowd in.
    "--no-scheduler-reserve-full-isl",
)
NUM_REQUESTS = 10


def answers(server: Server) -> list[list[int]]:
    """The first two grow and grow, at the cost of those that vLLM preempts first."""

    def ask(number: int) -> list[int]:
        own = {"vllm_xargs": {"kv_compression": "off"}} if number < 2 else {}
        prompt = random_prompt(20 + 5 * number, seed=number)
        completion = server.complete(prompt, 320 if number < 2 else 240, extra_body=own)
        return completion.choices[0].token_ids

    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        futures = []
        for number in range(NUM_REQUESTS):
            futures.append(pool.submit(ask, number))
            sleep(0.02)
        return [future.result() for future in futures]


def test_a_starved_server_differs_from_an_ample_one_at_most_where_it_recomputes(random_model_dir):
    model = random_model_dir("qwen3", 3)
    with serving(model, *FLAGS, num_blocks=18) as server:
        starved = answers(server)
        metrics, stats = server.metrics(), server.stats()
    with serving(model, *FLAGS, num_blocks=128) as server:
        ample = answers(server)
        assert server.metrics()["num_preemptions_total"] == 0
    # Preempted before its first compaction a request is recomputed as by stock vLLM, and compacted
    # first that much later.
    recomputed = metrics["num_preemptions_total"] - metrics["kv_compression_swapped_out_total"]
    differing = sum(a != b for a, b in zip(starved, ample, strict=True))
    assert differing <= recomputed < NUM_REQUESTS
    assert metrics["num_preemptions_total"] >= metrics["kv_compression_swapped_in_total"] >= 2
    assert metrics["kv_compression_swapped_out_total"] == stats["swapped_out"]
    assert metrics["kv_compression_swapped_in_total"] == stats["swapped_in"]
    assert metrics["kv_compression_recomputed_total"] == stats["recomputed"] == 0
    assert metrics["kv_compression_swap_bytes"] == 0
    assert stats["compactions"] == metrics["kv_compression_compactions_total"] >= 8 * 4
