"""Who runs when, and with which flags."""

import re

import pytest

from rkv_vllm.bench.sides import (
    make_compressed_sides,
    make_schedule,
    make_stock_sides,
    split_engine_flags,
)
from rkv_vllm.options import ServerOptions
from tests.bench.results import new_workload


def test_the_stock_side_has_no_flag_of_its_own():
    (stock,) = make_stock_sides(new_workload(), ())
    first, second = make_compressed_sides(
        new_workload(), (64, 128), (), {"buffer": 32, "window": 16}
    )
    assert (stock.name, stock.flags) == ("stock", ())
    assert first.name == "budget 64"
    assert first.flags == (
        *("--kv-compression=rkv", "--kv-budget=64", "--kv-buffer=32"),
        "--kv-window=16",
    )
    assert "--kv-budget=128" in second.flags


def test_policies_are_sides_of_their_own():
    sides = make_compressed_sides(new_workload(), (64, 128), ("always", "pressure"), {"buffer": 32})
    assert [side.name for side in sides] == [
        *("budget 64, always", "budget 64, pressure"),
        *("budget 128, always", "budget 128, pressure"),
    ]
    assert sides[1].when == "pressure"
    assert "--kv-when=pressure" in sides[1].flags
    (default,) = make_compressed_sides(new_workload(), (64,), (), {})
    assert (default.name, default.when) == ("budget 64", ServerOptions().when)
    assert not any(flag.startswith("--kv-when") for flag in default.flags)


def test_caches_are_sides_of_their_own_with_as_many_blocks_as_the_same_bytes_hold():
    load = new_workload(element_bytes=2)
    sides = make_compressed_sides(load, (64,), ("always", "pressure"), {}, ("auto", "fp8"))
    assert [side.name for side in sides] == [
        *("budget 64, always", "budget 64, always, fp8"),
        *("budget 64, pressure", "budget 64, pressure, fp8"),
    ]
    assert [(side.pool_tokens, side.is_exact, side.may_refuse) for side in sides] == [
        *((None, True, False), (1024, False, True)) * 2
    ]
    assert "--kv-cache-dtype=fp8" in sides[1].flags
    assert {"--kv-when=pressure", "--kv-cache-dtype=fp8"} <= set(sides[3].flags)
    (both,) = make_compressed_sides(new_workload(pool_tokens=0), (64,), (), {}, ("fp8_e5m2",))
    assert (both.name, both.pool_tokens) == ("budget 64, fp8_e5m2", None)


def test_a_baseline_is_stock_with_flags_of_its_own():
    stock, seqs, steps = make_stock_sides(
        new_workload(), ("--max-num-seqs 4", "--no-async-scheduling --max_num_batched_tokens=64")
    )
    assert (stock.name, stock.may_refuse) == ("stock", False)
    assert seqs.name == "stock, --max-num-seqs 4"
    assert seqs.flags == ("--max-num-seqs", "4")
    assert (seqs.budget, seqs.when, seqs.pool_tokens) == (None, None, None)
    assert seqs.is_exact
    assert seqs.may_refuse
    assert steps.flags == ("--no-async-scheduling", "--max-num-batched-tokens=64")


@pytest.mark.parametrize(
    ("text", "element_bytes", "tokens"),
    [
        ("fp8", 2, 1024),
        ("fp8", 4, 2048),
        ("--kv-cache-dtype fp8_e5m2 --max-num-seqs=4", 2, 1024),
        ("--kv_cache_dtype=bfloat16", 4, 1024),
    ],
)
def test_another_cache_gets_as_many_blocks_as_the_same_bytes_hold(text, element_bytes, tokens):
    workload = new_workload(element_bytes=element_bytes)
    _, side = make_stock_sides(workload, (text,))
    assert (side.pool_tokens, side.is_exact) == (tokens, False)
    assert f"--num-gpu-blocks-override={tokens // 32 + 1}" in workload.engine_flags(tokens)
    _, side = make_stock_sides(new_workload(pool_tokens=0), (text,))
    assert side.pool_tokens is None


def test_beyond_the_pool_stock_gets_the_smallest_that_it_starts_in():
    workload = new_workload(pool_tokens=128)
    stock, same, seqs, fp8 = make_stock_sides(workload, ("--max-num-seqs=1", "fp8"))
    # 180 tokens in blocks of 32.
    assert (stock.name, stock.pool_tokens, stock.may_refuse) == ("stock", 192, False)
    assert (same.name, same.pool_tokens, same.may_refuse) == ("stock, same pool", None, True)
    assert seqs.pool_tokens == 192
    # The same bytes hold four times as many.
    assert fp8.pool_tokens == 512


