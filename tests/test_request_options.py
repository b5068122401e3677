"""What a request may set for itself, and what it is told when it asks for something else."""

import re

import pytest

from rkv_vllm.options import ServerOptions
from rkv_vllm.request_options import (
    RequestOptionError,
    RequestOptions,
    read_request_options,
    wants_report,
)

CONFIG = ServerOptions(budget=64, buffer=32, lam=0.25)
LIMITED = ServerOptions(budget=64, buffer=32, max_request_tokens=256, min_request_buffer=16)
PROTECTED = ServerOptions(budget=64, buffer=32, protect="prompt", max_request_tokens=256)
RKV_OPTIONS = type(CONFIG.method_options)


@pytest.mark.parametrize(
    ("extra_args", "expected"),
    [
        (None, (64, 32)),
        ({}, (64, 32)),
        ({"session_id": "x", "kv_transfer_params": {}}, (64, 32)),
        ({"kv_budget": 9}, (9, 32)),
        ({"kv_budget": 100_000}, (100_000, 32)),
        ({"kv_buffer": 8}, (64, 8)),
        ({"kv_budget": 10, "kv_buffer": 500}, (10, 500)),
        ({"kv_compression": "rkv"}, (64, 32)),
        ({"kv_compression": "rkv", "kv_budget": 10}, (10, 32)),
        ({"kv_protect": 16}, (64, 32, 16)),
        ({"kv_protect": "prompt", "kv_budget": 10}, (10, 32, "prompt")),
        ({"kv_option": "threshold=1"}, (64, 32, "none", RKV_OPTIONS(lam=0.25, threshold=1.0))),
        (
            {"kv_option": ["threshold=-.5", "lam=0"]},
            (64, 32, "none", RKV_OPTIONS(lam=0.0, threshold=-0.5)),
        ),
        (
            {"kv_option": ["center=true", "defensive=False"]},
            (64, 32, "none", RKV_OPTIONS(lam=0.25, center=True)),
        ),
        ({"kv_compression": "off"}, None),
        ({"kv_report": 1}, (64, 32)),
        ({"kv_report": "false", "kv_budget": 9}, (9, 32)),
        ({"kv_report": True, "kv_compression": "off"}, None),
    ],
)
def test_what_is_left_out_is_the_servers(extra_args, expected):
    read = read_request_options(extra_args, CONFIG)
    assert read == (expected and RequestOptions(*expected))


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(1, True), (True, True), ("true", True), (0, False), (False, False), ("false", False)],
)
def test_a_request_asks_for_its_report(value, wanted):
    assert wants_report({"kv_report": value}) is wanted
    assert not wants_report({"kv_budget": 9})
    assert not wants_report(None)


def test_the_protected_prefix_is_nothing_the_prompt_or_so_many_tokens():
    read = [read_request_options({"kv_protect": what}, PROTECTED) for what in ("none", "prompt", 9)]
    assert [options.prefix_len(100) for options in read] == [0, 100, 9]
    assert [options.prefix_len(5) for options in read] == [0, 5, 9]
    assert read_request_options(None, PROTECTED).prefix_len(100) == 100


