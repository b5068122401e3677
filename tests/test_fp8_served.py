"""Over HTTP: an fp8 cache in a starved pool, with preemptions, and what is refused."""

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from rkv_vllm.options import ServerOptions
from tests.fp8 import Fp8Store, needs_fp8_on_cpu
from tests.models import kv_cache_bytes, random_prompt
from tests.reference import generate_reference
from tests.server import BLOCK_SIZE, serving

pytestmark = [pytest.mark.engine, pytest.mark.nightly, needs_fp8_on_cpu]

CACHE_DTYPE = "fp8_e4m3"
FLAGS = (
    "--kv-compression=rkv",
    "--kv-budget=64",
    "--kv-buffer=32",
    f"--kv-cache-dtype={CACHE_DTYPE}",
    "--max-model-len=512",
    # Nothing is reserved for growth, so requests crowd in.
    "--no-scheduler-reserve-full-isl",
)
NUM_TOKENS = 160
PROMPTS = [random_prompt(20 + 9 * number, seed=number) for number in range(8)]


def pool(model, num_blocks: int) -> str:
    """The flag for so many blocks, a byte per element."""
    num_bytes = kv_cache_bytes(model, num_blocks * BLOCK_SIZE, bytes_per_element=1)
    return f"--kv-cache-memory-bytes={num_bytes}"


def test_a_starved_pool_of_bytes_serves_what_it_promises_and_refuses_the_rest(random_model_dir):
    model = random_model_dir("qwen3", 3)
    with serving(model, *FLAGS, pool(model, 18)) as server:

        def ask(number: int) -> list[int]:
            # Two grow and grow, at the cost of those that vLLM preempts first.
            own = {"vllm_xargs": {"kv_compression": "off"}} if number < 2 else {}
            num_tokens = 2 * NUM_TOKENS if number < 2 else NUM_TOKENS
            completion = server.complete(PROMPTS[number], num_tokens, extra_body=own)
            return completion.choices[0].token_ids

        with ThreadPoolExecutor(len(PROMPTS)) as threads:
            crowd = list(threads.map(ask, range(len(PROMPTS))))
        crowded = server.metrics()
        assert crowded["num_preemptions_total"] >= 1
        assert server.stats()["compactions"] >= 2 * (len(PROMPTS) - 2)
        # Alone, each is compacted as the rule says.
        before = server.stats()["compactions"]
        config, store = ServerOptions(budget=64, buffer=32), Fp8Store(CACHE_DTYPE)
        num_same = compactions = 0
        for number in (5, 6, 7):
            alone = ask(number)
            reference = generate_reference(model, PROMPTS[number], NUM_TOKENS, config, store=store)
            num_same += alone == reference.token_ids
            compactions += len(reference.compactions)
        # A key within rounding of a step of the cache's floats makes another request of it.
        assert num_same >= 1
        assert server.stats()["compactions"] - before == compactions >= 6
        plain = generate_reference(model, PROMPTS[5], NUM_TOKENS, config)
        assert plain.token_ids != crowd[5]
        for wrong in ({"kv_budget": 4}, {"kv_budgt": 64}, {"kv_option": {"lam": "x"}}):
            with pytest.raises(openai.BadRequestError) as error:
                server.complete(PROMPTS[0], 1, extra_body={"vllm_xargs": wrong})
            assert next(iter(wrong)) in str(error.value)
        assert server.health() == 200
        # The pool is empty again, and the next one is served.
        assert server.metrics()["kv_cache_usage_perc"] == 0
        assert len(server.complete(PROMPTS[0], 5).choices[0].token_ids) == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--kv-cache-dtype=nvfp4",), "does not support this KV cache dtype: got nvfp4 with"),
        (
            ("--kv-cache-dtype-skip-layers", "0"),
            "layers whose KV cache has a dtype of its own: got --kv-cache-dtype-skip-layers 0",
        ),
    ],
)
def test_a_server_refuses_other_caches_before_it_loads_weights(random_model_dir, flags, message):
    model = random_model_dir("qwen3", 3)
    with pytest.raises(AssertionError) as error, serving(model, *FLAGS, *flags):
        pass
    assert message in str(error.value)
    assert "Loading safetensors" not in str(error.value)
