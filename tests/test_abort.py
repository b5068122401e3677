"""A request that leaves between the booking of its compaction and the flush harms nobody."""

import pytest

import rkv_vllm
from rkv_vllm.options import ServerOptions
from tests.engine import running_engine
from tests.models import random_prompt
from tests.reference import generate_reference

pytestmark = pytest.mark.engine

CONFIG = ServerOptions(budget=64, buffer=32)


@pytest.mark.parametrize("runner", ["v1", "v2-async"], indirect=True)
def test_an_abort_before_the_flush_leaves_the_others_right(random_model_dir, runner):
    """Its blocks go to a newcomer at once, and its compaction is not carried out."""
    model = random_model_dir("qwen3", 3)
    prompts = {"leaves": random_prompt(64, seed=1), "stays": random_prompt(60, seed=2)}
    newcomer = random_prompt(150, seed=3)
    # So few blocks that the newcomer must be given those that the first one leaves behind.
    options = {"num_blocks": 11, "max_model_len": 256}
    with running_engine(model, **options, **rkv_vllm.engine_args(budget=64, buffer=32)) as engine:
        for req_id, prompt in prompts.items():
            engine.add(req_id, prompt, 110)
        leaving = next(r for r in engine.llm.llm_engine.output_processor.request_states)
        (track,) = engine.scheduler._tracks
        while not track.books.num_evicted:
            engine.step()
        # The compaction of the first one is booked and, being booked last, not carried out.
        assert [d.req_id for d in engine.model_runner.compactor.pending] == [leaving]
        engine.llm.llm_engine.abort_request([leaving], internal=True)
        engine.add("newcomer", newcomer, 40)
        engine.run()
        stats = engine.stats()
        engine.assert_pool_is_empty()
    steps = runner.unprocessed_steps
    stays = generate_reference(model, prompts["stays"], 110, CONFIG, unprocessed_steps=steps)
    came = generate_reference(model, newcomer, 40, CONFIG, unprocessed_steps=steps)
    assert engine.outputs["stays"].token_ids == stays.token_ids
    assert engine.outputs["newcomer"].token_ids == came.token_ids
    assert stats["compactions"] == len(stays.compactions) + len(came.compactions) > 0
    # The cache of the one that left is nobody's any more.
    assert stats["skipped"] == 1