@pytest.mark.parametrize(
    ("extra_args", "key", "wanted"),
    [
        ({"kv_budget": "2048"}, "kv_budget", "got '2048', wanted a whole number of tokens"),
        ({"kv_budget": 64.0}, "kv_budget", "got 64.0, wanted a whole number"),
        ({"kv_budget": True}, "kv_budget", "got True, wanted a whole number"),
        ({"kv_budget": None}, "kv_budget", "got None, wanted a whole number"),
        ({"kv_budget": [64]}, "kv_budget", "got [64], wanted a whole number"),
        (
            {"kv_budget": 2**31},
            "kv_budget",
            "got 2147483648, wanted a whole number of tokens, 1 to 2147483647",
        ),
        ({"kv_budget": 8}, "kv_budget", "got 8, wanted more tokens than this server's --kv-window"),
        ({"kv_budget": -1}, "kv_budget", "got -1, wanted a whole number of tokens, 1 to"),
        ({"kv_buffer": 7}, "kv_buffer", "got 7, wanted at least 8 tokens on this server"),
        ({"kv_buffer": "x"}, "kv_buffer", "got 'x', wanted a whole number"),
        ({"kv_compression": "on"}, "kv_compression", "got 'on', wanted 'off' or this server's"),
        ({"kv_compression": False}, "kv_compression", "got False, wanted 'off' or this server's"),
        ({"kv_compression": ["off"]}, "kv_compression", "got ['off'], wanted 'off' or"),
        ({"kv_compression": "off", "kv_budget": 64}, "kv_budget", "no value, because"),
        ({"kv_compression": "off", "kv_buffer": 64}, "kv_buffer", "no value, because"),
        ({"kv_report": 2}, "kv_report", "got 2, wanted true or false"),
        ({"kv_report": "yes", "kv_compression": "off"}, "kv_report", "got 'yes', wanted true"),
        ({"kv_window": 4}, "kv_window", "no value: --kv-window holds for the whole server"),
        ({"kv_pool": 5}, "kv_pool", "no value: --kv-pool holds for the whole server"),
        ({"kv_seats": 5}, "kv_seats", "no value: --kv-seats holds for the whole server"),
        ({"kv_observation_slots": 5}, "kv_observation_slots", "--kv-seats holds for the whole"),
        ({"kv_lambda": 0.5}, "kv_lambda", "got 0.5, wanted no value under this key"),
        ({"kv_protect": "all"}, "kv_protect", "got 'all', wanted 'none', 'prompt' or a whole"),
        ({"kv_protect": "16"}, "kv_protect", "got '16', wanted 'none', 'prompt' or a whole"),
        ({"kv_protect": -1}, "kv_protect", "got -1, wanted 'none', 'prompt' or a whole"),
        ({"kv_option": 3}, "kv_option", 'got 3, wanted a text such as "name=value"'),
        ({"kv_option": "lam"}, "kv_option", "got 'lam', wanted a text such as"),
        ({"kv_option": ["lam=0", 3]}, "kv_option", "got ['lam=0', 3], wanted a text such as"),
        ({"kv_option": "strength=3"}, "kv_option", "wanted options that a request can set: lam, "),
        ({"kv_option": "pool=5"}, "kv_option", "options that a request can set: lam, threshold"),
        ({"kv_option": "lam=2"}, "kv_option", "wanted a number from 0 to 1 for --kv-lambda (lam)"),
        ({"kv_option": ["lam=x"]}, "kv_option", "wanted a number from 0 to 1 for --kv-lambda"),
        ({"kv_compression": "off", "kv_protect": 1}, "kv_protect", "no value, because"),
        ({"kv_compression": "off", "kv_option": "lam=1"}, "kv_option", "no value, because"),
        ({"kv_max_request_tokens": 9}, "kv_max_request_tokens", "holds for the whole server"),
        ({"kv_bugdet": 64}, "kv_bugdet", "wanted one of kv_compression, kv_budget"),
        ({"KV_BUDGET": 64}, "KV_BUDGET", "wanted one of kv_compression, kv_budget"),
        ({"kv-budget": 64}, "kv-budget", "wanted one of kv_compression, kv_budget"),
        ({"buffer": 64, "kv_budget": 64}, "buffer", "wanted one of kv_compression, kv_budget"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(extra_args, key, wanted):
    with pytest.raises(RequestOptionError, match=f"^{key}: .*{re.escape(wanted)}.*; ") as refused:
        read_request_options(extra_args, CONFIG)
    assert (refused.value.key, refused.value.got) == (key, extra_args[key])
    if key == "kv_option" and "off" not in extra_args.values():
        assert "\n  threshold: Cosine between two keys" in str(refused.value)


def test_a_misspelled_key_is_told_from_one_of_others():
    with pytest.raises(RequestOptionError, match=r"; write 'kv_protect'$"):
        read_request_options({"kv_protct": 4}, CONFIG)
    for others in ("budget", "kv_transfer_params", "cache_salt", "kv_load_failure_policy"):
        assert read_request_options({others: 4}, CONFIG) == read_request_options(None, CONFIG)


@pytest.mark.parametrize(
    ("extra_args", "key", "wanted"),
    [
        ({"kv_budget": 225}, "kv_budget", "at most 256 tokens (--kv-max-request-tokens)"),
        ({"kv_buffer": 193}, "kv_buffer", "at most 256 tokens (--kv-max-request-tokens)"),
        ({"kv_budget": 200, "kv_buffer": 57}, "kv_budget", "not 200 + 57"),
        ({"kv_buffer": 15}, "kv_buffer", "at least 16 tokens on this server"),
        ({"kv_compression": "off"}, "kv_compression", "no request keep more than"),
        (
            {"kv_protect": 161},
            "kv_protect",
            "at most 256 tokens (--kv-max-request-tokens), not 161",
        ),
        ({"kv_protect": "prompt"}, "kv_protect", "not 161 protected + 64 + 32"),
    ],
)
def test_a_servers_limits_hold(extra_args, key, wanted):
    with pytest.raises(RequestOptionError, match=f"^{key}: .*{re.escape(wanted)}"):
        read_request_options(extra_args, LIMITED, num_prompt_tokens=161)


def test_a_request_may_keep_its_prompt_whole_but_not_ask_for_what_the_server_has_not():
    compressing = ServerOptions(budget=64, buffer=32, compress_prompt=True)
    assert read_request_options(None, compressing).compress_prompt
    assert read_request_options({"kv_budget": 9}, compressing).compress_prompt
    for no in (False, 0, 0.0, "false", "False"):
        assert not read_request_options({"kv_compress_prompt": no}, compressing).compress_prompt
        assert not read_request_options({"kv_compress_prompt": no}, CONFIG).compress_prompt
    for yes in (True, 1, "true"):
        assert read_request_options({"kv_compress_prompt": yes}, compressing).compress_prompt
        with pytest.raises(RequestOptionError, match="started without --kv-compress-prompt"):
            read_request_options({"kv_compress_prompt": yes}, CONFIG)
    for bad in (2, "yes", None, [True]):
        with pytest.raises(RequestOptionError, match=r"^kv_compress_prompt: got .*true or false"):
            read_request_options({"kv_compress_prompt": bad}, compressing)


def test_up_to_a_servers_limits_everything_is_allowed():
    assert read_request_options({"kv_budget": 224}, LIMITED) == RequestOptions(224, 32)
    assert read_request_options({"kv_buffer": 192}, LIMITED) == RequestOptions(64, 192)
    assert read_request_options({"kv_buffer": 16}, LIMITED) == RequestOptions(64, 16)
    assert read_request_options({"kv_protect": 160}, LIMITED).prefix_len(0) == 160
    assert read_request_options({"kv_protect": "prompt"}, LIMITED, 160).prefix_len(160) == 160


def test_a_servers_own_protection_counts_only_against_requests_that_set_something():
    assert read_request_options(None, PROTECTED, 1000) == RequestOptions(64, 32, "prompt")
    assert read_request_options({"kv_option": "lam=1"}, PROTECTED, 1000).protect == "prompt"
    assert read_request_options({"kv_budget": 24}, PROTECTED, 200).budget == 24
    with pytest.raises(RequestOptionError, match=r"kv_budget: got 25, .* not 200 protected .* 25"):
        read_request_options({"kv_budget": 25}, PROTECTED, 200)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_request_tokens": 95}, "--kv-max-request-tokens .* = 96"),
        ({"max_request_tokens": 111, "protect": 16}, "--kv-max-request-tokens .* = 112"),
        ({"min_request_buffer": 33}, "--kv-min-request-buffer .* = 32"),
    ],
)
def test_limits_below_what_everybody_gets_are_refused_at_start(options, message):
    with pytest.raises(ValueError, match=message):
        ServerOptions(budget=64, buffer=32, **options)
