"""What the start says about blocks."""

from types import SimpleNamespace

from rkv_vllm.limits import Limits
from rkv_vllm.options import ServerOptions
from rkv_vllm.policy import Terms
from rkv_vllm.scheduling.pool_size import PoolSize


def track(block_size: int) -> SimpleNamespace:
    pool = SimpleNamespace(num_gpu_blocks=100)
    return SimpleNamespace(books=SimpleNamespace(block_size=block_size, block_pool=pool))


def test_the_start_says_how_many_whole_blocks_a_request_holds():
    """Of 1,056 tokens: ceil((1,982 + 128 + 2) / 1,056) = 2, and ceil(32,768 / 1,056) = 32."""
    limits = Limits(max_model_len=32768, max_step_tokens=8192, steps_in_flight=2)
    one = PoolSize(ServerOptions(), [track(1056)], [], limits)
    said = one.describe([Terms(budget=1982, buffer=128)])
    assert said.startswith(
        "blocks of 1056 tokens, freed whole: an answer to a short prompt holds up"
    )
    assert "up to 2 of them" in said
    assert "32 without compression at --max-model-len 32768" in said
    two = PoolSize(ServerOptions(), [track(1056)] * 2, [], limits)
    said = two.describe([Terms(1982, 128), Terms(1983, 128)])
    assert "up to 5 of them" in said
