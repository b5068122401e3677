"""Public failures of ports of eviction to vLLM, re-enacted, every step audited (block_audit.py).

docs/tests.md says what went wrong elsewhere; the scheduler's part of it runs daily in
scheduling/test_bugs_of_others.py. "Alone" is what explicit eviction says (reference.py).
"""

from dataclasses import replace

import pytest
from transformers import AutoTokenizer

import rkv_vllm
from rkv_vllm.options import ServerOptions
from tests.block_audit import BlockAudit, audited_engine
from tests.engine import Engine
from tests.models import random_prompt
from tests.reference import generate_reference
from tests.test_equality import LOGPROB_TOLERANCE, assert_same
from tests.test_ranks import ranks_engine

pytestmark = [pytest.mark.engine, pytest.mark.nightly, pytest.mark.timeout(1800)]

CONFIG = ServerOptions(budget=64, buffer=16)
OPTIONS = rkv_vllm.engine_args(budget=64, buffer=16)
NO_PREFIXES = {"enable_prefix_caching": False}
RUNNERS = pytest.mark.parametrize("runner", ["v1", "v2-async"], indirect=True)


@RUNNERS
def test_no_token_in_flight_lies_in_a_freed_block(random_model_dir, runner):
    """Each event left one garbage vector; here freed blocks are NaN, new ones full of garbage.

    https://github.com/SalesforceAIResearch/Random-Attention scripts/vllm_rp_bench, 1. The three
    settings of the list as requests of one engine, whose server's own is the first.
    """
    model = random_model_dir("qwen3", 3)
    settings = [(64, 16), (80, 16), (72, 24)]
    requests = {
        f"{budget}/{buffer}/{i}": (random_prompt(20, seed=i), budget, buffer)
        for budget, buffer in settings
        for i in range(4)
    }
    with audited_engine(model, 160, poison=True, **NO_PREFIXES, **OPTIONS) as (engine, _):
        for req_id, (prompt, budget, buffer) in requests.items():
            own = {"kv_budget": budget, "kv_buffer": buffer}
            engine.add(req_id, prompt, 400, extra_args=own)
        engine.run()
        stats = engine.stats()
    compactions = 0
    for req_id, (prompt, budget, buffer) in requests.items():
        reference = generate_reference(
            model,
            prompt,
            400,
            replace(CONFIG, budget=budget, buffer=buffer),
            unprocessed_steps=runner.unprocessed_steps,
        )
        # All log-probabilities, those of the 20 tokens after each compaction among them.
        assert_same(engine, req_id, reference)
        compactions += len(reference.compactions)
    assert stats["compactions"] == compactions >= 12 * 13
    assert stats["non_finite"] == 0


BUDGETS = (63, 64, 65, 79, 80)


def run_all_budgets(engine: Engine) -> dict[str, tuple[list[int], ServerOptions]]:
    """One request for each budget, around and on the ends of blocks."""
    requests = {}
    for budget in BUDGETS:
        req_id = f"budget-{budget}"
        requests[req_id] = random_prompt(20, seed=budget), replace(CONFIG, budget=budget)
        engine.add(req_id, requests[req_id][0], 200, extra_args={"kv_budget": budget})
    engine.run()
    return requests


def assert_all_budgets_said_the_same(model, engine, requests, stats, unprocessed_steps) -> None:
    compactions = 0
    for req_id, (prompt, config) in requests.items():
        reference = generate_reference(
            model, prompt, 200, config, unprocessed_steps=unprocessed_steps
        )
        assert_same(engine, req_id, reference)
        compactions += len(reference.compactions)
    assert stats["compactions"] == compactions >= 5 * 8


@RUNNERS
def test_every_slot_is_in_the_row_of_its_own_step(random_model_dir, runner):
    """Allocations came late by 1 + the depth of the queue, one orphan at each end of a block.

    https://github.com/SalesforceAIResearch/Random-Attention scripts/vllm_rp_bench, 2. The audit
    compares every slot with the scheduler's row of that step, and counts those in block 0.
    """
    model = random_model_dir("qwen3", 3)
    with audited_engine(model, 80, poison=True, **NO_PREFIXES, **OPTIONS) as (engine, audit):
        requests = run_all_budgets(engine)
        stats = engine.stats()
        (watch,) = audit.watches()
    assert watch.slots >= 5 * 200
    assert_all_budgets_said_the_same(model, engine, requests, stats, runner.unprocessed_steps)


