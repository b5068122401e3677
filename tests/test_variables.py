"""Options from the environment: what each variable sets, what holds against it, what is refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from vllm.engine.arg_utils import EngineArgs

import rkv_vllm
from rkv_vllm.bench.processes import child_environment
from rkv_vllm.options import ServerOptions
from rkv_vllm.plugin import register
from rkv_vllm.variables import METHOD_OPTIONS, complete, options_of_variables, read_variables
from tests.checkpoint_configs import LLAMA, write_config
from tests.test_flags import FLAGS, OPTIONS_OF_FLAGS

ROOT = Path(rkv_vllm.__file__).parents[1]
OF_CONTAINERS = {"PATH": "/bin", "KV_BUDGET": "9", "VLLM_PORT": "8000"}
# What Kubernetes sets in every container beside a service that is called "rkv" or "rkv-vllm".
OF_KUBERNETES = {
    "RKV_PORT": "tcp://10.0.0.1:8000",
    "RKV_SERVICE_HOST": "10.0.0.1",
    "RKV_SERVICE_PORT": "8000",
    "RKV_PORT_8000_TCP_ADDR": "10.0.0.1",
    "RKV_VLLM_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "RKV_VLLM_SERVICE_PORT_HTTP": "8000",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    register()
    return write_config(tmp_path_factory.mktemp("llama"), LLAMA)


def of_flags() -> dict[str, str]:
    """`FLAGS` as variables."""
    variables = {}
    for flag in FLAGS:
        name, _, value = flag.removeprefix("--kv-").partition("=")
        variables[f"RKV_{name.replace('-', '_').upper()}"] = value or "true"
    return variables


def compression(model, **arguments) -> dict | None:
    made = EngineArgs(model=model, skip_tokenizer_init=True, **arguments).create_engine_config()
    return made.additional_config.get("kv_compression")


def test_every_flag_has_a_variable_that_makes_the_same_engine(model, monkeypatch):
    variables = of_flags()
    assert variables.keys() == {*options_of_variables(), METHOD_OPTIONS}
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    assert json.dumps(compression(model)) == json.dumps(OPTIONS_OF_FLAGS)


def test_without_a_variable_nothing_is_switched_on(model, monkeypatch):
    for name, text in {**OF_CONTAINERS, **OF_KUBERNETES, "RKV_BUDGET": ""}.items():
        monkeypatch.setenv(name, text)
    assert compression(model) is None
    assert read_variables({**OF_CONTAINERS, **OF_KUBERNETES, "RKV_COMPRESSION": ""}) == {}
    given = {"method": "rkv"}
    assert complete(given, OF_KUBERNETES) is given


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RKV_COMPRESS_PROMPT": "1"}, {"compress_prompt": True}),
        ({"RKV_COMPRESS_PROMPT": "True"}, {"compress_prompt": True}),
        ({"RKV_COMPRESS_PROMPT": "0"}, {"compress_prompt": False}),
        ({"RKV_PROTECT": "prompt"}, {"protect": "prompt"}),
        ({"RKV_PROTECT": "16"}, {"protect": 16}),
        ({"RKV_SWAP_SPACE": "4"}, {"swap_space": 4.0}),
        ({"RKV_THRESHOLD": "-0.5"}, {"options": {"threshold": -0.5}}),
        ({"RKV_OPTION": " lam=0.5  center=true "}, {"options": {"lam": "0.5", "center": "true"}}),
        ({"RKV_BUDGET": "9", "RKV_COMPRESSION": "off"}, {}),
        ({"RKV_BUDGET": "many", "RKV_COMPRESSION": "off"}, {}),
    ],
    ids=str,
)
def test_a_text_is_read_by_the_type_of_its_option(variables, expected):
    assert read_variables({**OF_CONTAINERS, **OF_KUBERNETES, **variables}) == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RKV_BUDGET": "many"}, "RKV_BUDGET=many: .*got 'many', wanted a whole number of tokens"),
        ({"RKV_BUDGET": "64.5"}, "RKV_BUDGET=64.5: .*wanted a whole number"),
        ({"RKV_BUDGET": "-1"}, "RKV_BUDGET=-1: .*got -1, wanted .*; change it"),
        ({"RKV_WHEN": "ALWAYS"}, "RKV_WHEN=ALWAYS: .*wanted 'always' or 'pressure'"),
        ({"RKV_COMPRESS_PROMPT": "yes"}, "RKV_COMPRESS_PROMPT=yes: .*wanted true or false"),
        ({"RKV_COMPRESSION": "on"}, "RKV_COMPRESSION=on: .*wanted one of"),
        ({"RKV_COMPRESSION": "true"}, "RKV_COMPRESSION=true: "),
        ({"RKV_POOL": "4"}, "RKV_POOL=4: .*wanted an odd number"),
        ({"RKV_OPTION": "lam"}, "RKV_OPTION: got 'lam', wanted name=value"),
        ({"RKV_BUGDET": "64"}, "RKV_BUGDET: .*; write RKV_BUDGET"),
        ({"RKV_KV_BUDGET": "64"}, "RKV_KV_BUDGET: .*; write RKV_BUDGET"),
        ({"RKV_COMPRESION": "rkv"}, "RKV_COMPRESION: .*; write RKV_COMPRESSION"),
        ({"RKV_OPTIONS": "lam=1"}, "RKV_OPTIONS: .*; write RKV_OPTION"),
        ({"RKV_BUDGET": "64"}, "RKV_BUDGET: got options .*; set RKV_COMPRESSION=rkv"),
        ({"RKV_OPTION": "lam=1", "RKV_SEATS": "2"}, "RKV_OPTION, RKV_SEATS: got options"),
        ({"RKV_COMPRESSION": "rkv", "RKV_BUDGET": "8"}, "budget.*got 8, wanted more tokens than"),
    ],
    ids=str,
)
def test_a_bad_variable_is_named_before_anything_is_made(model, monkeypatch, variables, message):
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=message):
        compression(model)


def test_flags_and_json_hold_against_the_environment(model, monkeypatch):
    for name, text in {"COMPRESSION": "rkv", "BUDGET": "64", "LAMBDA": "0.5"}.items():
        monkeypatch.setenv(f"RKV_{name}", text)
    given = {"budget": 96, "options": {"pool": 5}}
    made = compression(model, additional_config={"kv_compression": given, "other": 1})
    assert made == ServerOptions(budget=96, lam=0.5, pool=5).to_dict()
    # These spell out every option.
    assert compression(model, **rkv_vllm.engine_args()) == ServerOptions().to_dict()
    monkeypatch.setenv("RKV_COMPRESSION", "off")
    assert compression(model) is None


def test_a_child_does_what_its_command_line_says(monkeypatch):
    # Else the stock side of a benchmark would be compressed.
    monkeypatch.setenv("RKV_COMPRESSION", "rkv")
    monkeypatch.setenv("RKV_BUDGET", "64")
    assert read_variables(child_environment()) == {}


@pytest.mark.nightly
def test_serve_with_a_bad_variable_exits_before_the_model_is_looked_at(model):
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    env = {**os.environ, "RKV_COMPRESSION": "rkv", "RKV_BUDGET": "many"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert run.returncode == 1, run.stderr[-2000:]
    assert "RKV_BUDGET=many: --kv-budget (budget): got 'many', wanted a whole" in run.stderr
    assert "Resolved architecture" not in run.stdout + run.stderr


def test_the_containers_of_dockerfile_and_docs_are_compressed():
    texts = [(ROOT / "Dockerfile").read_text(), (ROOT / "docs" / "operations.md").read_text()]
    for text in texts:
        variables = dict(re.findall(r" -e (RKV_[A-Z_]+)=(\S+)", text))
        assert variables.keys() >= {"RKV_COMPRESSION", "RKV_BUDGET"}
        read = ServerOptions.from_dict(read_variables(variables))
        assert read.budget != ServerOptions().budget
