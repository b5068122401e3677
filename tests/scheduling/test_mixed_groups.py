"""Full, sliding, chunked and state groups and several budgets in one pool, in random traffic.

The simulated worker reads every cell that a layer would read, in every group and step, so a block
of an uncompressed group that a compaction wrote shows at once.
"""

from collections import Counter
from collections.abc import Iterator
from random import Random

import pytest

from tests.models import random_model
from tests.scheduling.simulation import (
    BLOCK_SIZE,
    MAX_MODEL_LEN,
    Group,
    Setting,
    SimulatedEngine,
)

SLIDING, CHUNKED, STATE = Group("sliding"), Group("chunked"), Group("state")
WIDE_SLIDING = Group("sliding", block_size=2 * BLOCK_SIZE)
# A number is a compressed group whose layers keep so many tokens more than the server's budget.
GROUPS = [
    (0, SLIDING, STATE, 5),
    (STATE, 0, SLIDING, 7),
    (0, SLIDING, 5),
    (SLIDING, 0, SLIDING, SLIDING),
    (3, WIDE_SLIDING, 0),
    (CHUNKED, 0, CHUNKED, 5),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model"))


def random_setting(seed: int) -> Setting:
    """Any engine; seeds take turns with the groups, and with the policy."""
    random, kinds = Random(seed), GROUPS[seed % len(GROUPS)]
    window = random.randint(1, 3)
    budget = random.randint(window + 2, 12)
    groups = tuple(Group(layer_budget=budget + g) if isinstance(g, int) else g for g in kinds)
    # One request of the longest text fits; vLLM wants no more either.
    smallest = len(groups) * (MAX_MODEL_LEN // BLOCK_SIZE + 3)
    when = "pressure" if seed // len(GROUPS) % 3 == 1 else "always"
    return Setting(
        budget=budget,
        buffer=random.randint(window, window + 6),
        window=window,
        seats=random.choice([1, 2, 64]) if when == "always" else 64,
        num_blocks=smallest if when == "pressure" else random.choice([smallest, 2 * smallest]),
        max_num_batched_tokens=random.choice([16, 20, 256]),
        max_num_seqs=12 if when == "pressure" else random.choice([4, 12]),
        # vLLM finds prefixes beside states, and hits of other lengths beside chunks, elsewhere.
        prefix_caching=STATE not in groups and random.random() < 0.7,
        steps_ahead=random.randint(0, 2),
        protect=random.choice(["none", "none", "prompt", 3, 9]),
        groups=groups,
        policy=random.choice(["fcfs", "priority"]),
        host_blocks=random.choice([0, 60]),
        compress_prompt=random.random() < 0.3,
        prompt_chunk=random.choice([8, 12, 16]),
        when=when,
    )


def random_traffic(random: Random, num_steps: int) -> Iterator[tuple[list[tuple], str]]:
    """By step: arguments of `SimulatedEngine.add`, and what happens to those that run."""
    number = 0
    for _ in range(num_steps):
        adds = []
        while random.random() < 0.12:
            number += 1
            length = random.randint(1, 60)
            shared = length - length % BLOCK_SIZE
            prompt = [100 + random.randint(0, 2)] * shared
            prompt += [200 + number] * (length - shared + 1)
            own = random.choice(
                [None, None, None, {"kv_compression": "off"}, {"kv_budget": random.randint(5, 30)}]
            )
            adds.append((f"r{number}", prompt, random.randint(1, 110), own, random.randint(0, 2)))
        yield adds, random.choices(["", "abort", "preempt"], [96, 2, 2])[0]


def play(model, seed: int, num_steps: int, seen: Counter) -> None:
    """Random traffic, then everybody to his end; adds to what was seen."""
    setting = random_setting(seed)
    engine, random = SimulatedEngine(model, setting, seed), Random(seed)
    wanted = {}
    for adds, event in random_traffic(random, num_steps):
        for add in adds:
            wanted[add[0]] = add[2]
            engine.add(*add)
        engine.step()
        running = [request.request_id for request in engine.scheduler.running]
        if event and running:
            victim = random.choice(running)
            if event == "preempt":
                engine.preempt(victim)
            else:
                engine.abort(victim)
                del wanted[victim]
    engine.run()
    said = {req_id: len(engine.outputs[req_id]) for req_id in wanted}
    assert said == wanted
    engine.worker.flush()
    assert engine.pool.get_num_free_blocks() == setting.num_blocks - 1
    engine.assert_nothing_is_left()
    assert {directive.group_id for directive in engine.directives} <= set(engine.tracks)
    seen["resumed"] += engine.worker.resumes
    seen["of prompts"] += engine.prompt_compactions
    seen[setting.when] += engine.worker.compactions
    for group in setting.groups:
        seen[f"beside {group.kind}, {group.block_size}"] += engine.worker.compactions
    for group_id, group in enumerate(setting.groups):
        if group.kind == "full":
            number = sum(d.group_id == group_id for d in engine.worker.carried_out)
            seen[f"of {'another' if group.layer_budget != setting.budget else 'the'} budget"] += (
                number
            )


def check(seen: Counter, at_least: int) -> None:
    kinds = ["beside sliding, 4", "beside sliding, 8", "beside chunked, 4", "beside state, 4"]
    budgets = ["of the budget", "of another budget"]
    for name in [*kinds, *budgets, "always", "pressure", "of prompts", "resumed"]:
        assert seen[name] >= at_least, (name, seen)


def test_every_cell_is_right_beside_any_other_kind_of_group(model):
    seen = Counter()
    for seed in range(16):
        play(model, seed, 120, seen)
    check(seen, at_least=20)


@pytest.mark.nightly
@pytest.mark.parametrize("first", range(1000, 1200, 20))
def test_every_cell_is_right_beside_any_other_kind_of_group_in_many_steps(model, first):
    """10^4 steps each, and those that it takes the last requests to end."""
    seen = Counter()
    for seed in range(first, first + 20):
        play(model, seed, 500, seen)
    check(seen, at_least=50)


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("kind", [SLIDING, WIDE_SLIDING, CHUNKED, STATE])
def test_what_a_kept_group_still_takes_is_known_to_a_block(model, kind, steps_ahead):
    """No less than the pool loses, so that nobody runs short; hardly more, or room stays unused."""
    horizon, in_flight = 6, 1 + steps_ahead
    setting = Setting(groups=(Group(), kind), prefix_caching=False, steps_ahead=steps_ahead)
    engine = SimulatedEngine(model, setting)
    engine.add("a", [1] * 30, 120)
    (kept,) = engine.scheduler._kept
    row = engine.managers[1].req_to_blocks

    def held() -> int:
        return sum(not block.is_null for block in row["a"])

    foretold, taken = [], []
    for _ in range(100):
        engine.step()
        request = engine.scheduler.requests["a"]
        taken.append(held())
        now = max(request.num_computed_tokens, request.num_tokens)
        unsettled = request.num_in_flight_tokens + in_flight
        foretold.append(kept.growth("a", now + horizon, unsettled))
    excess = [
        growth - (max(taken[i : i + horizon + 1]) - taken[i])
        for i, growth in enumerate(foretold[:-horizon])
    ]
    assert min(excess) >= 0
    assert max(excess[1:]) <= 1
    assert max(taken) <= kept.most_ever
    assert max(taken[5:]) <= kept.most(1000, in_flight)


@pytest.mark.parametrize("when", ["always", "pressure"])
def test_a_long_prompt_waits_for_a_window_of_blocks_and_not_for_all_its_tokens(model, when):
    setting = Setting(
        groups=(Group(), SLIDING),
        max_num_batched_tokens=12,
        max_num_seqs=4,
        prefix_caching=False,
        when=when,
    )
    engine = SimulatedEngine(model, setting)
    engine.add("running", [1] * 8, 20)
    engine.step()
    # 15 blocks of the full layers, 6 of the window and one chunk, a few to decode; twice that much
    # would be all tokens of both.
    held = engine.pool.get_new_blocks(engine.pool.get_num_free_blocks() - 34)
    engine.allow_foreign_blocks = True
    engine.add("long", [2] * 60, 4)
    engine.step()
    assert [request.request_id for request in engine.scheduler.running] == ["running", "long"]
    engine.pool.free_blocks(held)
    engine.allow_foreign_blocks = False
    engine.run()
    assert engine.worker.resumes == 0


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_windows_that_running_requests_grow_into_are_kept_back(model, monkeypatch, steps_ahead):
    setting = Setting(
        groups=(Group(), SLIDING, SLIDING, SLIDING),
        num_blocks=120,
        prefix_caching=False,
        steps_ahead=steps_ahead,
    )

    def preemptions() -> int:
        engine = SimulatedEngine(model, setting)
        for number in range(40):
            engine.add(f"request-{number}", [number] * 3, 60)
        engine.run()
        assert engine.worker.compactions > 200
        return engine.worker.resumes

    assert preemptions() == 0
    # As if only compressed groups grew.
    monkeypatch.setattr("rkv_vllm.scheduling.kept_group.KeptGroup.growth", lambda *_: 0)
    monkeypatch.setattr("rkv_vllm.scheduling.kept_group.KeptGroup.most", lambda *_: 0)
    assert preemptions() > 3
