"""Blocks and requests of `plan`, against vLLM and against counting."""

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from rkv_vllm.cli.capacity import IN_FLIGHT, Machine, make_capacity
from rkv_vllm.cli.checkpoint import read_decoder
from rkv_vllm.cli.errors import CommandError
from rkv_vllm.options import ServerOptions
from tests.checkpoint_configs import LLAMA, write_config
from tests.scheduling.simulation import BLOCK_SIZE, Setting, SimulatedEngine

SMOLLM2 = {
    **LLAMA,
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


def machine(cache=None, memory=0, **changes):
    settings = {"reserved": 0, "weights": 0, "tensor_parallel": 1, **changes}
    return Machine(memory, 1.0, kv_cache_memory=cache, **settings)


def capacity(fields=LLAMA, block_size=16, dtype="auto", on=None, **options):
    on = on or machine(cache=2**24)
    return make_capacity(read_decoder(fields), on, dtype, block_size, ServerOptions(**options))


def test_pool_is_the_one_that_vllm_logs():
    """SmolLM2 with --kv-cache-memory-bytes 100000000 --block-size 32: 135 blocks, 4,320 tokens."""
    stock = capacity(SMOLLM2, block_size=32, on=machine(cache=100_000_000)).stock
    assert (stock.num_blocks, stock.num_blocks * stock.block_size) == (135, 4320)


@pytest.mark.parametrize(
    ("dtype", "side"),
    [("bfloat16", "stock"), ("float32", "stock"), ("bfloat16", "fp8"), ("bfloat16", "rkv_fp8")],
)
def test_a_block_has_the_size_that_vllm_gives_it(dtype, side):
    cache_dtype = torch.float8_e4m3fn if "fp8" in side else getattr(torch, dtype)
    spec = FullAttentionSpec(block_size=16, num_kv_heads=3, head_size=64, dtype=cache_dtype)
    block = 16 * getattr(capacity(SMOLLM2, dtype=dtype), side).bytes_per_token
    assert block == 30 * spec.page_size_bytes


def test_tensor_parallel_ranks_share_heads_and_weights():
    fields = {**LLAMA, "num_attention_heads": 8, "num_key_value_heads": 2}
    one = capacity(fields, on=machine(memory=2**24, weights=2**22))
    two = capacity(fields, on=machine(memory=2**24, weights=2**22, tensor_parallel=2))
    four = capacity(fields, on=machine(memory=2**24, weights=2**22, tensor_parallel=4))
    assert one.stock.bytes_per_token == 2 * two.stock.bytes_per_token
    assert four.stock.bytes_per_token == two.stock.bytes_per_token
    assert one.ring_bytes == 4 * four.ring_bytes
    assert two.stock.cache_bytes == 2**24 - 2**21


@pytest.mark.parametrize("ranks", [3, 5])
def test_heads_that_cannot_be_shared_are_refused(ranks):
    fields = {**LLAMA, "num_attention_heads": 8, "num_key_value_heads": 2}
    with pytest.raises(CommandError, match=f"--tensor-parallel-size: got {ranks}, wanted"):
        capacity(fields, on=machine(cache=2**24, tensor_parallel=ranks))


def test_the_query_ring_is_taken_from_the_cache_of_rkv_alone():
    on = machine(memory=2**26, weights=1000, reserved=500)
    found = capacity(on=on, window=6, buffer=8, budget=96, seats=3)
    assert found.ring_bytes == 3 * 2 * (6 + IN_FLIGHT) * 2 * 32 * 2
    assert found.stock.cache_bytes == found.fp8.cache_bytes == 2**26 - 1500
    assert found.rkv.cache_bytes == 2**26 - 1500 - found.ring_bytes


def test_a_given_cache_is_taken_as_it_is():
    found = capacity(on=machine(cache=2**24, memory=1, weights=2**40))
    assert {side.cache_bytes for side in found.pools} == {2**24}


@pytest.mark.parametrize(
    ("on", "message"),
    [
        (machine(memory=2**20, weights=2**21), "--gpu-memory: got 1.0 MiB, .* smaller model"),
        (machine(memory=2**20), "--gpu-memory: got 1.0 MiB, .* lower --seats"),
        (machine(cache=100), "--kv-cache-memory-bytes: got 100 B"),
    ],
)
def test_memory_without_room_for_a_cache_is_refused(on, message):
    with pytest.raises(CommandError, match=message) as error:
        capacity(on=on, seats=1024)
    assert error.value.exit_code == 1


@pytest.mark.parametrize(
    ("prompt_len", "output_len", "num_blocks", "tolerance"),
    # A prompt above the budget of 8 tokens: how many are before their first compaction varies.
    [(5, 60, 40, 0), (8, 70, 93, 0), (20, 70, 61, 1), (40, 200, 161, 2)],
)
def test_the_scheduler_runs_as_many_requests_as_planned(
    tmp_path_factory, prompt_len, output_len, num_blocks, tolerance
):
    """In vLLM's scheduler with ours on top, asynchronous as on a GPU."""
    model = write_config(tmp_path_factory.mktemp("model"), LLAMA)
    setting = Setting(steps_ahead=IN_FLIGHT - 1, num_blocks=num_blocks, max_num_seqs=64)
    engine = SimulatedEngine(model, setting)
    for number in range(60):
        engine.add(f"request-{number}", [number + i for i in range(prompt_len)], output_len)
    engine.run()
    block_bytes = BLOCK_SIZE * 2 * 2 * 32 * 2
    planned = capacity(
        block_size=BLOCK_SIZE,
        on=machine(cache=num_blocks * block_bytes),
        budget=setting.budget,
        buffer=setting.buffer,
        window=setting.window,
    )
    assert planned.rkv.num_blocks == num_blocks
    at_once = planned.rkv.at_once_by_peak(prompt_len, output_len)
    assert at_once <= engine.max_running <= at_once + tolerance


def test_a_pool_that_cannot_hold_one_whole_request_holds_none():
    pool = capacity(on=machine(cache=2**16 * 10)).stock
    tokens = pool.longest_output(1)
    assert tokens == pool.usable_blocks * 16
    for count in (pool.at_once_by_peak, pool.at_once_by_mean):
        assert [count(1, tokens), count(1, tokens + 1)] == [1, 0]


def test_by_counting_blocks_step_by_step():
    found = capacity(on=machine(cache=2**21), budget=64, buffer=16, window=2)
    for pool in found.pools:
        held = pool.life(40, 300).held
        blocks = sum(-(-int(length) // 16) for length in held)
        assert pool.at_once_by_mean(40, 300) == pool.usable_blocks * 300 // blocks
    assert found.rkv.at_once_by_peak(40, 300) == found.rkv.usable_blocks // 6
