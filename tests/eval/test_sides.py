"""From --methods, --budgets and --protect to sides: names, flags, and options of requests."""

import re

import pytest

from rkv_vllm.eval.sides import EvalSide, MethodChoice, make_eval_sides, read_methods
from rkv_vllm.options import ServerOptions
from rkv_vllm.request_options import read_request_options

COMMON = {"buffer": 32, "window": 8}


def sides_of(methods="rkv", budgets=(64,), protections=("none",), **common):
    return make_eval_sides(read_methods(methods), budgets, protections, {**COMMON, **common})


def test_stock_comes_first_and_every_method_protection_and_budget_is_a_side():
    sides = sides_of("rkv,rkv[lam=0.2, window=12]", (64, 96), ("none", "prompt"))
    assert [side.name for side in sides] == [
        "stock",
        *("rkv 64", "rkv 96", "rkv 64 +prompt", "rkv 96 +prompt"),
        *("rkv[lam=0.2,window=12] 64", "rkv[lam=0.2,window=12] 96"),
        *("rkv[lam=0.2,window=12] 64 +prompt", "rkv[lam=0.2,window=12] 96 +prompt"),
    ]
    assert len(set(sides)) == len(sides)


def test_stock_asks_for_nothing():
    stock = sides_of()[0]
    assert stock.choice.flags(COMMON, 64) == []
    assert stock.request_options(prompt_len=40) == {}


def test_brackets_win_over_what_holds_for_all_methods():
    (choice,) = read_methods("rkv[window=16,lam=0.2]")
    assert choice.flags({**COMMON, "options": {"lam": 0.1, "pool": 5}}, 96) == [
        *("--kv-buffer=32", "--kv-window=16", "--kv-compression=rkv", "--kv-budget=96"),
        *("--kv-option", "lam=0.2", "pool=5"),
    ]


@pytest.mark.parametrize(
    ("prompt_len", "prefix"), [(1, 1), (47, 47), (48, 48), (49, 48), (1000, 48)]
)
def test_a_protected_prompt_counts_within_the_budget(prompt_len, prefix):
    side = EvalSide(MethodChoice("rkv"), 64, "prompt")
    asked = side.request_options(prompt_len)
    options = read_request_options(asked, ServerOptions(budget=64, buffer=32), prompt_len)
    assert options.prefix_len(prompt_len) == prefix
    assert options.budget + prefix == 64


def test_an_unprotected_request_has_the_whole_budget():
    side = EvalSide(MethodChoice("rkv"), 64)
    asked = side.request_options(prompt_len=40)
    server = ServerOptions(budget=96, buffer=32, protect="prompt")
    options = read_request_options(asked, server, 40)
    assert (options.budget, options.prefix_len(40)) == (64, 0)


def test_one_server_is_told_all_that_requests_can_set():
    side = EvalSide(read_methods("rkv[lam=0.2,buffer=16]")[0], 64, "prompt")
    assert side.served_options(10, COMMON) == {
        "kv_compression": "rkv",
        "kv_budget": 54,
        "kv_protect": 10,
        "kv_buffer": 16,
        "kv_option": ["lam=0.2"],
    }


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ("", None),
        ("rkv[lam=0.2", "got 'rkv[lam=0.2', wanted names with commas between"),
        ("rkv,rkv", "got rkv twice"),
        ("rkv[lam]", "got 'lam' in brackets, wanted name=value"),
        ("rkv[budget=9]", "got 'budget' in brackets"),
        ("no_such", "wanted one of"),
        ("rkv[strenght=3]", "The method 'rkv' has these options"),
        ("rkv[window=0]", "got 0, wanted a whole number of tokens, 1 to 128"),
        ("rkv[window=wide]", "got 'wide'"),
    ],
)
def test_what_is_no_method_is_refused_by_name(methods, said):
    if said is None:
        assert read_methods(methods) == []
        return
    with pytest.raises(ValueError, match=re.escape(said)):
        sides_of(methods)


@pytest.mark.parametrize(
    ("budget", "protect", "said"),
    [
        (8, "none", "got 8, wanted more tokens than --kv-window"),
        (32, "prompt", "got 32 with --protect prompt, wanted at least 33"),
    ],
)
def test_a_budget_that_leaves_nothing_to_choose_is_refused(budget, protect, said):
    with pytest.raises(ValueError, match=said):
        sides_of(budgets=(budget,), protections=(protect,))
    assert len(sides_of(budgets=(budget + 1,), protections=(protect,))) == 2
