"""What can happen to a request, beside layers with a window: chunks, preemption, pressure, swap.

That undisturbed requests say what explicit eviction says is in test_groups.py and test_families.py.
"""

import pytest

import rkv_vllm
from rkv_vllm.options import ServerOptions
from tests.engine import BLOCK_SIZE, running_engine
from tests.families import FULL, SLIDING, WINDOW
from tests.models import assert_varied, random_prompt
from tests.reference import generate_reference
from tests.test_equality import assert_same
from tests.test_pressure import CompactionWatch

pytestmark = [pytest.mark.engine, pytest.mark.nightly]

LENGTHS = {"budget": 64, "buffer": 32}
LAYER_TYPES = (SLIDING, FULL) * 2
NUM_GROUPS = 2
RUNNERS = pytest.mark.parametrize("runner", ["v1", "v2-async"], indirect=True)


@pytest.fixture
def model(random_model_dir):
    return random_model_dir("llama", 3, layer_types=LAYER_TYPES, sliding_window=WINDOW)


def check_all(engine, model, requests, config, runner) -> int:
    """Every output is the reference's; returns the compactions that the references made."""
    compactions = 0
    for req_id, (prompt, num_tokens) in requests.items():
        reference = generate_reference(
            model,
            prompt,
            num_tokens,
            config,
            unprocessed_steps=runner.unprocessed_steps,
            # Who is preempted says what is in flight before it starts again.
            recompute_at=[
                n + runner.unprocessed_steps for n in engine.preempted_at.get(req_id, ()) if n
            ],
        )
        assert_same(engine, req_id, reference)
        assert_varied(engine.outputs[req_id].token_ids)
        compactions += len(reference.compactions)
    return compactions


def num_compactions(engine) -> dict[int, int]:
    groups = engine.model_runner.compactor.groups
    return {group_id: group.num_compactions for group_id, group in groups.items()}


@RUNNERS
def test_chunked_staggered_sharing_and_preempted_requests(model, runner):
    num_tokens = 130 if runner.name == "v1" else 80
    shared = random_prompt(64, seed=1)
    requests = {
        f"r{i}": ([*shared, *random_prompt(5 + 40 * i, seed=i)], num_tokens) for i in range(3)
    }
    options = rkv_vllm.engine_args(**LENGTHS, swap_space=0.1)
    with running_engine(model, 256, NUM_GROUPS, max_num_batched_tokens=48, **options) as engine:
        for i, (req_id, (prompt, max_tokens)) in enumerate(requests.items()):
            engine.add(req_id, prompt, max_tokens)
            for _ in range(10 * i):
                engine.step()
        # The first has left its prefix by then.
        assert engine.num_cached_tokens("r2") == 64
        while engine.stats()["compactions"] < 4:
            engine.step()
        engine.preempt("r0")
        engine.run()
        stats, compactions = engine.stats(), num_compactions(engine)
        engine.assert_pool_is_empty()
    assert list(engine.preempted_at) == ["r0"]
    # Windows cannot be swapped, so the text is computed again.
    assert (stats["swapped_out"], stats["recomputed"]) == (0, 1)
    expected = check_all(engine, model, requests, ServerOptions(**LENGTHS), runner)
    # A preemption may drop the compaction that was booked in the very step before it.
    assert expected - 1 <= sum(compactions.values()) <= expected
    assert expected >= 6
    assert len(compactions) == 1


@RUNNERS
def test_prompts_are_compacted_between_their_chunks(model, runner):
    """Their windows read every token of the chunk before; a preempted text is compacted again."""
    num_tokens = 80 if runner.name == "v1" else 40
    requests = {f"r{n}": (random_prompt(n, seed=n), num_tokens) for n in (300, 520)}
    lengths = {**LENGTHS, "compress_prompt": True, "prompt_chunk": 96}
    options = {**rkv_vllm.engine_args(**lengths), "max_model_len": 4096}
    # A fifth of what all layers would take for the longest text.
    with running_engine(model, 28, NUM_GROUPS, max_num_batched_tokens=128, **options) as engine:
        for req_id, (prompt, max_tokens) in requests.items():
            engine.add(req_id, prompt, max_tokens)
        while len(engine.outputs["r300"].token_ids) < 10:
            engine.step()
        engine.preempt("r300")
        engine.run()
        compactions = num_compactions(engine)
        engine.assert_pool_is_empty()
    assert list(engine.preempted_at) == ["r300"]
    expected = check_all(engine, model, requests, ServerOptions(**lengths), runner)
    assert list(compactions.values()) == [expected]
    assert expected >= 3 + 5 + 3


@RUNNERS
def test_under_pressure_only_full_layers_give_way_and_nobody_is_preempted(model, runner):
    num_tokens = 150 if runner.name == "v1" else 100
    requests = {f"r{i}": random_prompt(30 + 11 * i, seed=i) for i in range(5)}
    # Blocks for all windows, and for less than the full layers' text.
    windows = len(requests) * (-(-WINDOW // BLOCK_SIZE) + 1)
    num_blocks = windows + (20 if runner.name == "v1" else 18)
    options = rkv_vllm.engine_args(**LENGTHS, when="pressure")
    with running_engine(
        model, num_blocks, NUM_GROUPS, max_model_len=384, max_num_batched_tokens=384, **options
    ) as engine:
        watch = CompactionWatch(engine)
        for req_id, prompt in requests.items():
            engine.add(req_id, prompt, num_tokens)
        engine.run()
        compactions = num_compactions(engine)
        engine.assert_pool_is_empty()
    assert engine.preempted_at == {}
    assert list(compactions.values()) == [sum(map(len, watch.lengths.values()))]
    assert sum(compactions.values()) >= 3
    for req_id, prompt in requests.items():
        reference = generate_reference(
            model,
            prompt,
            num_tokens,
            ServerOptions(**LENGTHS),
            unprocessed_steps=runner.unprocessed_steps,
            compacted_at=watch.lengths.get(req_id, ()),
        )
        assert_same(engine, req_id, reference)
