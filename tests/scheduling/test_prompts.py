"""Prompts longer than the pool, on the real scheduler and block pool (SPEC section 6)."""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rkv_vllm.limits import Limits
from rkv_vllm.policy import Terms, longest_cache
from tests.models import random_model
from tests.scheduling.simulation import BLOCK_SIZE, Group, Setting, SimulatedEngine

STEPS_AHEAD = pytest.mark.parametrize("steps_ahead", [0, 1, 2])
# Kept whole are prompts of up to 8 + 12 tokens; nobody is ever longer than 8 + 12 + 4 in flight.
SMALL = Setting(budget=8, buffer=4, window=2, compress_prompt=True, prompt_chunk=12)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model"))


def smallest_pool(setting: Setting, prefix_len: int = 0, extra_budget: int = 0) -> int:
    """Blocks of a pool, the null block included, that holds one request, whatever its prompt."""
    blocks = 1
    limits = Limits(10**6, 10**6, 1 + setting.steps_ahead, setting.drafts, setting.lookahead)
    for group_id, group in enumerate(setting.groups):
        assert group.kind == "full"
        budget = setting.budget_of(group_id, setting.budget + extra_budget)
        terms = Terms(budget, setting.buffer, prefix_len, setting.prompt_chunk)
        blocks += -(-longest_cache(terms, 10**6, limits.in_flight) // BLOCK_SIZE)
    return blocks


def random_prompt(random: Random, longest: int = 200) -> list[int]:
    """One of a few texts that begin alike, so that prefixes hit."""
    shared = random.choice([0, 0, 5, 12, 13, 30, 60, 110])
    own = [random.randrange(100) for _ in range(random.randint(1, max(1, longest - shared)))]
    return [*range(shared), *own]


@STEPS_AHEAD
def test_prompts_longer_than_the_pool_run_in_the_smallest_pool(model, steps_ahead):
    setting = replace(SMALL, steps_ahead=steps_ahead)
    setting = replace(setting, num_blocks=smallest_pool(setting))
    assert (setting.num_blocks - 1) * BLOCK_SIZE < 30
    engine = SimulatedEngine(model, setting)
    random = Random(steps_ahead)
    lengths = [20, 21, 24, 25, 60, 150, 240]
    for number, length in enumerate(lengths):
        engine.add(f"r{number}", [random.randrange(100) for _ in range(length)], 15)
    engine.run()
    assert engine.prompt_compactions == sum(max(0, -(-n // 12) - 1) for n in lengths if n > 20)
    assert all(len(output) == 15 for output in engine.outputs.values())
    engine.assert_nothing_is_left()


@STEPS_AHEAD
def test_boundaries_do_not_depend_on_load_nor_on_prefix_hits(model, steps_ahead):
    """The same prompt alone, hit by a prefix, and squeezed between others is compacted alike."""
    prompt = [7, 8, *range(90)]
    seen = []
    for others, max_tokens in ((0, 12), (9, 11), (9, 64)):
        setting = replace(
            SMALL, steps_ahead=steps_ahead, max_num_batched_tokens=max_tokens, max_num_seqs=8
        )
        engine = SimulatedEngine(model, setting)
        random = Random(max_tokens)
        for number in range(others):
            shared = random.choice([0, 4, 8, 12, 20, 60])
            # Of other options, so that no compressed prefix is shared.
            text = [*prompt[:shared], *range(50, 60 + number)]
            engine.add(f"o{number}", text, 30, {"kv_buffer": 5})
        for _ in range(2 if others else 0):
            engine.step()
        engine.add("r", prompt, 5)
        engine.run()
        seen.append([(d.settled_logical_len, d.num_evict) for d in engine.directives_of("r")])
    assert seen[0] == seen[1] == seen[2]
    assert [end for end, _ in seen[0]] == [12, 24, 36, 48, 60, 72, 84]


def test_a_hit_ends_before_the_first_window(model):
    engine = SimulatedEngine(model, SMALL)
    engine.add("short", list(range(19)), 1)
    engine.run()
    engine.add("long", list(range(60)), 1)
    engine.step()
    # Boundary 12, window from 10 on, whole blocks: 8; the short one left 16 in the cache.
    assert engine.last_output.scheduled_new_reqs[0].num_computed_tokens == 8
    engine.add("whole", list(range(20)), 1)
    engine.step()
    assert engine.last_output.scheduled_new_reqs[0].num_computed_tokens == 16
    engine.run()
    engine.assert_nothing_is_left()


def test_prompts_share_a_prefix_until_each_is_compacted(model):
    """Copies of what is shared are asked for before the step, or the request waits for them."""
    setting = replace(SMALL, budget=12, prompt_chunk=16, max_num_batched_tokens=64)
    needed = smallest_pool(setting)
    for num_blocks in range(needed, 3 * needed):
        engine = SimulatedEngine(model, replace(setting, num_blocks=num_blocks))
        for number in range(4):
            text = [*range(28), number, *range(40)]
            engine.add(f"r{number}", text, 6, {"kv_buffer": setting.buffer + number})
        engine.run()
        assert engine.prompt_compactions >= 4 * 4
        engine.assert_nothing_is_left()


def adopted_by(model, second, first=None, **changes) -> int:
    """Tokens that a second request of 60 equal tokens takes over from the first one's."""
    engine = SimulatedEngine(model, replace(SMALL, **changes))
    for req_id, own in (("first", first), ("second", second)):
        engine.add(req_id, list(range(60)), 5, own)
        engine.step()
        found = engine.last_output.scheduled_new_reqs[0].num_computed_tokens
        engine.run()
    engine.assert_nothing_is_left()
    return found


def test_a_compressed_prefix_is_shared_by_equal_requests_only(model):
    assert adopted_by(model, None) == 48
    assert adopted_by(model, None, steps_ahead=2) == 48
    assert adopted_by(model, None, groups=(Group(layer_budget=8), Group(layer_budget=16))) == 48
    # The text before the first window is found all the same.
    assert adopted_by(model, {"kv_budget": 12}) == 12
    assert adopted_by(model, {"kv_option": "lam=0.5"}) == 8
    assert adopted_by(model, {"kv_compress_prompt": False}) in (8, 12)
    # Survivors that do not end with a block; a method that draws; layers of other kinds.
    assert adopted_by(model, None, budget=9) == 8
    assert adopted_by(model, None, method="random") == 8
    assert adopted_by(model, None, prefix_caching=False) == 0


def test_a_compressed_prefix_leaves_the_pool_by_age_and_with_a_reset(model):
    engine = SimulatedEngine(model, replace(SMALL, num_blocks=16))
    for number, prompt in enumerate((range(60), range(60), range(100, 190), range(60))):
        engine.add(f"r{number}", list(prompt), 5)
        engine.run()
    assert engine.worker.num_adopted == 1
    assert engine.prompt_compactions == 4 + 0 + 7 + 4
    engine.add("again", list(range(60)), 5)
    engine.run()
    assert engine.worker.num_adopted == 2
    engine.preempt_all()
    engine.add("reset", list(range(60)), 5)
    engine.run()
    assert engine.worker.num_adopted == 2
    engine.assert_nothing_is_left()


def test_what_a_preempted_request_leaves_undone_is_not_found(model):
    engine = SimulatedEngine(model, SMALL)
    engine.add("first", list(range(24)), 5)
    engine.step()
    assert engine.prompt_compactions == 1
    # The workers skip its compaction.
    engine.abort("first")
    engine.add("second", list(range(60)), 5)
    engine.run()
    assert engine.worker.num_adopted == 0
    assert engine.worker.skipped == 1


@pytest.mark.parametrize("method", ["rkv", "recent"])
def test_seats_of_prompts_are_beside_those_of_decoding_requests(model, method):
    setting = replace(SMALL, seats=1, method=method, max_num_batched_tokens=64)
    engine = SimulatedEngine(model, setting)
    for number in range(8):
        engine.add(f"r{number}", list(range(20 + 9 * number)), 20)
    most = 0
    seats = set()
    while engine.scheduler.has_requests():
        engine.step()
        prompts = [d for d in engine.last_plan.directives if d.settled_logical_len % 12 == 0]
        most = max(most, len(prompts))
        seats.update(d.seat for d in engine.last_plan.directives)
    engine.drain()
    # One seat for decodes, 64 // 12 for prompts; the simulated worker checks each window.
    assert seats == (set(range(6)) if method == "rkv" else {-1})
    assert most == 5 or method == "recent"
    engine.assert_nothing_is_left()


def test_a_request_may_keep_its_prompt_whole(model):
    engine = SimulatedEngine(model, SMALL)
    engine.add("whole", list(range(100)), 10, {"kv_compress_prompt": False})
    engine.add("off", list(range(100)), 10, {"kv_compression": "off"})
    engine.add("protected", list(range(100)), 10, {"kv_protect": "prompt"})
    engine.run()
    assert engine.prompt_compactions == 0
    assert {d.req_id for d in engine.directives} == {"whole"}
    engine.add("long", list(range(100)), 10)
    engine.run()
    assert engine.prompt_compactions == 8


def test_a_recompute_is_compacted_between_its_chunks_too(model):
    setting = replace(SMALL, num_blocks=smallest_pool(SMALL) + 3)
    engine = SimulatedEngine(model, setting)
    engine.add("protected", list(range(10)), 80, {"kv_protect": "prompt"})
    while len(engine.outputs["protected"]) < 50:
        engine.step()
    assert engine.prompt_compactions == 0
    engine.preempt_all()
    engine.run()
    # 60 tokens: 10 protected, 8 kept, so first at 24; the last chunk ends with the text.
    assert engine.prompt_compactions == 3
    ends = [directive.settled_logical_len for directive in engine.directives]
    assert ends[ends.index(24) :][:3] == [24, 36, 48]
    engine.assert_nothing_is_left()


def test_a_request_that_the_pool_can_never_hold_runs_with_the_servers_lengths(model):
    """No Python front end lets it through; it must not stop the engine all the same."""
    setting = replace(SMALL, num_blocks=smallest_pool(SMALL))
    engine = SimulatedEngine(model, setting)
    for number, own in enumerate(
        (
            {"kv_compression": "off"},
            {"kv_compress_prompt": False},
            {"kv_budget": 60},
            {"kv_protect": "prompt"},
        )
    ):
        engine.add(f"r{number}", list(range(number, 100 + number)), 10, own)
        # What the scheduler makes of it.
        engine.take_for_granted(f"r{number}")
    engine.run()
    assert engine.prompt_compactions == 4 * 8
    engine.assert_nothing_is_left()


def test_a_pool_below_one_request_is_refused_by_name(model):
    setting = replace(SMALL, num_blocks=smallest_pool(SMALL) - 1)
    with pytest.raises(
        ValueError, match=r"--kv-compress-prompt: got .*--kv-prompt-chunk 12.*up to 7"
    ):
        SimulatedEngine(model, setting)


def random_setting(random: Random) -> Setting:
    window = random.randint(1, 3)
    budget = random.randint(window + 1, 14)
    layer_budgets = random.choice([(None,), (None,), (budget, budget + 5)])
    setting = Setting(
        budget=budget,
        buffer=random.randint(window, window + 6),
        window=window,
        seats=random.choice([1, 2, 64]),
        max_num_batched_tokens=random.choice([12, 20, 256]),
        max_num_seqs=random.choice([2, 8]),
        prefix_caching=random.random() < 0.7,
        steps_ahead=random.randint(0, 2),
        protect=random.choice(["none", "none", 3, 4, 9]),
        groups=tuple(Group(layer_budget=own) for own in layer_budgets),
        policy=random.choice(["fcfs", "priority"]),
        method=random.choice(["rkv", "rkv", "recent"]),
        compress_prompt=True,
        prompt_chunk=random.randint(window, 40),
        host_blocks=random.choice([0, 0, 20, 500]),
    )
    if random.random() < 0.6:
        # Survivors end with a block, so that others can start from them.
        setting = replace(
            setting,
            budget=random.choice([4, 8, 12]),
            prompt_chunk=random.choice([4, 12, 16, 28]),
            protect=random.choice(["none", 4]),
            prefix_caching=True,
            groups=(Group(),),
        )
    # A request may ask for a budget of so many more, or a protected prefix.
    most = smallest_pool(setting, prefix_len=9, extra_budget=6)
    return replace(setting, num_blocks=most + random.choice([0, 1, 5, 60]))


def play(engine: SimulatedEngine, random: Random, num_steps: int) -> dict[str, int]:
    """Many requests of every kind; returns the tokens wanted of those that were not aborted."""
    wanted: dict[str, int] = {}
    budget = engine.setting.budget
    for number in range(num_steps):
        engine.step()
        alive = [req_id for req_id in wanted if req_id not in engine.finished]
        draw = random.random()
        if draw < 0.3 and len(alive) < 12:
            own = random.choice([None, None, {"kv_budget": budget + random.randint(0, 6)}])
            wanted[f"r{number}"] = random.randint(1, 40)
            engine.add(
                f"r{number}", random_prompt(random), wanted[f"r{number}"], own, random.randint(0, 2)
            )
        elif draw < 0.32 and alive:
            victim = random.choice(alive)
            engine.abort(victim)
            del wanted[victim]
        elif draw < 0.33:
            engine.preempt_all()
        elif draw < 0.35 and engine.scheduler.running:
            engine.preempt(random.choice(engine.scheduler.running).request_id)
    engine.run(20_000)
    return wanted


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_no_request_outgrows_its_bound_and_nothing_hangs(model, seed):
    random = Random(seed)
    setting = random_setting(random)
    engine = SimulatedEngine(model, setting, seed)
    wanted = play(engine, random, 150)
    for req_id, max_tokens in wanted.items():
        assert len(engine.outputs[req_id]) == max_tokens, req_id
    engine.assert_nothing_is_left()
    assert engine.pool.get_num_free_blocks() == setting.num_blocks - 1
    SEEN["prompts"] += engine.prompt_compactions
    SEEN["others"] += len(engine.directives) - engine.prompt_compactions
    SEEN["resumes"] += engine.worker.resumes
    SEEN["swapped in"] += engine.worker.swapped_in
    SEEN["adopted"] += engine.worker.num_adopted


SEEN = {"prompts": 0, "others": 0, "resumes": 0, "swapped in": 0, "adopted": 0}


def test_the_random_sequences_reached_what_they_are_for():
    assert all(SEEN.values()), SEEN


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_random_steps_of_long_prompts_are_clean(model):
    random = Random(13)
    num_steps = num_prompts = 0
    while num_steps < 100_000:
        engine = SimulatedEngine(model, random_setting(random), num_steps)
        play(engine, random, 2_000)
        num_steps += 2_000
        num_prompts += engine.prompt_compactions
    assert num_prompts > 10_000
