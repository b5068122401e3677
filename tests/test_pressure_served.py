"""Over HTTP: `--kv-when pressure` under load, samples of one prompt, clients that hang up."""

import asyncio
import time
from collections import Counter

import openai
import pytest

from tests.models import random_prompt
from tests.server import Server, serving

pytestmark = pytest.mark.engine

FLAGS = ("--kv-compression=rkv", "--kv-when=pressure", "--kv-budget=64", "--kv-buffer=32")
NUM_CLIENTS = 24


async def ask(client: openai.AsyncOpenAI, model: str, number: int) -> list[int]:
    """Tokens of each answer; every sixth client hangs up after 20, every fifth wants 3 samples."""
    num_samples = 3 if number % 5 == 0 else 1
    stream = await client.completions.create(
        model=model,
        prompt=random_prompt(20 + 23 * number % 120, seed=number),
        max_tokens=120 + 17 * number % 60,
        n=num_samples,
        temperature=0 if num_samples == 1 else 1,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    counts = [0] * num_samples
    async for chunk in stream:
        for choice in chunk.choices:
            counts[choice.index] += len(choice.token_ids or ())
        if number % 6 == 1 and counts[0] >= 20:
            await stream.close()
            break
    return counts


async def crowd(server: Server) -> list[list[int]]:
    async with server.async_client() as client:
        asked = [ask(client, server.model, number) for number in range(NUM_CLIENTS)]
        return await asyncio.gather(*asked)


def settled_metrics(server: Server) -> Counter[str]:
    """The metrics once the gauges are those of an idle engine; hanging up takes a moment."""
    deadline = time.monotonic() + 30
    while True:
        metrics = server.metrics()
        if not metrics["num_requests_running"] and not metrics["kv_compression_seats_in_use"]:
            return metrics
        assert time.monotonic() < deadline, metrics
        time.sleep(0.2)


def test_a_crowd_in_a_short_pool_is_compacted_and_never_preempted(random_model_dir):
    model = random_model_dir("qwen3", 3)
    with serving(model, *FLAGS, "--max-model-len=512", num_blocks=34) as server:
        counts = asyncio.run(crowd(server))
        for number, counted in enumerate(counts):
            wanted = 120 + 17 * number % 60
            assert all(20 <= n < wanted if number % 6 == 1 else n == wanted for n in counted)
        metrics, stats = settled_metrics(server), server.stats()
        assert metrics["num_preemptions_total"] == 0
        assert stats["compactions"] == metrics["kv_compression_compactions_total"] >= 10
        page = server.running.ask("GET", "/metrics").text
        assert 'reason="pressure"' in page
        assert metrics["kv_compression_pressure_steps_total"] > 0
        assert metrics["kv_cache_usage_perc"] == 0
        # Alone it has room, so nothing happens to it.
        server.complete(random_prompt(40, seed=99), 200)
        assert server.stats()["compactions"] == stats["compactions"]
