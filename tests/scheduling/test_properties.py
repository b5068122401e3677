"""The eight properties of the eviction contract, on the real scheduler and block pool."""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rkv_vllm.scheduling import scheduler
from rkv_vllm.scheduling.books import GroupBooks
from rkv_vllm.scheduling.scheduler import CompressionSchedulerMixin
from tests.models import random_model
from tests.scheduling.simulation import (
    BLOCK_SIZE,
    MAX_MODEL_LEN,
    Group,
    Setting,
    SimulatedEngine,
    SimulatedWorker,
)

STEPS_AHEAD = pytest.mark.parametrize("steps_ahead", [0, 1, 2])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model"))


def prompt_of(prefix: int, length: int, salt: int) -> list[int]:
    """A prompt that shares all but its last tokens with the others of the same prefix."""
    shared = length - length % BLOCK_SIZE
    return [100 + prefix] * shared + [200 + salt] * (length - shared + 1)


SLIDING, STATE = Group("sliding"), Group("state")
# A number is a compressed group whose layers keep so many tokens more than the server's budget.
GROUPS = [
    (Group(),),
    (Group(),),
    (Group(), SLIDING),
    (SLIDING, Group(), SLIDING),
    (0, 5),
    (7, SLIDING, 0),
]


@st.composite
def settings_(draw) -> Setting:
    window = draw(st.integers(1, 3))
    buffer = draw(st.integers(window, window + 6))
    budget = draw(st.integers(window + 1, 14))
    prefix_caching = draw(st.booleans())
    groups = draw(st.sampled_from(GROUPS if prefix_caching else [*GROUPS, (Group(), STATE)]))
    groups = tuple(
        Group(layer_budget=budget + each) if isinstance(each, int) else each for each in groups
    )
    # vLLM wants the pool to hold one request of max_model_len.
    smallest = len(groups) * MAX_MODEL_LEN // BLOCK_SIZE + 2
    return Setting(
        budget=budget,
        buffer=buffer,
        window=window,
        seats=draw(st.sampled_from([1, 2, 64])),
        num_blocks=draw(st.sampled_from([smallest, smallest + 10, 400])),
        max_num_batched_tokens=draw(st.sampled_from([12, 20, 256])),
        max_num_seqs=draw(st.sampled_from([2, 12])),
        prefix_caching=prefix_caching,
        steps_ahead=draw(st.integers(0, 2)),
        protect=draw(st.sampled_from(["none", "none", "prompt", 3, 4, 9])),
        groups=groups,
        host_blocks=draw(st.sampled_from([0, 15, 60, 400])),
    )


# What a request sets for itself; the window is 3 at most.
OWN_OPTIONS = st.one_of(
    st.none(),
    st.none(),
    st.just({"kv_compression": "off"}),
    st.fixed_dictionaries(
        {},
        optional={
            "kv_budget": st.integers(4, 30),
            "kv_buffer": st.integers(3, 12),
            "kv_protect": st.sampled_from(["none", "prompt", 0, 1, 6]),
        },
    ),
)
REQUESTS = st.tuples(
    st.just("add"), st.integers(0, 2), st.integers(1, 40), st.integers(1, 60), OWN_OPTIONS
)
STEPS = st.tuples(st.just("step"), st.integers(1, 30))
ABORTS = st.tuples(st.just("abort"), st.integers(0, 30))
PREEMPTIONS = st.tuples(st.just("preempt"))
DEPARTURES = st.tuples(st.just("leave"), st.integers(0, 30))
# A busy start, so that what follows meets requests at every age.
OPERATIONS = st.builds(
    lambda adds, steps, rest: [*adds, steps, *rest],
    st.lists(REQUESTS, min_size=1, max_size=8),
    STEPS,
    st.lists(st.one_of(REQUESTS, STEPS, STEPS, ABORTS, PREEMPTIONS, DEPARTURES), max_size=20),
)


