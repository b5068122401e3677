"""Options are checked by name, whatever way they come in."""

import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import rkv_vllm
from rkv_vllm.config import OPTIONS, KVCompressionConfig, check_options

DEFAULTS = {
    "method": "rkv",
    "budget": 1024,
    "buffer": 128,
    "window": 8,
    "lam": 0.1,
    "pool": 7,
    "threshold": 0.5,
    "observation_slots": 64,
    "max_request_tokens": 0,
    "min_request_buffer": 1,
}
BAD_VALUES = [
    ("method", "h2o"),
    ("method", None),
    ("method", ["rkv"]),
    ("budget", 0),
    ("budget", -1),
    ("budget", 1024.0),
    ("budget", "1024"),
    ("budget", True),
    ("buffer", 0),
    ("buffer", None),
    ("window", 0),
    ("window", False),
    ("lam", -0.01),
    ("lam", 1.01),
    ("lam", math.nan),
    ("lam", math.inf),
    ("lam", True),
    ("lam", "0.1"),
    ("pool", 0),
    ("pool", -1),
    ("pool", 4),
    ("pool", 7.0),
    ("threshold", -1.01),
    ("threshold", 1.01),
    ("threshold", math.nan),
    ("threshold", None),
    ("observation_slots", 0),
    ("observation_slots", True),
    ("pool", True),
    ("observation_slots", 1.5),
    ("max_request_tokens", -1),
    ("max_request_tokens", None),
    ("min_request_buffer", 0),
]
GOOD_EDGES = [
    {"budget": 9},
    {"budget": 2, "window": 1, "buffer": 1},
    {"buffer": 8},
    {"lam": 0.0},
    {"lam": 1.0},
    {"pool": 1},
    {"threshold": -1.0},
    {"threshold": 1.0},
    {"observation_slots": 1},
    {"max_request_tokens": 1024 + 128},
    {"min_request_buffer": 128},
]


def test_defaults_are_those_of_the_contract():
    assert KVCompressionConfig().to_dict() == DEFAULTS
    assert {option.name: option.default for option in OPTIONS} == DEFAULTS


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_bad_value_is_refused_with_name_got_wanted_cure(name, value):
    flag = next(option.flag for option in OPTIONS if option.name == name)
    start = re.escape(f"{flag} ({name}): got {value!r}, wanted ")
    with pytest.raises(ValueError, match=f"^{start}.+; .+"):
        KVCompressionConfig(**{name: value})


@pytest.mark.parametrize("options", GOOD_EDGES, ids=str)
def test_values_at_the_limits_are_accepted(options):
    assert KVCompressionConfig(**options).to_dict() == {**DEFAULTS, **options}


@pytest.mark.parametrize("budget", [6, 8])
def test_budget_must_exceed_the_window(budget):
    with pytest.raises(ValueError, match=rf"--kv-budget .*got {budget}, .*--kv-window .* = 8; "):
        KVCompressionConfig(budget=budget)


def test_buffer_must_hold_a_window():
    with pytest.raises(ValueError, match=r"--kv-buffer .*got 7, .*--kv-window .* = 8; "):
        KVCompressionConfig(buffer=7)


def test_unknown_method_error_lists_the_installed_ones():
    with pytest.raises(ValueError, match=r"got 'h2o', wanted one of rkv or .*package.module.Class"):
        KVCompressionConfig(method="h2o")


def test_a_class_is_a_method_by_its_qualified_name():
    config = KVCompressionConfig(method="rkv_vllm.methods.rkv.RKV")
    assert KVCompressionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert rkv_vllm.engine_args(config.method)["additional_config"]["kv_compression"] == {
        **DEFAULTS,
        "method": "rkv_vllm.methods.rkv.RKV",
    }


@pytest.mark.parametrize("name", ["json.JSONDecoder", "json.JSON", "no.such.Method"])
def test_a_class_that_is_no_method_is_refused_before_anything_starts(name):
    message = rf"^--kv-compression \(method\): got '{name}', wanted a class .*; "
    with pytest.raises(ValueError, match=message):
        KVCompressionConfig(method=name)


def test_json_round_trip_keeps_every_option():
    config = KVCompressionConfig(
        budget=100, buffer=20, window=4, lam=0.25, pool=5, threshold=-0.5, observation_slots=3
    )
    assert KVCompressionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_whole_numbers_for_weights_give_the_same_json_as_fractions():
    assert json.dumps(KVCompressionConfig(lam=1).to_dict()) == json.dumps(
        KVCompressionConfig(lam=1.0).to_dict()
    )


def test_unknown_key_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown option 'lambda', wanted some of method, budget"):
        KVCompressionConfig.from_dict({"method": "rkv", "lambda": 0.1})


@pytest.mark.parametrize("options", [{"budget": 512}, {}], ids=str)
def test_options_without_a_method_name_the_flag_that_is_missing(options):
    with pytest.raises(ValueError, match="add --kv-compression rkv"):
        KVCompressionConfig.from_dict(options)


@pytest.mark.parametrize("options", [None, [], "rkv", 1, True], ids=repr)
def test_anything_but_an_object_is_refused(options):
    with pytest.raises(ValueError, match=r"kv_compression: got .*wanted an object"):
        KVCompressionConfig.from_dict(options)


def test_incomplete_options_may_be_checked_one_by_one():
    assert check_options({"lam": 0, "budget": 4}) == {"lam": 0.0, "budget": 4}
    with pytest.raises(ValueError, match="--kv-pool"):
        check_options({"pool": 2})


def test_config_cannot_change_after_its_check():
    with pytest.raises(AttributeError):
        KVCompressionConfig().budget = 1


def test_importing_the_package_imports_neither_vllm_nor_torch():
    code = "import sys, rkv_vllm; print({'vllm', 'torch'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_checks_survive_python_without_asserts():
    code = "import rkv_vllm; rkv_vllm.KVCompressionConfig(budget=0)"
    run = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True)
    assert run.returncode != 0
    assert "--kv-budget (budget): got 0" in run.stderr


def test_engine_args_refuses_before_it_asks_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.platforms", None)
    with pytest.raises(ValueError, match="unknown option 'budgett'"):
        rkv_vllm.engine_args(budgett=1)
    with pytest.raises(ValueError, match="--kv-budget"):
        rkv_vllm.engine_args(budget=6)


def engine_with(additional_config, ranks):
    """A stand-in for `LLM`: the two members that `stats` reads."""
    vllm_config = SimpleNamespace(additional_config=additional_config)

    def collective_rpc(method):
        assert method == "kv_compression_stats"
        return ranks

    return SimpleNamespace(
        llm_engine=SimpleNamespace(vllm_config=vllm_config), collective_rpc=collective_rpc
    )


def counts(**changes):
    return {**dict.fromkeys(rkv_vllm.COUNTERS, 5), **changes}


def test_stats_are_those_of_one_rank_when_all_agree():
    llm = engine_with({"kv_compression": DEFAULTS}, [counts(), counts()])
    assert rkv_vllm.stats(llm) == counts()


@pytest.mark.parametrize("name", rkv_vllm.COUNTERS)
def test_stats_raise_when_ranks_disagree(name):
    llm = engine_with({"kv_compression": DEFAULTS}, [counts(), counts(**{name: 6})])
    with pytest.raises(RuntimeError, match="rank 1"):
        rkv_vllm.stats(llm)


def test_stats_of_an_engine_without_compression_name_the_cure():
    with pytest.raises(ValueError, match=r"rkv_vllm\.engine_args"):
        rkv_vllm.stats(engine_with({}, []))
