"""A method in a folder of its own, with options that this package has never heard of."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

import rkv_vllm
from rkv_vllm.options import ServerOptions
from rkv_vllm.request_options import RequestOptionError, read_request_options
from tests.checkpoint_configs import LLAMA, write_config
from tests.models import random_prompt
from tests.server import Server, serving

NAME = "keep_spread.KeepSpread"
SOURCE = '''\
"""Keeps every so many-th token, and of the others the newest or the oldest ones."""

from dataclasses import dataclass

import torch

from rkv_vllm.methods import DenseMethod, option


class KeepSpread(DenseMethod):
    @dataclass(frozen=True)
    class Options:
        stride: int = option(
            2,
            "Distance of the tokens that are kept first.",
            wanted="2 to 9 tokens",
            accepts=lambda tokens: 2 <= tokens <= 9,
            per_request=True,
        )
        oldest: bool = option(False, "Whether the oldest of the others stay.")

    def score_dense(self, keys, values, queries, layer, eviction):
        place = torch.arange(keys.shape[1], dtype=torch.float32, device=keys.device)
        age = -place if self.options.oldest else place
        spread = len(place) * (place % self.options.stride == 0)
        return (spread + age).expand(keys.shape[:2])
'''
LISTING = (
    f"The method '{NAME}' has these options:\n"
    "  stride: Distance of the tokens that are kept first. Takes 2 to 9 tokens. (default: 2)\n"
    "  oldest: Whether the oldest of the others stay. Takes true or false. (default: False)"
)
BAD_OPTIONS = [
    ({"stride": "many"}, "--kv-option stride: got 'many', wanted 2 to 9 tokens; change it"),
    ({"stride": 2.0}, "--kv-option stride: got 2.0, wanted 2 to 9 tokens; change it"),
    ({"stride": True}, "--kv-option stride: got True, wanted 2 to 9 tokens; change it"),
    ({"stride": None}, "--kv-option stride: got None, wanted 2 to 9 tokens; change it"),
    ({"stride": "10"}, "--kv-option stride: got 10, wanted 2 to 9 tokens; change it"),
    ({"oldest": "yes"}, "--kv-option oldest: got 'yes', wanted true or false; change it"),
    ({"oldest": 1}, "--kv-option oldest: got 1, wanted true or false; change it"),
    ({"strid": 3}, f"--kv-option: got 'strid', wanted an option of the method '{NAME}'; correct"),
]
BAD_REQUESTS = [
    ("stride=10", "2 to 9 tokens for stride"),
    ("stride=", "2 to 9 tokens for stride"),
    (["stride=3", "oldest=true"], "options that a request can set: stride"),
    ("strid=3", "options that a request can set: stride"),
    ("stride", 'a text such as "name=value"'),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "keep_spread.py").write_text(SOURCE)
    return folder


@pytest.fixture
def importable(folder, monkeypatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(folder)
    yield
    del sys.modules["keep_spread"]


def test_the_method_is_short():
    assert len(SOURCE.splitlines()) - SOURCE.count("\n\n") <= 25


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize(
    "arguments",
    [
        {"stride": 3, "oldest": True},
        {"options": {"stride": 3, "oldest": True}},
        {"options": {"stride": "3", "oldest": "True"}},
        {"options": {"stride": 3}, "oldest": True},
    ],
    ids=str,
)
def test_every_spelling_gives_the_same_options(arguments):
    made = rkv_vllm.engine_args(NAME, budget=48, **arguments)
    own = made["additional_config"]["kv_compression"]
    assert own == ServerOptions(budget=48).to_dict() | {
        "method": NAME,
        "options": {"stride": 3, "oldest": True},
    }
    assert ServerOptions.from_dict(json.loads(json.dumps(own))).method_options.oldest is True


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=str)
def test_what_cannot_be_is_refused_with_a_list_of_what_there_is(options, message):
    with pytest.raises(ValueError, match="wanted") as refused:
        ServerOptions(method=NAME, options=options)
    assert str(refused.value).startswith(message)
    assert str(refused.value).endswith("\n" + LISTING)


@pytest.mark.usefixtures("importable")
def test_options_of_another_method_are_refused_with_the_list():
    with pytest.raises(ValueError, match="--kv-option: got 'lam', wanted an option of") as refused:
        ServerOptions(method=NAME, lam=0.5)
    assert str(refused.value).endswith(LISTING)


@pytest.mark.usefixtures("importable")
def test_a_request_brings_its_own_value_of_what_it_may_set():
    server = ServerOptions(method=NAME, options={"stride": 3, "oldest": True})
    own = read_request_options({"kv_option": "stride=5"}, server).method_options
    assert own == type(server.method_options)(stride=5, oldest=True)
    assert read_request_options({"kv_budget": 64}, server).method_options is None
    for value, wanted in BAD_REQUESTS:
        with pytest.raises(RequestOptionError, match=f"wanted {wanted}") as refused:
            read_request_options({"kv_option": value}, server)
        assert refused.value.key == "kv_option"
        assert str(refused.value).endswith("\n" + LISTING)


def test_a_request_cannot_need_queries_where_none_are_recorded(folder, monkeypatch):
    """Its compaction would find none and end the engine for everybody."""
    source = SOURCE.replace("import DenseMethod", "import DenseMethod, Need") + (
        "\n    @classmethod\n    def need(cls, options):\n"
        "        return Need(queries=options.stride > 4)\n"
    )
    monkeypatch.syspath_prepend(folder)
    (folder / "keep_seen.py").write_text(source)
    without, recording = (
        ServerOptions(method="keep_seen.KeepSpread", options={"stride": n}) for n in (2, 9)
    )
    wanted = "wanted values that need no queries, .* record none"
    with pytest.raises(RequestOptionError, match=wanted) as refused:
        read_request_options({"kv_option": "stride=5"}, without)
    assert refused.value.key == "kv_option"
    for server, stride in ((without, 4), (recording, 5), (recording, 3)):
        own = read_request_options({"kv_option": f"stride={stride}"}, server)
        assert own.method_options.stride == stride


@pytest.mark.usefixtures("importable")
def test_an_option_without_a_spelling_on_the_command_line_is_refused(folder):
    source = "from keep_spread import *\nclass Bad(KeepSpread):\n    @dataclass(frozen=True)\n"
    (folder / "bad_type.py").write_text(source + "    class Options:\n        x: list = None\n")
    with pytest.raises(ValueError, match=r"Bad.Options.x: got the type list, wanted one of int, "):
        ServerOptions(method="bad_type.Bad")


@pytest.mark.nightly
def test_serve_with_a_bad_option_exits_before_the_model_is_looked_at(folder, tmp_path):
    model = write_config(tmp_path / "model", LLAMA)
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    run = subprocess.run(
        [*command, f"--kv-compression={NAME}", "--kv-option", "stride=10"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )
    assert run.returncode != 0
    assert BAD_OPTIONS[4][1] in run.stderr
    assert "  oldest: Whether the oldest of the others stay." in run.stderr
    assert "Resolved architecture" not in run.stdout + run.stderr


@pytest.fixture(scope="module")
def server(random_model_dir, folder) -> Iterator[Server]:
    flags = (f"--kv-compression={NAME}", "--kv-option", "stride=3", "oldest=true")
    lengths = ("--kv-budget=64", "--kv-buffer=32", "--kv-max-request-tokens=400")
    model, env = random_model_dir("qwen3", 3), {"PYTHONPATH": str(folder)}
    with serving(model, *flags, *lengths, env=env) as server:
        yield server


@pytest.mark.engine
def test_requests_of_one_server_are_compacted_with_their_own_values(server):
    before, said = server.stats()["compactions"], {}
    for own in ({}, {"kv_option": "stride=3"}, {"kv_option": "stride=7"}):
        xargs = {"extra_body": {"vllm_xargs": own}} if own else {}
        choice = server.complete(random_prompt(70, seed=3), 180, **xargs).choices[0]
        said[own.get("kv_option")] = choice.token_ids
    assert said[None] == said["stride=3"] != said["stride=7"]
    assert server.stats()["compactions"] - before >= 3 * 3


@pytest.mark.engine
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("value", "wanted"), BAD_REQUESTS, ids=str)
def test_a_bad_value_gets_400_with_the_list(server, value, wanted, stream):
    answer = requests.post(
        f"{server.base_url}/v1/completions",
        json={
            "model": server.model,
            "prompt": "x",
            "stream": stream,
            "vllm_xargs": {"kv_option": value},
        },
        timeout=60,
    )
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "kv_option"
    assert error["message"].startswith(f"kv_option: got {value!r}, wanted {wanted}")
    assert LISTING in error["message"]