def play(engine: SimulatedEngine, operations) -> dict[str, int]:
    """Carry out the operations; returns the max_tokens of every request that was not aborted."""
    wanted: dict[str, int] = {}
    for number, (name, *arguments) in enumerate(operations):
        if name == "add":
            prefix, length, max_tokens, *own_options = arguments
            req_id = f"request-{number}"
            engine.add(req_id, prompt_of(prefix, length, number), max_tokens, *own_options)
            wanted[req_id] = max_tokens
        elif name == "step":
            for _ in range(arguments[0]):
                engine.step()
        elif name == "preempt":
            engine.preempt_all()
        elif name == "leave":
            running = [request.request_id for request in engine.scheduler.running]
            # Others follow stock vLLM.
            compacted = [r for r in running if engine.num_evicted(r)] or running
            if compacted:
                engine.preempt(compacted[arguments[0] % len(compacted)])
        else:
            alive = [req_id for req_id in wanted if req_id not in engine.finished]
            if alive:
                victim = alive[arguments[0] % len(alive)]
                engine.abort(victim)
                del wanted[victim]
    engine.run()
    return wanted


SEEN = {
    "compactions": 0,
    "preemptions": 0,
    "deferred": 0,
    "own budgets": 0,
    "off": 0,
    "of a second group": 0,
    "beside other groups": 0,
    "behind a prefix": 0,
    "skipped": 0,
}


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(setting=settings_(), operations=OPERATIONS)
def test_books_rows_and_cells_agree_in_any_sequence(model, setting, operations):
    engine = SimulatedEngine(model, setting)
    wanted = play(engine, operations)
    for req_id, max_tokens in wanted.items():
        assert len(engine.outputs[req_id]) == max_tokens
    engine.worker.flush()
    assert engine.worker.compactions + engine.worker.skipped == len(engine.directives)
    assert engine.pool.get_num_free_blocks() == setting.num_blocks - 1
    assert engine.num_seats_in_use == 0
    engine.assert_nothing_is_left()
    SEEN["compactions"] += engine.worker.compactions
    SEEN["skipped"] += engine.worker.skipped
    SEEN["own budgets"] += len(set(engine.budgets.values()) - {setting.budget})
    SEEN["behind a prefix"] += sum(d.prefix_len > 0 for d in engine.directives)
    SEEN["beside other groups"] += len(engine.directives) * (
        len(engine.tracks) < len(setting.groups)
    )
    first = min(engine.tracks)
    SEEN["of a second group"] += sum(d.group_id != first for d in engine.directives)
    SEEN["off"] += sum(engine.is_off.values())
    SEEN["preemptions"] += engine.worker.resumes
    SEEN["deferred"] += engine.num_deferred


REJECTED = {"compactions": 0, "drafts": 0}


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    setting=settings_(),
    drafts=st.integers(1, 3),
    steps_ahead=st.integers(0, 1),
    operations=st.builds(
        lambda adds, steps, rest: [*adds, steps, *rest],
        st.lists(REQUESTS, min_size=1, max_size=4),
        STEPS,
        st.lists(st.one_of(REQUESTS, STEPS, ABORTS, DEPARTURES), max_size=10),
    ),
)
def test_directives_stay_right_when_rejected_drafts_roll_lengths_back(
    model, setting, drafts, steps_ahead, operations
):
    """Speculative decoding is refused, but the arithmetic of a directive must not rely on it."""
    setting = replace(setting, drafts=drafts, steps_ahead=steps_ahead, num_blocks=1000)
    engine = SimulatedEngine(model, setting)
    wanted = play(engine, operations)
    for req_id, max_tokens in wanted.items():
        assert len(engine.outputs[req_id]) == max_tokens
    engine.worker.flush()
    assert engine.worker.compactions + engine.worker.skipped == len(engine.directives)
    assert engine.pool.get_num_free_blocks() == setting.num_blocks - 1
    REJECTED["compactions"] += engine.worker.compactions
    REJECTED["drafts"] += engine.num_rejected


def test_the_rejections_reached_what_they_are_for():
    # Runs after the sequences above; without them it fails.
    assert REJECTED["compactions"] > 40, REJECTED
    assert REJECTED["drafts"] > 150, REJECTED


