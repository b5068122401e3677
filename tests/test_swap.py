"""A compacted request that is preempted and swapped says what an uninterrupted one says."""

import pytest
from vllm.engine.arg_utils import EngineArgs

import rkv_vllm
from rkv_vllm.options import ServerOptions
from tests.engine import Engine, running_engine
from tests.models import random_prompt
from tests.reference import generate_reference
from tests.test_equality import assert_same

pytestmark = pytest.mark.engine

CONFIG = ServerOptions(budget=64, buffer=32)
OPTIONS = rkv_vllm.engine_args(budget=64, buffer=32, swap_space=0.05)


def compactions_booked(engine: Engine) -> set[str]:
    """Requests with a compaction that the workers have not carried out yet."""
    return {d.req_id.rsplit("-", 1)[0] for d in engine.scheduler._booked}


@pytest.mark.parametrize(
    ("runner", "family", "num_tokens"),
    [
        ("v1", "qwen3", 220),
        pytest.param("v2", "llama", 110, marks=pytest.mark.nightly),
        ("v2-async", "qwen3", 130),
    ],
    indirect=["runner"],
)
def test_swapped_requests_equal_uninterrupted_ones(random_model_dir, runner, family, num_tokens):
    model = random_model_dir(family, 3)
    prompts = {f"r{i}": random_prompt(20 + 9 * i, seed=i) for i in range(3)}
    booked = preemptions = 0
    with running_engine(model, **OPTIONS) as engine:
        for req_id, prompt in prompts.items():
            engine.add(req_id, prompt, num_tokens)
        for step in range(num_tokens):
            engine.step()
            running = {r.request_id.rsplit("-", 1)[0] for r in engine.scheduler.running}
            compacted = {
                req_id.rsplit("-", 1)[0] for req_id in engine.scheduler._tracks[0].books.num_evicted
            }
            for req_id in sorted(running & compacted):
                waits = req_id in compactions_booked(engine)
                # Wherever a compaction is booked, and at places in between.
                if waits or (step + 3 * int(req_id[1:])) % 13 == 0:
                    engine.preempt(req_id)
                    booked += waits
                    preemptions += 1
        engine.run()
        stats = engine.stats()
        assert engine.scheduler._swap.bytes_in_use == 0
        engine.assert_pool_is_empty()
    assert booked >= 3
    assert stats["swapped_in"] == stats["swapped_out"] == preemptions > booked
    assert stats["recomputed"] == stats["skipped"] == 0
    compactions = 0
    for req_id, prompt in prompts.items():
        reference = generate_reference(
            model, prompt, num_tokens, CONFIG, unprocessed_steps=runner.unprocessed_steps
        )
        assert_same(engine, req_id, reference)
        compactions += len(reference.compactions)
    assert stats["compactions"] == compactions >= 6
    # Nothing is computed twice; the last token never is.
    assert engine.num_computed_tokens == sum(
        len(prompt) + num_tokens - 1 for prompt in prompts.values()
    )


@pytest.mark.parametrize("runner", ["v1"], indirect=True)
def test_a_full_swap_space_falls_back_to_a_recompute(random_model_dir, runner):
    model = random_model_dir("qwen3", 3)
    prompts = {f"r{i}": random_prompt(20 + 9 * i, seed=i) for i in range(2)}
    # A hundredth of a block.
    options = rkv_vllm.engine_args(budget=64, buffer=32, swap_space=1e-6)
    with running_engine(model, **options) as engine:
        for req_id, prompt in prompts.items():
            engine.add(req_id, prompt, 120)
        while len(engine.scheduler._tracks[0].books.num_evicted) < 2:
            engine.step()
        while compactions_booked(engine):
            engine.step()
        engine.preempt("r0")
        engine.run()
        stats = engine.stats()
        engine.assert_pool_is_empty()
    assert (stats["swapped_out"], stats["swapped_in"], stats["recomputed"]) == (0, 0, 1)
    compactions = 0
    for req_id, prompt in prompts.items():
        restarts = engine.preempted_at.get(req_id, [])
        reference = generate_reference(model, prompt, 120, CONFIG, recompute_at=restarts)
        assert_same(engine, req_id, reference)
        compactions += len(reference.compactions)
    assert stats["compactions"] == compactions >= 2


def test_a_swap_space_larger_than_the_memory_is_refused_before_the_model_loads(random_model_dir):
    options = rkv_vllm.engine_args(swap_space=1e6)
    wanted = r"--kv-swap-space \(swap_space\): got 1000000.0, wanted less than the .* GiB of this "
    with pytest.raises(ValueError, match=wanted):
        EngineArgs(model=str(random_model_dir("llama", 1)), **options).create_engine_config()