def test_every_slot_is_in_its_row_on_both_stages_of_a_pipeline(random_model_dir):
    """The same with two batches under way, in two processes.

    https://github.com/SalesforceAIResearch/Random-Attention scripts/vllm_rp_bench, 2.
    """
    model = random_model_dir("qwen3", 3, layers=3)
    with ranks_engine(model, 2 / 3, pipeline_parallel_size=2, **OPTIONS) as engine:
        audit = BlockAudit(engine)
        requests = run_all_budgets(engine)
        stats = engine.stats()
        watches = audit.watches()
        engine.assert_pool_is_empty()
    assert len(watches) == 2
    for watch in watches:
        assert watch.slots >= 5 * 200
        assert watch.in_null_block == 0
    assert_all_budgets_said_the_same(model, engine, requests, stats, 0)


def first_of(text: str, start: int) -> str:
    """The shortest piece from `start` on that occurs nowhere earlier in the text."""
    return next(
        text[start:end]
        for end in range(start + 1, len(text) + 1)
        if text.find(text[start:end]) == start
    )


@RUNNERS
@pytest.mark.parametrize("prompt_len", [63, 64, 65, 100])
def test_a_request_ends_or_leaves_in_the_step_of_its_compaction(
    random_model_dir, runner, prompt_len
):
    """An event past the queue's drain, and a prompt as long as the budget, ended the engine.

    https://github.com/SalesforceAIResearch/Random-Attention scripts/vllm_rp_bench, 3 and 4. Ends by
    a stop string and by length at all 16 distances from a compaction, an abort and a preemption in
    the step of one.
    """
    model = random_model_dir("qwen3", 3)
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt, steps = random_prompt(prompt_len, seed=prompt_len), runner.unprocessed_steps
    whole = generate_reference(model, prompt, 60, CONFIG, unprocessed_steps=steps)
    pieces = [tokenizer.decode([token_id]) for token_id in whole.token_ids]
    ends = range(24, 24 + CONFIG.buffer)
    options = {**NO_PREFIXES, **OPTIONS, "max_num_seqs": 64}
    with audited_engine(model, 640, poison=True, **options) as (engine, audit):
        for end in ends:
            engine.add(f"length{end}", prompt, end)
            stop = first_of("".join(pieces), len("".join(pieces[: end - 1])))
            engine.add(f"stop{end}", prompt, 60, detokenize=True, stop=[stop])
        for req_id in ("aborted", "preempted", "beside"):
            engine.add(req_id, prompt, 60)
        while not engine.model_runner.compactor.pending:
            engine.step()
        booked = {
            d.req_id.rsplit("-", 1)[0]: d.req_id for d in engine.model_runner.compactor.pending
        }
        engine.llm.llm_engine.abort_request([booked["aborted"]], internal=True)
        engine.preempt("preempted")
        engine.run()
        stats = engine.stats()
        (restart,) = audit.resumed_at["preempted"]
    assert engine.outputs["beside"].token_ids == whole.token_ids
    restarted = generate_reference(
        model, prompt, 60, CONFIG, unprocessed_steps=steps, recompute_at=restart
    )
    assert engine.outputs["preempted"].token_ids == restarted.token_ids
    for end in ends:
        assert engine.outputs[f"length{end}"].token_ids == whole.token_ids[:end]
        # A piece that occurs earlier is told apart by what follows it.
        said = engine.outputs[f"stop{end}"].token_ids
        assert said == whole.token_ids[: len(said)]
        assert end <= len(said) <= end + 2
    # Of those that left in the step of a compaction it is skipped, or never booked.
    assert stats["skipped"] >= 2
    assert stats["compactions"] >= 2 * len(ends)


