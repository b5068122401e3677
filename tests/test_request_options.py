"""What a request may set for itself, and what it is told when it asks for something else."""

import re

import pytest

from rkv_vllm.config import KVCompressionConfig
from rkv_vllm.request_options import RequestOptionError, RequestOptions, read_request_options

CONFIG = KVCompressionConfig(budget=64, buffer=32)
LIMITED = KVCompressionConfig(budget=64, buffer=32, max_request_tokens=256, min_request_buffer=16)


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
        ({"kv_compression": "off"}, None),
    ],
)
def test_what_is_left_out_is_the_servers(extra_args, expected):
    assert read_request_options(extra_args, CONFIG) == expected


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
            "got 2147483648, wanted a whole number of tokens, at most",
        ),
        ({"kv_budget": 8}, "kv_budget", "got 8, wanted more tokens than this server's --kv-window"),
        ({"kv_budget": -1}, "kv_budget", "got -1, wanted more tokens than"),
        ({"kv_buffer": 7}, "kv_buffer", "got 7, wanted at least 8 tokens on this server"),
        ({"kv_buffer": "x"}, "kv_buffer", "got 'x', wanted a whole number"),
        ({"kv_compression": "on"}, "kv_compression", "got 'on', wanted 'off' or this server's"),
        ({"kv_compression": False}, "kv_compression", "got False, wanted 'off' or this server's"),
        ({"kv_compression": ["off"]}, "kv_compression", "got ['off'], wanted 'off' or"),
        ({"kv_compression": "off", "kv_budget": 64}, "kv_budget", "no value, because"),
        ({"kv_compression": "off", "kv_buffer": 64}, "kv_buffer", "no value, because"),
        ({"kv_window": 4}, "kv_window", "no value: --kv-window holds for the whole server"),
        ({"kv_lambda": 0.5}, "kv_lambda", "no value: --kv-lambda holds for the whole server"),
        ({"kv_max_request_tokens": 9}, "kv_max_request_tokens", "holds for the whole server"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(extra_args, key, wanted):
    with pytest.raises(RequestOptionError, match=f"^{key}: .*{re.escape(wanted)}.*; ") as refused:
        read_request_options(extra_args, CONFIG)
    assert (refused.value.key, refused.value.got) == (key, extra_args[key])


@pytest.mark.parametrize(
    ("extra_args", "key", "wanted"),
    [
        ({"kv_budget": 225}, "kv_budget", "at most 256 tokens (--kv-max-request-tokens)"),
        ({"kv_buffer": 193}, "kv_buffer", "at most 256 tokens (--kv-max-request-tokens)"),
        ({"kv_budget": 200, "kv_buffer": 57}, "kv_budget", "not 200 + 57"),
        ({"kv_buffer": 15}, "kv_buffer", "at least 16 tokens on this server"),
        ({"kv_compression": "off"}, "kv_compression", "no request keep more than"),
    ],
)
def test_a_servers_limits_hold(extra_args, key, wanted):
    with pytest.raises(RequestOptionError, match=f"^{key}: .*{re.escape(wanted)}"):
        read_request_options(extra_args, LIMITED)


def test_up_to_a_servers_limits_everything_is_allowed():
    assert read_request_options({"kv_budget": 224}, LIMITED) == RequestOptions(224, 32)
    assert read_request_options({"kv_buffer": 192}, LIMITED) == RequestOptions(64, 192)
    assert read_request_options({"kv_buffer": 16}, LIMITED) == RequestOptions(64, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_request_tokens": 95}, "--kv-max-request-tokens .* = 96"),
        ({"min_request_buffer": 33}, "--kv-min-request-buffer .* = 32"),
    ],
)
def test_limits_below_what_everybody_gets_are_refused_at_start(options, message):
    with pytest.raises(ValueError, match=message):
        KVCompressionConfig(budget=64, buffer=32, **options)
