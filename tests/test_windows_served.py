"""Over HTTP: a model of full and sliding layers, in a crowd, with preemptions and bad input."""

import asyncio

import openai
import pytest

from rkv_vllm.options import ServerOptions
from tests.families import FULL, SLIDING, WINDOW
from tests.models import assert_varied, kv_cache_bytes, random_prompt
from tests.reference import generate_reference
from tests.server import BLOCK_SIZE, Server, serving
from tests.test_pressure_served import settled_metrics

pytestmark = [pytest.mark.engine, pytest.mark.nightly]

CONFIG = ServerOptions(budget=64, buffer=32)
# Without vLLM's gate on whole prompts nothing is reserved for growth: requests crowd in.
FLAGS = (
    "--kv-compression=rkv",
    "--kv-budget=64",
    "--kv-buffer=32",
    "--max-model-len=384",
    "--max-num-batched-tokens=384",
    "--no-scheduler-reserve-full-isl",
)
NUM_BLOCKS = 38
NUM_CLIENTS = 20
BAD = [{"kv_budget": 3}, {"kv_budgett": 64}, {"kv_protect": "all"}]


async def ask(client: openai.AsyncOpenAI, model: str, number: int, **words: int) -> int | str:
    """Number of tokens said; every fifth client asks for what cannot be and gets the reason."""
    bad = BAD[number // 5 % len(BAD)] if number % 5 == 4 else None
    try:
        stream = await client.completions.create(
            model=model,
            prompt=random_prompt(20 + 23 * number % 120, seed=number, **words),
            max_tokens=120 + 17 * number % 60,
            temperature=0,
            stream=True,
            extra_body={
                "ignore_eos": True,
                "return_token_ids": True,
                **({"vllm_xargs": bad} if bad else {}),
            },
        )
    except openai.BadRequestError as error:
        return str(error)
    count = 0
    async for chunk in stream:
        count += sum(len(choice.token_ids or ()) for choice in chunk.choices)
        # Every sixth hangs up.
        if number % 6 == 1 and count >= 20:
            await stream.close()
            break
    return count


async def crowd(server: Server, **words: int) -> list[int | str]:
    async with server.async_client() as client:
        asked = [ask(client, server.model, number, **words) for number in range(NUM_CLIENTS)]
        return await asyncio.gather(*asked)


def assert_everybody_got_what_he_asked_for(said: list[int | str]) -> None:
    for number, answer in enumerate(said):
        wanted = 120 + 17 * number % 60
        if number % 5 == 4:
            (key,) = BAD[number // 5 % len(BAD)]
            assert isinstance(answer, str)
            assert key in answer
        elif number % 6 == 1:
            assert 20 <= answer < wanted
        else:
            assert answer == wanted


def test_a_crowd_with_bad_input_in_a_starved_pool(random_model_dir):
    layer_types = (SLIDING, FULL) * 2
    model = random_model_dir("llama", 3, layer_types=layer_types, sliding_window=WINDOW)
    # Both groups take their blocks from one pool, each as wide as half of the layers.
    pool = f"--kv-cache-memory-bytes={kv_cache_bytes(model, NUM_BLOCKS * BLOCK_SIZE) // 2}"
    with serving(model, *FLAGS, pool) as server:
        assert_everybody_got_what_he_asked_for(asyncio.run(crowd(server)))
        metrics, stats = settled_metrics(server), server.stats()
        assert metrics["num_preemptions_total"] > 0
        assert stats["compactions"] == metrics["kv_compression_compactions_total"] >= 10
        assert metrics["kv_cache_usage_perc"] == 0
        # What is left of the crowd, its prefix cache included, changes no answer.
        prompt = random_prompt(20 + 23 * 3 % 120, seed=3)
        token_ids = server.complete(prompt, 150).choices[0].token_ids
        assert token_ids == generate_reference(model, prompt, 150, CONFIG).token_ids
        assert_varied(token_ids)
        assert server.stats()["compactions"] > stats["compactions"]
        assert server.health() == 200