def test_preempted_requests_start_over(random_model_dir):
    """The port "corrupts on vLLM preemption": anchors survived it.

    https://github.com/SalesforceAIResearch/Random-Attention scripts/vllm_rp_bench, caveats.
    """
    model = random_model_dir("qwen3", 3)
    config = ServerOptions(budget=128, buffer=64)
    requests = {f"r{i}": (random_prompt(20, seed=i), 512) for i in range(8)}
    late = {f"late{i}": (random_prompt(200, seed=20 + i), 60) for i in range(3)}
    options = {
        **NO_PREFIXES,
        **rkv_vllm.engine_args(budget=128, buffer=64),
        "max_model_len": 560,
        # Without vLLM's gate on whole prompts the late ones crowd in.
        "scheduler_reserve_full_isl": False,
    }
    with audited_engine(model, 40, poison=True, **options) as (engine, audit):
        for req_id, (prompt, max_tokens) in requests.items():
            engine.add(req_id, prompt, max_tokens)
        while engine.stats()["compactions"] < 2:
            engine.step()
        (track,) = engine.scheduler._tracks
        compacted = [req_id.rsplit("-", 1)[0] for req_id in track.books.num_evicted]
        for req_id, (prompt, max_tokens) in late.items():
            engine.add(req_id, prompt, max_tokens)
        for req_id in compacted:
            engine.preempt(req_id)
        engine.run()
        stats = engine.stats()
        reports = engine.llm.collective_rpc("kv_compression_requests")[0]
    assert len(compacted) >= 2
    assert audit.resumed_at.keys() > set(compacted), "the pool was meant to preempt as well"
    assert min(audit.freed) >= 1
    assert_all_equal_restarting_ones(model, engine, audit, {**requests, **late}, config)
    assert stats["compactions"] >= 8 * 5
    # Counters are kept by request, and these are all gone.
    assert {report["req_id"].rsplit("-", 1)[0] for report in reports} == {*requests, *late}
    assert not engine.preempted_at.keys() - audit.resumed_at.keys()


def assert_all_equal_restarting_ones(
    model, engine, audit, requests, config, unprocessed_steps=0
) -> None:
    """Every output is the reference's that starts over at the same tokens."""
    for req_id, (prompt, max_tokens) in requests.items():
        restarts = [length for length in audit.resumed_at.get(req_id, []) if length > 0]
        reference = generate_reference(
            model,
            prompt,
            max_tokens,
            config,
            recompute_at=restarts,
            unprocessed_steps=unprocessed_steps,
        )
        output = engine.outputs[req_id]
        assert output.token_ids == reference.token_ids, req_id
        pairs = zip(output.logprobs, reference.logprobs, strict=True)
        assert max(abs(a - b) for a, b in pairs) < LOGPROB_TOLERANCE, req_id


@pytest.mark.parametrize(
    ("runner", "lengths"),
    [
        ("v1", (40, 90, 150, 260, 400, 700)),
        # Interpreted kernels take a tenth of a second per step.
        ("v2-async", (40, 60, 90, 120, 150, 180)),
    ],
    indirect=["runner"],
)
def test_rows_that_are_reused_know_nothing_of_their_last_owner(random_model_dir, runner, lengths):
    """Dropped tokens were not reset at the end and not moved when others ended earlier.

    https://github.com/Zefan-Cai/R-KV/pull/25
    """
    model = random_model_dir("qwen3", 3)
    waves = [
        {f"{wave}{length}": (random_prompt(15 + i, seed=17 * wave + i), length)}
        for wave in range(2)
        for i, length in enumerate(lengths)
    ]
    first, second = waves[:6], waves[6:]
    with audited_engine(model, 160, poison=True, **NO_PREFIXES, **OPTIONS) as (engine, audit):
        for wave in (first, second):
            for request in wave:
                for req_id, (prompt, max_tokens) in request.items():
                    engine.add(req_id, prompt, max_tokens)
            # The second wave takes rows over while the longest of the first still run.
            while sum(output.finished for output in engine.outputs.values()) < 4:
                engine.step()
        engine.run()
        stats = engine.stats()
    requests = {req_id: asked for each in waves for req_id, asked in each.items()}
    assert_all_equal_restarting_ones(
        model, engine, audit, requests, CONFIG, runner.unprocessed_steps
    )
    assert stats["requests_compacted"] == 2 * sum(length > 80 for length in lengths)
    assert stats["compactions"] >= 2 * sum(max(0, length - 80) // 16 for length in lengths)