def test_the_random_sequences_reached_what_they_are_for():
    # Runs after the sequences; without them it has nothing to look at and fails.
    assert SEEN["compactions"] > 300, SEEN
    assert SEEN["preemptions"] > 10, SEEN
    assert SEEN["deferred"] > 10, SEEN
    assert SEEN["own budgets"] > 10, SEEN
    assert SEEN["off"] > 20, SEEN
    assert SEEN["of a second group"] > 50, SEEN
    assert SEEN["beside other groups"] > 50, SEEN
    assert SEEN["behind a prefix"] > 50, SEEN
    assert SEEN["skipped"] > 3, SEEN


@STEPS_AHEAD
@pytest.mark.parametrize("prompt_len", [3, 11, 12, 13, 57])
@pytest.mark.parametrize(("budget", "buffer", "window"), [(8, 4, 2), (9, 3, 3), (12, 7, 1)])
def test_a_due_request_never_waits_when_slots_and_blocks_are_at_hand(
    model, steps_ahead, prompt_len, budget, buffer, window
):
    setting = Setting(budget=budget, buffer=buffer, window=window, steps_ahead=steps_ahead)
    engine = SimulatedEngine(model, setting)
    engine.add("a", [1] * prompt_len, 50)
    engine.run()
    # Settled logical lengths: first at max(budget, prompt) + buffer, then every `buffer` tokens.
    # The last token is never computed, and a token settles when its step's output was processed.
    first = max(budget, prompt_len) + buffer
    lengths = [directive.settled_logical_len for directive in engine.directives]
    last_settled = prompt_len + 50 - 2 - steps_ahead
    assert lengths == list(range(first, last_settled + 1, buffer))
    assert engine.num_deferred == 0


def test_a_request_that_never_becomes_due_is_never_touched(model):
    engine = SimulatedEngine(model, Setting(budget=40, buffer=20))
    for number in range(4):
        engine.add(f"request-{number}", [number] * 30, 20)
    engine.run()
    assert engine.directives == []
    assert engine.worker.ring == {}


def test_blocks_given_back_are_free_in_the_same_step(model):
    engine = SimulatedEngine(model, Setting(budget=8, buffer=8, window=2))
    engine.add("a", [1] * 5, 40)
    while not engine.directives:
        free_before = engine.pool.get_num_free_blocks()
        engine.step()
    directive = engine.directives[0]
    # 16 settled tokens and the step's own, cut to 8 and the step's own: 5 blocks become 3.
    assert (len(directive.old_block_ids), len(directive.new_block_ids)) == (5, 3)
    # The step took one block for its own token before it gave two back.
    assert engine.pool.get_num_free_blocks() == free_before - 1 + directive.num_freed_blocks


def test_a_shared_prefix_survives_the_compaction_of_one_owner(model):
    setting = Setting(budget=8, buffer=4, window=2)
    engine = SimulatedEngine(model, setting)
    prefix = [9] * 16
    engine.add("first", [*prefix, 1], 3)
    engine.run()
    engine.add("compacted", [*prefix, 2], 40)
    engine.add("neighbour", [*prefix, 3], 40)
    for _ in range(20):
        engine.step()
    assert {directive.req_id for directive in engine.directives} == {"compacted", "neighbour"}
    engine.add("third", [*prefix, 4], 3)
    engine.step()
    # Four full blocks of the prefix are found again although both owners moved away.
    assert engine.scheduler.requests["third"].num_computed_tokens == 17
    scheduled = engine.last_output.num_scheduled_tokens["third"]
    assert scheduled == 1
    engine.run()


def test_a_short_pool_of_slots_makes_requests_wait_in_order(model):
    setting = Setting(budget=8, buffer=8, window=4, seats=1)
    engine = SimulatedEngine(model, setting)
    for number in range(3):
        engine.add(f"request-{number}", [number] * 5, 60)
    engine.run()
    assert engine.num_deferred > 0
    order = [directive.req_id for directive in engine.directives[:3]]
    assert order == ["request-0", "request-1", "request-2"]
    assert all(directive.seat == 0 for directive in engine.directives)


