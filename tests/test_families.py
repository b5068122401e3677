"""Families that mix kinds of attention layers say what explicit eviction says."""

import pytest

import rkv_vllm
from rkv_vllm.options import ServerOptions
from tests.families import FAMILIES, compressed_layers, random_family
from tests.served_groups import assert_equal_explicit_eviction, serve
from tests.uneven_heads import KV_HEADS, uneven_model

pytestmark = pytest.mark.engine

CONFIG = ServerOptions(budget=64, buffer=32)
AMPLE = 64 << 20
NUM_TOKENS = {"v1": 150, "v2": 80, "v2-async": 80}


@pytest.fixture(scope="session")
def family_dir(tmp_path_factory):
    """Makes a random model of a family."""
    return lambda name, **sizes: random_family(tmp_path_factory.mktemp(name), name, **sizes)


def daily(*values):
    return pytest.param(*values)


def nightly(*values):
    return pytest.param(*values, marks=pytest.mark.nightly)


@pytest.mark.parametrize(
    ("runner", "name"),
    [
        daily("v1", "gpt-oss"),
        nightly("v1", "gemma3"),
        nightly("v1", "gemma2"),
        nightly("v1", "gemma4"),
        nightly("v1", "ministral"),
        nightly("v1", "command-r7b"),
        nightly("v1", "llama4"),
        nightly("v2", "gpt-oss"),
        nightly("v2-async", "gemma3"),
        nightly("v2-async", "gemma2"),
        nightly("v2", "gemma4"),
        nightly("v2", "llama4"),
    ],
    indirect=["runner"],
)
def test_a_family_says_what_explicit_eviction_says(family_dir, runner, name):
    family, num_tokens = FAMILIES[name], NUM_TOKENS[runner.name]
    model = family_dir(name)
    options = rkv_vllm.engine_args(budget=CONFIG.budget, buffer=CONFIG.buffer)
    if name == "gemma4":
        options["kv_cache_memory_bytes"] = AMPLE
    engine, _, compactions, _ = serve(model, num_tokens, family.num_groups, **options)
    compressed = compressed_layers(name)
    configs = [CONFIG if is_compressed else None for is_compressed in compressed]
    expected = assert_equal_explicit_eviction(
        engine, model, num_tokens, configs, runner.unprocessed_steps
    )
    per_group = expected[:, compressed.index(True)].sum().item()
    assert per_group >= 4
    assert list(compactions.values()) == [per_group]


@pytest.mark.nightly
@pytest.mark.parametrize("runner", ["v1", "v2-async"], indirect=True)
def test_layers_with_different_numbers_of_heads_are_compacted_together(tmp_path, runner):
    """vLLM makes one group of them, with one block table; there is a layer set for each number."""
    num_tokens = NUM_TOKENS[runner.name]
    model = uneven_model(tmp_path / "uneven")
    options = rkv_vllm.engine_args(budget=CONFIG.budget, buffer=CONFIG.buffer)
    options["kv_cache_memory_bytes"] = AMPLE
    engine, _, compactions, _ = serve(model, num_tokens, 1, **options)
    configs = [CONFIG] * len(KV_HEADS)
    expected = assert_equal_explicit_eviction(
        engine, model, num_tokens, configs, runner.unprocessed_steps
    )
    assert compactions == {0: expected[:, 0].sum().item()}
    assert compactions[0] >= 4
