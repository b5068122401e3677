"""Who runs when, and with which flags."""

import re

import pytest

from rkv_vllm.bench.sides import make_schedule, make_sides, split_engine_flags
from rkv_vllm.options import ServerOptions


def test_the_stock_side_has_no_flag_of_its_own():
    stock, first, second = make_sides((64, 128), 32, {"window": 16})
    assert (stock.name, stock.flags) == ("stock", ())
    assert first.name == "budget 64"
    assert first.flags == (
        *("--kv-compression=rkv", "--kv-budget=64", "--kv-buffer=32"),
        "--kv-window=16",
    )
    assert "--kv-budget=128" in second.flags


def test_sides_take_turns_and_their_order_turns_round():
    sides = make_sides((64, 128), 32, {})
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
    stock, compressed = make_sides((64,), 32, compression)
    assert stock.flags == ()
    assert {"--kv-window=4", "lam=0.3"} <= set(compressed.flags)
    # The compressed sides' flags say the same when vLLM reads them.
    _, again = split_engine_flags([f for f in compressed.flags if not re.match("--kv-bu", f)])
    assert ServerOptions(**again) == ServerOptions(**compression)


def test_an_abbreviated_method_is_that_of_the_compressed_sides():
    method = "rkv_vllm.methods.rkv.RKV"
    common, compression = split_engine_flags([f"--kv-comp={method}"])
    assert (common, compression) == ([], {"method": method})
    assert f"--kv-compression={method}" in make_sides((64,), 32, compression)[1].flags


@pytest.mark.parametrize(
    "flags",
    [
        ["--kv-budget", "64"],
        ["--kv_buffer=64"],
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