def test_no_free_block_and_a_shared_destination_defers_the_compaction(model):
    setting = Setting(budget=8, buffer=4, window=2, num_blocks=40)
    engine = SimulatedEngine(model, setting)
    engine.add("owner", [9] * 16 + [1], 60)
    engine.add("sharer", [9] * 16 + [2], 60)
    while not engine.num_seats_in_use:
        engine.step()
    held = engine.pool.get_new_blocks(engine.pool.get_num_free_blocks() - 2)
    engine.allow_foreign_blocks = True
    for _ in range(6):
        engine.step()
    assert engine.num_deferred >= 1
    before = len(engine.directives)
    engine.pool.free_blocks(reversed(held))
    engine.allow_foreign_blocks = False
    engine.run()
    assert len(engine.directives) > before


def test_without_a_free_block_a_sole_owner_only_loses_its_hashes(model):
    engine = SimulatedEngine(model, Setting(budget=8, buffer=4, window=2, num_blocks=40))
    engine.add("owner", [9] * 16 + [1], 60)
    while not engine.num_seats_in_use:
        engine.step()
    held = engine.pool.get_new_blocks(engine.pool.get_num_free_blocks() - 1)
    engine.allow_foreign_blocks = True
    for _ in range(6):
        engine.step()
    assert engine.num_deferred == 0
    directive = engine.directives[0]
    assert directive.new_block_ids == directive.old_block_ids[: len(directive.new_block_ids)]
    engine.pool.free_blocks(reversed(held))
    engine.allow_foreign_blocks = False
    engine.run()


@STEPS_AHEAD
def test_a_resumed_request_starts_from_zero(model, steps_ahead):
    setting = Setting(budget=8, buffer=4, window=2, steps_ahead=steps_ahead)
    engine = SimulatedEngine(model, setting)
    engine.add("a", [1] * 5, 60)
    while len(engine.directives) < 3:
        engine.step()
    engine.preempt_all()
    resumed_len = engine.scheduler.requests["a"].num_tokens
    already = len(engine.directives)
    engine.run()
    assert engine.directives[already].num_evicted_before == 0
    assert engine.directives[already].settled_logical_len == resumed_len + setting.buffer
    assert len(engine.outputs["a"]) == 60


@STEPS_AHEAD
def test_a_request_is_due_by_its_own_lengths_whoever_runs_beside_it(model, steps_ahead):
    setting = Setting(budget=8, buffer=4, window=2, steps_ahead=steps_ahead)
    engine = SimulatedEngine(model, setting)
    engine.add("server's", [1] * 5, 49)
    engine.add("budget", [2] * 5, 49, {"kv_budget": 20})
    engine.add("buffer", [3] * 5, 49, {"kv_buffer": 9})
    engine.add("both", [4] * 5, 49, {"kv_budget": 3, "kv_buffer": 5, "session_id": "x"})
    engine.add("off", [5] * 5, 49, {"kv_compression": "off"})
    engine.run()
    last_settled = 5 + 49 - 2 - steps_ahead
    lengths = {req_id: [] for req_id in engine.outputs}
    for directive in engine.directives:
        lengths[directive.req_id].append(directive.settled_logical_len)
    assert lengths == {
        "server's": list(range(12, last_settled + 1, 4)),
        "budget": list(range(24, last_settled + 1, 4)),
        "buffer": list(range(17, last_settled + 1, 9)),
        "both": list(range(10, last_settled + 1, 5)),
        "off": [],
    }


def test_an_option_that_no_front_end_refused_does_not_stop_the_engine(model):
    engine = SimulatedEngine(model, Setting(budget=8, buffer=4, window=2))
    engine.add("bad", [1] * 5, 50, {"kv_budget": 1})
    engine.budgets["bad"] = 8
    engine.run()
    assert len(engine.outputs["bad"]) == 50
    assert {directive.budget for directive in engine.directives} == {8}