def test_what_is_on_has_a_flag_without_a_value():
    prompts = {"compress_prompt": True, "prompt_chunk": 256}
    (side,) = make_compressed_sides(new_workload(), (64,), (), prompts)
    assert {"--kv-compress-prompt", "--kv-prompt-chunk=256"} <= set(side.flags)
    (side,) = make_compressed_sides(
        new_workload(), (64,), (), {**prompts, "compress_prompt": False}
    )
    assert not any("compress-prompt" in flag for flag in side.flags)
    flags = ["--kv-compress-prompt", "--kv-prompt-chunk", "256", "--enforce-eager"]
    assert split_engine_flags(flags) == (["--enforce-eager"], prompts)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "max-num-seqs=4",
        "fp4",
        "--kv-window=4",
        "--kv-compression rkv",
        "--num-gpu-blocks-override=9",
        "--max-num-seqs='4",
        "--kv-cache-dtype int8_per_token_head",
        "--scheduling-policy=priority",
    ],
)
def test_a_baseline_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=r"^--baseline: got "):
        make_stock_sides(new_workload(), (text,))


def test_a_baseline_is_named_once():
    with pytest.raises(ValueError, match="more than once"):
        make_stock_sides(new_workload(), ("fp8", "fp8"))


def test_sides_take_turns_and_their_order_turns_round():
    sides = [
        *make_stock_sides(new_workload(), ()),
        *make_compressed_sides(new_workload(), (64, 128), (), {}),
    ]
    runs = make_schedule(("offline", "served"), sides, 2)
    names = [(run.mode, run.repeat, run.side.budget) for run in runs]
    assert names[:6] == [
        *(("offline", 1, budget) for budget in (128, 64, None)),
        *(("offline", 2, budget) for budget in (None, 64, 128)),
    ]
    assert names[6:] == [("served", *rest) for _, *rest in names[:6]]


def test_flags_of_compression_go_to_the_compressed_sides():
    flags = ["--enforce-eager", "--kv-window", "4", "-tp", "2", "--kv_lambda=0.3", "--swap=1"]
    common, compression = split_engine_flags(flags)
    assert common == ["--enforce-eager", "-tp", "2", "--swap=1"]
    assert compression == {"window": 4, "options": {"lam": 0.3}}
    (compressed,) = make_compressed_sides(new_workload(), (64,), (), {"buffer": 32, **compression})
    assert {"--kv-window=4", "lam=0.3"} <= set(compressed.flags)
    # The compressed sides' flags say the same when vLLM reads them.
    _, again = split_engine_flags([f for f in compressed.flags if not re.match("--kv-bu", f)])
    assert ServerOptions(**again) == ServerOptions(**compression)


def test_an_abbreviated_method_is_that_of_the_compressed_sides():
    method = "rkv_vllm.methods.rkv.RKV"
    common, compression = split_engine_flags([f"--kv-compressi={method}"])
    assert (common, compression) == ([], {"method": method})
    assert (
        f"--kv-compression={method}"
        in make_compressed_sides(new_workload(), (64,), (), compression)[0].flags
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--kv-budget", "64"],
        ["--kv_buffer=64"],
        ["--kv-when=pressure"],
        ["--scheduling-policy", "priority"],
        ["--num-gpu-blocks-override=9"],
        ["--max_model_len", "99"],
        ["--port=8000"],
        ["--additional-config", '{"kv_compression": {"method": "rkv"}}'],
        ["--additional-config.kv_compression.method", "rkv"],
        ['--additional_config={"kv_compression": {"method": "rkv"}}'],
        ["--config", "options.yaml"],
        ["--hf-token=secret"],
        # vLLM takes them for --kv-budget, --block-size, --additional-config.
        ["--kv-bud=64"],
        ["--block_siz=16"],
        ["--additional-conf.kv_compression.method=rkv"],
    ],
)
def test_flags_that_contradict_the_benchmark_are_refused(flags):
    with pytest.raises(ValueError, match=r"^--.*got .*wanted .*; "):
        split_engine_flags(["--enforce-eager", *flags])


def test_a_value_may_contain_any_word():
    flags = ["--download-dir=/x/kv_compression", "--served-model-name", "kv_compression"]
    flags += ["--additional-config", '{"other": 1}', "--load-format", "dummy"]
    assert split_engine_flags(flags) == (flags, {})


def test_a_second_value_after_a_flag_of_compression_is_refused():
    wanted = "^ENGINE_FLAGS: got '9' after --kv-window, wanted a flag; remove it$"
    with pytest.raises(ValueError, match=wanted):
        split_engine_flags(["--kv-window", "8", "9"])


@pytest.mark.parametrize("flags", [["--kv-window"], ["--kv-window", "eight"]])
def test_a_flag_of_compression_without_its_value_is_refused(flags):
    with pytest.raises(ValueError, match=r"--kv-window.*(expected|wanted) "):
        split_engine_flags(flags)
