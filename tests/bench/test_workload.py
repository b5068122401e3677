"""Lengths: what is expected of a run, what fits a pool, what is refused."""

import pytest

from rkv_vllm.bench.prompts import PROBES, TASKS, filled, own_prompts, read_prompts
from rkv_vllm.bench.workload import SCENARIOS, num_compactions, prompt_compactions
from rkv_vllm.cli.bench_input import in_turn
from rkv_vllm.policy import EveryBuffer, Terms
from rkv_vllm.scheduling.booking import ScheduledRequest
from rkv_vllm.scheduling.directive import StepPlan
from rkv_vllm.scheduling.planner import GroupPlanner, Seats
from tests.bench.results import new_workload


class FreeBooks:
    """A pool that never lacks a block."""

    def __init__(self) -> None:
        self.num_evicted = {}

    def evict(self, req_id, num_evict, total_len, prefix_len):
        self.num_evicted[req_id] = self.num_evicted.get(req_id, 0) + num_evict
        return [], []


def planned_lengths(terms, prompt_len, output_len, in_flight):
    """Tokens that one request holds in each step, before its compaction, and their number.

    As the planner of an engine decides it.
    """
    books, plan = FreeBooks(), StepPlan()
    planner = GroupPlanner(0, books, EveryBuffer(window=2), Seats(count=1, window=2))
    scheduled, lengths = [], []
    for step in range(output_len):
        scheduled.append(1 if step else prompt_len)
        computed = sum(scheduled)
        lengths.append(computed - books.num_evicted.get("r", 0))
        if not step:
            planner.begin("r", terms, prompt_len)
        request = ScheduledRequest("r", computed, scheduled[-1], sum(scheduled[-in_flight:]))
        planner.plan_step(lambda _, request=request: request, plan)
    return lengths, len(plan.directives)


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize(("budget", "buffer", "prefix_len"), [(8, 2, 0), (8, 5, 7), (20, 7, 30)])
def test_expected_compactions_are_those_of_the_planner(budget, buffer, prefix_len, in_flight):
    terms = Terms(budget, buffer, prefix_len)
    counts = set()
    for prompt_len in (1, 7, 8, 9, 30):
        for output_len in range(1, 60):
            expected = num_compactions(prompt_len, output_len, terms, in_flight)
            _, planned = planned_lengths(terms, prompt_len, output_len, in_flight)
            assert expected == planned, (prompt_len, output_len)
            counts.add(planned)
    assert len(counts) > 2


def test_a_protected_prompt_puts_compactions_off():
    # Prompts of 20 and 30 tokens, outputs of 150: due at 116 and 126 instead of 96.
    assert new_workload().expected_compactions(64) == (6, 6)
    assert new_workload(compression={"protect": "prompt"}).expected_compactions(64) == (4, 4)
    # At 112 for both.
    assert new_workload(compression={"protect": 16}).expected_compactions(64) == (5, 5)


def test_probes_are_never_due():
    for scenario in SCENARIOS.values():
        workload = new_workload(buffer=scenario.buffer)
        for probe_len in (1, 10, 500):
            for budget in (9, *scenario.budgets):
                terms = Terms(budget, workload.buffer)
                assert num_compactions(probe_len, workload.probe_len, terms, in_flight=1) == 0


@pytest.mark.parametrize(
    ("prefill_len", "terms", "expected"),
    [
        # Not longer than what is kept and one chunk.
        (164, Terms(64, 32), (0, 0)),
        # At 100, where 64 stay.
        (165, Terms(64, 32), (1, 36)),
        (200, Terms(64, 32), (1, 36)),
        # At 100 and 200; the last chunk is not followed by one.
        (201, Terms(64, 32), (2, 136)),
        # At 200 and 300: 100 tokens are what is kept.
        (350, Terms(64, 32, prefix_len=36), (2, 200)),
        (350, Terms(64, 32, prefix_len=350), (0, 0)),
    ],
)
def test_prompts_are_compacted_between_chunks(prefill_len, terms, expected):
    assert prompt_compactions(prefill_len, terms, chunk=100) == expected
    assert prompt_compactions(prefill_len, terms, chunk=0) == (0, 0)