class FlushesOneStepLate(SimulatedWorker):
    """The mistake of flushing after the next step's forward."""

    def execute(self, output):
        late, self.pending = self.pending, []
        super().execute(output)
        directives, self.pending = self.pending, late
        self.flush()
        self.pending = directives


class CountsStale(SimulatedWorker):
    """The mistake of computing slots with the count from before the compaction."""

    def slot(self, block_ids, physical, block_size=BLOCK_SIZE):
        last = len(block_ids) * block_size - 1
        return super().slot(block_ids, min(physical + self.late_by, last), block_size)

    late_by = 0

    def _compact(self, directive):
        super()._compact(directive)
        self.late_by = 1


def free_before_the_step_is_scheduled(monkeypatch):
    """The mistake of handing emptied blocks out in the very step that still reads them."""
    original = GroupBooks.evict

    def evict(self, req_id, num_evict, total_len, prefix_len):
        blocks = self.req_to_blocks[req_id]
        booked = original(self, req_id, num_evict, total_len, prefix_len)
        self.reclaim()
        for other, row in self.req_to_blocks.items():
            if booked is not None and other != req_id and row:
                stolen = next((b for b in blocks if b.block_id not in booked[1]), None)
                if stolen is not None and stolen.ref_cnt == 0:
                    self.block_pool.touch([stolen])
                    self.block_pool.free_blocks([row[-1]])
                    row[-1] = stolen
                    break
        return booked

    monkeypatch.setattr(GroupBooks, "evict", evict)


def publish_after_eviction(monkeypatch):
    """The mistake of publishing hashes for compacted content."""
    monkeypatch.setattr(scheduler, "publish_no_more", lambda managers, req_id: None)


def write_shared_blocks(monkeypatch):
    """The mistake of compacting a shared or findable block in place."""
    monkeypatch.setattr(GroupBooks, "_make_private", lambda self, blocks, _: blocks)


def keep_the_count_after_a_preemption(monkeypatch):
    """The mistake of carrying the evicted count over to the next admission."""
    monkeypatch.setattr(
        GroupBooks,
        "pop_blocks_for_free",
        super(GroupBooks, GroupBooks).pop_blocks_for_free,
    )


def forget_nothing(monkeypatch):
    """The mistake of leaving a finished request's slot and progress behind."""
    monkeypatch.setattr(
        CompressionSchedulerMixin,
        "_free_request_blocks",
        lambda self, request: super(CompressionSchedulerMixin, self)._free_request_blocks(request),
    )


def busy_engine(model, **changes) -> SimulatedEngine:
    setting = replace(Setting(buffer=6, num_blocks=66, max_num_batched_tokens=32), **changes)
    return SimulatedEngine(model, setting)


def busy_operations():
    adds = [("add", i % 3, 3 + 2 * i, 40) for i in range(10)]
    return [*adds[:5], ("step", 25), *adds[5:], ("step", 10), ("preempt",), ("step", 10)]


def play_and_check_slots(engine: SimulatedEngine) -> None:
    play(engine, busy_operations())
    assert engine.num_seats_in_use == 0


@STEPS_AHEAD
def test_the_busy_scenario_is_clean_without_a_mistake(model, steps_ahead):
    engine = busy_engine(model, steps_ahead=steps_ahead)
    play_and_check_slots(engine)
    assert engine.worker.compactions > 30


@STEPS_AHEAD
@pytest.mark.parametrize(
    ("mistake", "buffer"),
    [
        (free_before_the_step_is_scheduled, 6),
        # Evicting less than a block leaves a row long enough to publish from.
        (publish_after_eviction, 2),
        (write_shared_blocks, 6),
        (keep_the_count_after_a_preemption, 6),
        (forget_nothing, 6),
    ],
)
def test_the_simulation_notices_a_mistake_in_the_books(
    model, monkeypatch, mistake, buffer, steps_ahead
):
    mistake(monkeypatch)
    engine = busy_engine(model, buffer=buffer, steps_ahead=steps_ahead)
    with pytest.raises((AssertionError, ValueError, KeyError, IndexError)):
        play_and_check_slots(engine)


