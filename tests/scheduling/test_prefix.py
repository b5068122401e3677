"""What stays shared: protected prefixes, published blocks, and launches of one step."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from rkv_vllm.worker.flush import Compactor
from tests.models import random_model
from tests.scheduling.simulation import BLOCK_SIZE, Group, Setting, SimulatedEngine

FULL, SLIDING = Group(), Group("sliding")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model"))


def test_sixteen_samples_of_one_prompt_hold_its_blocks_once_before_and_after_compactions(model):
    prompt = [9] * 42
    num_shared = len(prompt) // BLOCK_SIZE
    setting = Setting(
        budget=8, buffer=4, protect="prompt", max_num_batched_tokens=256, max_num_seqs=20
    )
    engine = SimulatedEngine(model, setting)
    engine.add("first", prompt, 2)
    engine.run()
    for number in range(16):
        engine.add(f"sample-{number}", prompt, 60)
    engine.step()

    def prompt_blocks() -> set[tuple[int, ...]]:
        rows = engine.managers[0].req_to_blocks.values()
        return {tuple(block.block_id for block in row[:num_shared]) for row in rows}

    before = prompt_blocks()
    assert len(before) == 1
    while len(engine.directives) < 16 * 5:
        engine.step()
        assert prompt_blocks() == before
    (shared,) = before
    assert all(engine.pool.blocks[block_id].ref_cnt == 16 for block_id in shared)
    # Nobody copied a block of the prompt but its last, half-filled one.
    behind = 16 * -(-(len(prompt) % BLOCK_SIZE + 8 + 4 + 1) // BLOCK_SIZE)
    held = engine.setting.num_blocks - 1 - engine.pool.get_num_free_blocks()
    assert held <= num_shared + behind
    engine.add("later", [*prompt, 1], 2)
    engine.step()
    # The whole prompt is still found.
    assert engine.last_output.num_scheduled_tokens["later"] == 1 + len(prompt) % BLOCK_SIZE
    engine.run()


@pytest.mark.parametrize("protect", [0, 3, 4, 5, 16, 17])
@pytest.mark.parametrize("prompt_len", [1, 4, 17])
def test_lengths_count_from_behind_a_protected_prefix_of_any_size(model, protect, prompt_len):
    setting = Setting(budget=8, buffer=4, window=2, protect=protect)
    engine = SimulatedEngine(model, setting)
    engine.add("a", [1] * prompt_len, 60)
    engine.run()
    first = max(protect + 8, prompt_len) + 4
    lengths = [directive.settled_logical_len for directive in engine.directives]
    assert lengths == list(range(first, prompt_len + 60 - 1, 4))
    assert {directive.prefix_len for directive in engine.directives} == {protect}
    assert {directive.settled_len - directive.num_evict for directive in engine.directives} == {
        protect + 8
    }


def test_first_compactions_of_one_step_neither_read_nor_write_each_others_blocks(model):
    """One wave of kernels for all of them, though each needs private copies of a shared prefix."""
    setting = Setting(budget=8, buffer=6, window=2, max_num_batched_tokens=2000, max_num_seqs=32)
    engine = SimulatedEngine(model, setting)
    prefix = [9] * 21
    engine.add("first", prefix, 2)
    engine.run()
    for number in range(23):
        engine.add(f"request-{number}", [*prefix, number], 60)
    while not engine.last_plan.directives:
        engine.step()
    directives = engine.last_plan.directives
    assert len(directives) == 23
    read = {i for d in directives for i in d.old_block_ids}
    fresh = {i for d in directives for i in set(d.new_block_ids) - set(d.old_block_ids)}
    assert len(fresh) == 23 * 3
    assert read.isdisjoint(fresh)
    flush = SimpleNamespace(groups={0: SimpleNamespace(block_size=BLOCK_SIZE)})
    assert list(Compactor._waves(flush, directives)) == [directives]
    engine.run()


def test_what_follows_an_eviction_is_published_in_no_group(model):
    """A sliding layer's content depends on evictions of which its manager knows nothing."""
    setting = Setting(budget=8, buffer=4, window=2, groups=(FULL, SLIDING))
    engine = SimulatedEngine(model, setting)
    engine.add("evicted", [9] * 6, 30)
    engine.run()
    assert engine.directives
    text = [9] * 6 + engine.outputs["evicted"]
    # The same text in the whole: the full layers' blocks are published, and the sliding layers'.
    engine.add("whole", text, 2, {"kv_compression": "off"})
    engine.run()
    # It must find the blocks of the second request; the simulation reads every cell.
    engine.add("hits", [*text, 1, 2, 3], 8, {"kv_compression": "off"})
    engine.step()
    assert engine.last_output.num_scheduled_tokens["hits"] <= BLOCK_SIZE + 3
    engine.run()


def test_each_group_is_compacted_to_its_own_budget(model):
    setting = Setting(budget=10, buffer=4, window=2, groups=(FULL, Group(layer_budget=20), SLIDING))
    engine = SimulatedEngine(model, setting)
    engine.add("server's", [1] * 5, 60)
    engine.add("own", [2] * 5, 60, {"kv_budget": 15})
    engine.run()
    kept = {(d.req_id, d.group_id): set() for d in engine.directives}
    for directive in engine.directives:
        kept[directive.req_id, directive.group_id].add(directive.budget)
    assert kept == {
        ("server's", 0): {10},
        ("server's", 1): {20},
        ("own", 0): {15},
        ("own", 1): {31},
    }


def test_a_repeated_run_draws_the_same_seeds_and_no_two_compactions_the_same(model):
    def seeds() -> list[int]:
        engine = SimulatedEngine(model, Setting(budget=8, buffer=4, window=2))
        for number in range(3):
            engine.add(f"{number}", [number] * 5, 40)
        engine.run()
        return [directive.seed for directive in engine.directives]

    first = seeds()
    assert first == seeds()
    assert len(set(first)) == len(first) > 15


def test_a_protected_prefix_that_leaves_no_room_in_the_pool_is_refused(model):
    # 200 protected tokens, a budget of 8, a block, a window of 2 and a token in flight: 54 blocks.
    setting = Setting(budget=8, buffer=4, window=2, protect=200, num_blocks=54)
    message = r"--kv-protect \(protect\): got 200, .* takes 54 blocks .* at most the 53 blocks"
    with pytest.raises(ValueError, match=message):
        SimulatedEngine(model, setting)
    engine = SimulatedEngine(model, replace(setting, num_blocks=55))
    engine.add("a", [1] * 5, 230)
    engine.run()
    assert len(engine.directives) > 3


def test_the_budget_of_a_request_is_the_mean_of_its_classes_and_the_window_is_whole_in_each(model):
    groups = Group(layer_budget=26), Group(layer_budget=14)
    engine = SimulatedEngine(model, Setting(budget=20, buffer=8, window=8, groups=groups))
    engine.add("own", [1] * 9, 60, {"kv_budget": 14})
    engine.run()
    budgets = [{d.budget for d in engine.directives if d.group_id == i} for i in range(2)]
    # Of the 6 above the window one class has 1.5, the other 0.5 shares.
    assert budgets == [{8 + 9}, {8 + 3}]