def test_a_compressed_prompt_is_as_short_as_what_is_left_of_it():
    chunked = {"compression": {"compress_prompt": True, "prompt_chunk": 100}}
    # 64 are kept at 200, 50 follow: due at 114 + 32 of 64 + 50 + 150 tokens, and twice more.
    workload = new_workload(prompt_lens=(250,), output_lens=(150,), **chunked)
    assert workload.expected_compactions(64) == (2 + 4, 2 + 4)
    off = {"compression": {"compress_prompt": False, "prompt_chunk": 100}}
    whole = new_workload(prompt_lens=(250,), output_lens=(150,), **off)
    assert whole.expected_compactions(64) == (4, 4)
    # It may be longer than the pool.
    workload = new_workload(pool_tokens=256, prompt_lens=(250,), output_lens=(150,), **chunked)
    workload.check((64,))
    with pytest.raises(ValueError, match="wanted at least 416"):
        new_workload(pool_tokens=256, prompt_lens=(250,), output_lens=(150,), **off).check((64,))


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenarios_compact_and_lack_memory_where_they_say_so(name):
    scenario = SCENARIOS[name]
    count = scenario.num_prompts
    # A task and its template take about 80 tokens.
    prompt_lens = [max(80, num_tokens) for num_tokens in in_turn(scenario.prompt_lens, count)]
    workload = new_workload(
        prompt_lens=tuple(prompt_lens),
        prompts=("text",) * count,
        output_lens=in_turn(scenario.output_lens, count),
        buffer=scenario.buffer,
        pool_tokens=scenario.pool_tokens,
        block_size=scenario.block_size,
        compression=scenario.compression,
    )
    workload.check(scenario.budgets)
    assert (workload.pool_blocks < workload.whole_blocks) == (name == "beyond-pool")
    whole = sum(workload.total_lens)
    # Ample: with room for a block that each may ask for at its end.
    has_room = scenario.pool_tokens > whole + 2 * 32 * count
    assert has_room == (name == "ample")
    assert (scenario.pool_tokens < 0.6 * whole) == (name != "ample")


def test_mixed_lengths_meet_each_other():
    scenario = SCENARIOS["mixed"]
    pairs = zip(
        in_turn(scenario.prompt_lens, scenario.num_prompts),
        in_turn(scenario.output_lens, scenario.num_prompts),
        strict=True,
    )
    assert len({*pairs}) == len(scenario.prompt_lens) * len(scenario.output_lens)


def test_each_request_is_expected_to_be_compacted_for_its_own_length():
    # Due at 96, 128, 160 of 170 tokens; at 96 of 110; never of 90.
    workload = new_workload(prompt_lens=(20, 30, 30), output_lens=(150, 80, 60))
    assert workload.expected_compactions(64) == (4, 4)
    assert workload.max_model_len == 170


def test_priorities_switch_the_policy_of_every_side_to_them():
    assert "--scheduling-policy=priority" in new_workload(priorities=(0, 1)).engine_flags()
    assert not any("scheduling" in flag for flag in new_workload().engine_flags())


def test_engine_flags_give_the_pool_in_blocks_with_the_empty_one():
    flags = new_workload().engine_flags()
    assert "--num-gpu-blocks-override=17" in flags
    assert f"--kv-cache-memory-bytes={17 * 32 * 1024}" in flags
    assert "--max-model-len=180" in flags
    assert not any("blocks" in flag for flag in new_workload(pool_tokens=0).engine_flags())


def test_the_smallest_pool_that_is_named_is_accepted():
    with pytest.raises(ValueError, match="wanted at least 192"):
        new_workload(pool_tokens=191).check((64,))
    new_workload(pool_tokens=192).check((64,))
    new_workload(pool_tokens=0).check((64,))


@pytest.mark.parametrize(("budget", "is_refused"), [(147, True), (145, False)])
def test_a_budget_under_which_nothing_is_compacted_is_refused(budget, is_refused):
    # The longest request has 30 + 150 - 3 settled tokens at its end, asynchronously scheduled.
    workload = new_workload()
    if is_refused:
        with pytest.raises(ValueError, match="nothing would ever be compacted"):
            workload.check((64, budget))
    else:
        workload.check((64, budget))


def test_own_prompts_are_different_and_follow_the_seed():
    prompts = own_prompts(3 * len(TASKS), seed=1)
    assert len({*prompts, *PROBES}) == 3 * len(TASKS) + len(PROBES)
    assert own_prompts(3 * len(TASKS), seed=1) == prompts
    other = own_prompts(3 * len(TASKS), seed=2)
    assert other != prompts
    assert sorted(other) == sorted(prompts)


def count_words(text):
    return len(text.split())


@pytest.mark.parametrize("num_tokens", [0, 3, 40, 1000])
def test_a_prompt_is_filled_up_to_so_many_tokens(num_tokens):
    text = filled("How many are there?", num_tokens, count_words, seed=1)
    assert text.endswith("How many are there?")
    # A note has seven words, and none is cut.
    assert count_words(text) in range(max(4, num_tokens - 6), max(4, num_tokens) + 1)
    assert filled("How many are there?", num_tokens, count_words, seed=1) == text
    if num_tokens > 20:
        other = filled("How many are there?", num_tokens, count_words, seed=2)
        # Not even the first block is shared.
        assert other[:30] != text[:30]


def test_prompts_of_a_file_are_read_in_order(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "output_tokens": 3}\n\n{"prompt": "b"}\n{"prompt": "c"}\n')
    assert read_prompts(file, 2) == ["a", "b"]


def test_drafts_put_off_compactions_by_as_many_tokens_at_most():
    terms = Terms(budget=64, buffer=32)
    # Due at 96, 128, 160 and 192; with 3 drafts at the latest at 99, 134, 169 and 204.
    assert num_compactions(40, 170, terms, in_flight=1) == 4
    assert num_compactions(40, 170, terms, in_flight=4, late=3) == 4
    assert num_compactions(40, 160, terms, in_flight=8, late=3) == 3
