"""Options are checked by name, whatever way they come in."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

import rkv_vllm
from rkv_vllm.methods import available_methods
from rkv_vllm.options import OPTIONS, ServerOptions, check_options, flagged_method_options

OWN = {"lam": 0.1, "pool": 7, "threshold": 0.5, "center": False, "defensive": False}
DEFAULTS = {
    "method": "rkv",
    "budget": 1024,
    "buffer": 128,
    "window": 8,
    "protect": "none",
    "layer_budgets": "method",
    "share_layers": "none",
    "compress_prompt": False,
    "prompt_chunk": 2048,
    "seats": 64,
    "swap_space": 0.0,
    "experimental_mla": False,
    "when": "always",
    "max_request_tokens": 0,
    "min_request_buffer": 1,
    "options": OWN,
}
FLAGGED = {**OPTIONS, **flagged_method_options()}
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
    ("layer_budgets", ""),
    ("layer_budgets", 3),
    ("share_layers", ""),
    ("share_layers", True),
    ("seats", 0),
    ("seats", True),
    ("pool", True),
    ("pool", 65),
    ("seats", 1.5),
    ("budget", 2**31),
    ("buffer", 2**31),
    ("window", 129),
    ("protect", "prompts"),
    ("protect", -1),
    ("protect", 2**31),
    ("protect", True),
    ("protect", 1.5),
    ("protect", None),
    ("protect", "16"),
    ("when", "never"),
    ("when", True),
    ("swap_space", -0.5),
    ("swap_space", math.nan),
    ("swap_space", math.inf),
    ("swap_space", "4"),
    ("swap_space", True),
    ("experimental_mla", "yes"),
    ("max_request_tokens", -1),
    ("max_request_tokens", None),
    ("min_request_buffer", 0),
    ("compress_prompt", 1),
    ("compress_prompt", "true"),
    ("prompt_chunk", 0),
    ("prompt_chunk", 7),
    ("prompt_chunk", 2**31),
]
GOOD_EDGES = [
    {"budget": 9},
    {"budget": 2, "window": 1, "buffer": 1},
    {"buffer": 8},
    {"options": {**OWN, "lam": 0.0, "pool": 1, "threshold": -1.0}},
    {"options": {**OWN, "lam": 1.0, "pool": 63, "threshold": 1.0}},
    {"options": {**OWN, "center": True, "defensive": True}},
    {"window": 128},
    {"layer_budgets": "pyramid"},
    {"seats": 1},
    {"swap_space": 0.25},
    {"when": "pressure"},
    {"protect": "prompt"},
    {"protect": 0},
    {"protect": 16, "max_request_tokens": 16 + 1024 + 128},
    {"max_request_tokens": 1024 + 128},
    {"min_request_buffer": 128},
    {"compress_prompt": True, "prompt_chunk": 8},
]


def test_defaults_are_those_of_the_contract():
    assert ServerOptions().to_dict() == DEFAULTS
    flat = {name: value for name, value in {**DEFAULTS, **OWN}.items() if name in FLAGGED}
    assert FLAGGED.keys() >= {"lam", "pool", "threshold"}
    assert {name: option.default for name, option in FLAGGED.items()} == flat


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_bad_value_is_refused_with_name_got_wanted_cure(name, value):
    start = re.escape(f"{FLAGGED[name].flag} ({name}): got {value!r}, wanted ")
    with pytest.raises(ValueError, match=f"^{start}.+; .+"):
        ServerOptions(**{name: value})


@pytest.mark.parametrize("options", GOOD_EDGES, ids=str)
def test_values_at_the_limits_are_accepted(options):
    assert ServerOptions(**options).to_dict() == {**DEFAULTS, **options}


@pytest.mark.parametrize("budget", [6, 8])
def test_budget_must_exceed_the_window(budget):
    with pytest.raises(ValueError, match=rf"--kv-budget .*got {budget}, .*--kv-window .* = 8; "):
        ServerOptions(budget=budget)


def test_buffer_must_hold_a_window():
    with pytest.raises(ValueError, match=r"--kv-buffer .*got 7, .*--kv-window .* = 8; "):
        ServerOptions(buffer=7)


def test_unknown_method_error_lists_the_installed_ones():
    names = f"one of {', '.join(available_methods())} or"
    with pytest.raises(ValueError, match=rf"got 'h2o', wanted {names} .*package.module.Class"):
        ServerOptions(method="h2o")


def test_a_class_is_a_method_by_its_qualified_name():
    config = ServerOptions(method="rkv_vllm.methods.rkv.RKV")
    assert ServerOptions.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert rkv_vllm.engine_args(config.method)["additional_config"]["kv_compression"] == {
        **DEFAULTS,
        "method": "rkv_vllm.methods.rkv.RKV",
    }


@pytest.mark.parametrize("name", ["json.JSONDecoder", "json.JSON", "no.such.Method"])
def test_a_class_that_is_no_method_is_refused_before_anything_starts(name):
    message = rf"^--kv-compression \(method\): got '{name}', wanted a class .*; "
    with pytest.raises(ValueError, match=message):
        ServerOptions(method=name)


def test_json_round_trip_keeps_every_option():
    config = ServerOptions(
        budget=100, buffer=20, window=4, lam=0.25, pool=5, threshold=-0.5, protect=7, seats=3
    )
    given = {"lam": 0.25, "pool": 5, "threshold": -0.5}
    assert config.to_dict()["options"] == {**OWN, **given}
    assert ServerOptions.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_whole_numbers_for_weights_give_the_same_json_as_fractions():
    assert json.dumps(ServerOptions(lam=1).to_dict()) == json.dumps(
        ServerOptions(lam=1.0).to_dict()
    )


def test_former_names_and_flat_method_options_mean_the_same():
    flat = ServerOptions.from_dict({"method": "rkv", "observation_slots": 3, "lam": 0.25})
    nested = ServerOptions.from_dict({"method": "rkv", "seats": 3, "options": {"lam": 0.25}})
    assert flat == nested == rkv_vllm.KVCompressionConfig(observation_slots=3, lam=0.25)


@pytest.mark.parametrize(
    "options",
    [{"seats": 3, "observation_slots": 3}, {"lam": 0.1, "options": {"lam": 0.1}}],
    ids=str,
)
def test_an_option_given_twice_is_refused(options):
    with pytest.raises(ValueError, match="twice, wanted it once; remove one of the two"):
        check_options(options)


def test_a_changed_copy_keeps_the_options_of_the_method():
    copy = replace(ServerOptions(lam=0.25, pool=5), budget=64, buffer=32, threshold=0.75)
    assert copy == ServerOptions(budget=64, buffer=32, lam=0.25, pool=5, threshold=0.75)


def test_protected_tokens_must_leave_room_for_a_compaction():
    options = ServerOptions(budget=64, buffer=32, protect=16)
    options.check_room(113)
    message = r"--kv-protect \(protect\): got 16, wanted .*64 .*32 below --max-model-len 112; lower"
    with pytest.raises(ValueError, match=message):
        options.check_room(112)
    for protect in ("none", "prompt", 0):
        replace(options, protect=protect).check_room(1)


def test_unknown_key_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown option 'lambda', wanted some of method, budget"):
        ServerOptions.from_dict({"method": "rkv", "lambda": 0.1})


@pytest.mark.parametrize("options", [{"budget": 512}, {}], ids=str)
def test_options_without_a_method_name_the_flag_that_is_missing(options):
    with pytest.raises(ValueError, match="add --kv-compression rkv"):
        ServerOptions.from_dict(options)


@pytest.mark.parametrize("options", [None, [], "rkv", 1, True], ids=repr)
def test_anything_but_an_object_is_refused(options):
    with pytest.raises(ValueError, match=r"kv_compression: got .*wanted an object"):
        ServerOptions.from_dict(options)


def test_incomplete_options_may_be_checked_one_by_one():
    assert check_options({"lam": 0, "budget": 4}) == {"budget": 4, "options": {"lam": 0.0}}
    with pytest.raises(ValueError, match="--kv-pool"):
        check_options({"pool": 2})


def test_config_cannot_change_after_its_check():
    with pytest.raises(AttributeError):
        ServerOptions().budget = 1


def test_importing_the_package_imports_neither_vllm_nor_torch():
    code = "import sys, rkv_vllm; print({'vllm', 'torch'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_checks_survive_python_without_asserts():
    code = "import rkv_vllm; rkv_vllm.ServerOptions(budget=0)"
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