@STEPS_AHEAD
@pytest.mark.parametrize("mistaken_worker", [FlushesOneStepLate, CountsStale])
def test_the_simulation_notices_a_mistake_in_the_worker(model, mistaken_worker, steps_ahead):
    engine = busy_engine(model, steps_ahead=steps_ahead)
    engine.worker = mistaken_worker(engine.setting)
    with pytest.raises((AssertionError, KeyError, IndexError)):
        play(engine, busy_operations())


def test_the_null_block_inside_a_row_stops_the_engine(model):
    engine = SimulatedEngine(model, Setting(budget=8, buffer=4, window=2))
    engine.add("a", [1] * 5, 40)
    while not engine.num_seats_in_use:
        engine.step()
    engine.managers[0].req_to_blocks["a"][0] = engine.pool.null_block
    with pytest.raises(RuntimeError, match="null block"):
        engine.managers[0].evict("a", 4, 12)


@STEPS_AHEAD
def test_an_id_used_again_right_after_an_abort_starts_from_zero(model, steps_ahead):
    setting = Setting(budget=8, buffer=4, window=2, steps_ahead=steps_ahead)
    engine = SimulatedEngine(model, setting)
    engine.add("again", [1] * 5, 60)
    while len(engine.directives) < 3:
        engine.step()
    engine.drain()
    engine.abort("again")
    engine.prefill_lens.clear()
    engine.finished.clear()
    already = len(engine.directives)
    engine.add("again", [2] * 7, 60)
    engine.run()
    assert engine.directives[already].num_evicted_before == 0
    assert engine.directives[already].settled_logical_len == 8 + 4
    assert len(engine.outputs["again"]) == 60


@pytest.mark.nightly
def test_a_hundred_thousand_random_steps_of_mixed_groups_are_clean(model):
    num_steps = num_compactions = 0
    for seed in range(10_000):
        random = Random(seed)
        engine = SimulatedEngine(model, random_setting(random), seed)
        num_requests = 0
        for _ in range(400):
            event = random.random()
            if event < 0.25:
                own = random.choice([None, None, {"kv_compression": "off"}, {"kv_budget": 17}])
                prompt = prompt_of(random.randrange(3), random.randint(1, 40), num_requests)
                engine.add(f"{num_requests}", prompt, random.randint(1, 60), own)
                num_requests += 1
            elif event < 0.3 and num_requests:
                victim = f"{random.randrange(num_requests)}"
                if victim not in engine.finished:
                    engine.abort(victim)
            elif event < 0.31:
                engine.preempt_all()
            elif event < 0.35 and engine.scheduler.running:
                engine.preempt(random.choice(engine.scheduler.running).request_id)
            engine.step()
            num_steps += 1
        engine.run()
        engine.worker.flush()
        assert engine.pool.get_num_free_blocks() == engine.setting.num_blocks - 1
        engine.assert_nothing_is_left()
        num_compactions += engine.worker.compactions
        if num_steps >= 100_000:
            break
    assert num_compactions > 20_000


def random_setting(random: Random) -> Setting:
    budget, window = random.randint(5, 14), random.randint(1, 3)
    groups = tuple(
        Group(layer_budget=budget + each) if isinstance(each, int) else each
        for each in random.choice(GROUPS)
    )
    smallest = len(groups) * MAX_MODEL_LEN // BLOCK_SIZE + 2
    return Setting(
        budget=budget,
        buffer=random.randint(window, window + 6),
        window=window,
        seats=random.choice([1, 2, 64]),
        num_blocks=random.choice([smallest, smallest + 10, 400]),
        max_num_batched_tokens=random.choice([12, 20, 256]),
        max_num_seqs=random.choice([2, 12]),
        steps_ahead=random.randint(0, 2),
        protect=random.choice(["none", "prompt", 3, 4, 9]),
        groups=groups,
        host_blocks=random.choice([0, 15, 60, 400]),
    )
