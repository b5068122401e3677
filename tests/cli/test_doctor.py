"""`doctor` and a start never disagree: both ask the same code, and the tests hold them together."""

import json
import logging
import subprocess
import sys
from logging.handlers import BufferingHandler

import pytest
from typer.testing import CliRunner

from rkv_vllm.cli import app, diagnosis
from rkv_vllm.cli.diagnosis import examine
from rkv_vllm.cli.doctor import _print
from rkv_vllm.cli.errors import CommandError
from rkv_vllm.cli.inspection import inspection_failures
from rkv_vllm.fit.refusals import REFUSALS
from rkv_vllm.kernels import native
from tests import checkpoint_configs
from tests.checkpoint_configs import LLAMA, write_config


@pytest.fixture
def model(tmp_path):
    return write_config(tmp_path / "model", LLAMA)


def refused(findings):
    return [finding for finding in findings if finding.status == "refused"]


def by_name(findings):
    return {(finding.topic, finding.name): finding for finding in findings}


def test_this_environment_and_a_plain_model_are_fine(model):
    findings = list(examine(model, ()))
    assert refused(findings) == []
    found = by_name(findings)
    assert found["plugin", "entry point"].message == "rkv = rkv_vllm.plugin:register"
    assert found["device", "platform"].message.startswith("cpu")
    assert found["model", "model runner"].message.startswith("V1")
    assert found["model", "compaction"].status == "ok"
    features = [finding for finding in findings if finding.topic == "features"]
    assert len(features) == len(REFUSALS)


STARTS = {
    "4-bit cache": (LLAMA, ["--kv-cache-dtype", "nvfp4"]),
    "two at once": (LLAMA, ["--kv-cache-dtype", "nvfp4", "--kv-sharing-fast-prefill"]),
    "micro-batching": (LLAMA, ["--enable-dbo"]),
    "pooling": (LLAMA, ["--runner", "pooling", "--convert", "embed"]),
    "budget": (LLAMA, ["--kv-budget", "8"]),
    "scheduler": (LLAMA, ["--scheduler-cls", "some.Other"]),
    "length": (LLAMA, ["--max-model-len", "999999"]),
    "windows": (checkpoint_configs.ALL_WINDOWS, []),
    "latent": (checkpoint_configs.LATENT, []),
    "alibi": (checkpoint_configs.ALIBI, []),
    "cross-attention": (checkpoint_configs.CROSS_ATTENTION, []),
    "no heads": ({**LLAMA, "num_attention_heads": 0}, []),
    "unknown family": ({**LLAMA, "model_type": "no-such-family"}, []),
}


@pytest.mark.parametrize(("checkpoint", "flags"), STARTS.values(), ids=STARTS)
def test_what_a_start_refuses_is_refused_in_the_same_words(tmp_path, checkpoint, flags):
    model = write_config(tmp_path / "model", checkpoint)
    with pytest.raises(Exception) as error:  # noqa: PT011
        diagnosis._engine_args(model, flags).create_engine_config()
    found = refused(examine(model, flags))
    assert found
    for finding in found:
        sentence = finding.message.removeprefix(f"{type(error.value).__name__}: ")
        assert sentence in " ".join(str(error.value).split())
    own = [line for line in str(error.value).splitlines() if "does not support" in line]
    assert {finding.message for finding in found} >= set(own)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--kv-budget", "512"],
        ["--kv-cache-dtype", "fp8"],
        ["--tensor-parallel-size", "2", "--max-model-len", "1024"],
    ],
    ids=str,
)
def test_what_a_start_takes_is_not_refused(model, flags):
    diagnosis._engine_args(model, flags).create_engine_config()
    assert refused(examine(model, flags)) == []


@pytest.mark.parametrize("flags", [["--kv-budgie", "2"], ["--kv-budget", "many"], ["--block-size"]])
def test_flags_that_vllm_serve_does_not_take_are_refused(model, flags):
    with pytest.raises(CommandError, match="ENGINE_FLAGS: ") as error:
        list(examine(model, flags))
    assert error.value.exit_code == 2


def test_a_model_that_is_never_compacted_is_noted(model):
    found = by_name(examine(model, ["--max-model-len", "1100"]))
    assert found["model", "compaction"].status == "note"
    assert "lower --kv-budget" in found["model", "compaction"].message


def test_variables_count_as_in_a_start(model, monkeypatch):
    monkeypatch.setenv("RKV_COMPRESSION", "recent")
    monkeypatch.setenv("RKV_BUDGET", "64")
    assert diagnosis._engine_args(model, ()).additional_config == {}
    found = by_name(examine(model, ["--kv-buffer", "16"]))
    assert found["model", "compaction"].message.startswith("budget 64, buffer 16,")
    monkeypatch.setenv("RKV_BUDGET", "many")
    (finding,) = refused(examine(model, ()))
    assert finding.message.startswith("RKV_BUDGET=many: --kv-budget (budget): got 'many'")


def test_a_plugin_that_vllm_will_not_load_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "VLLM_PLUGINS: got 'other', wanted 'rkv' in it" in diagnosis._plugin().message
    monkeypatch.setenv("VLLM_PLUGINS", "other,rkv")
    assert diagnosis._plugin().status == "ok"
    monkeypatch.setattr(diagnosis, "entry_points", lambda group: ())
    assert diagnosis._plugin().status == "refused"


def test_another_vllm_is_refused(monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.31.0")
    found = refused(examine(None, ()))
    assert [finding.name for finding in found] == ["vLLM's version", "vLLM's functions"]


def test_an_unknown_platform_is_refused(monkeypatch):
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "device_name", "rocm")
    assert "got 'rocm'" in by_name(examine(None, ()))["device", "platform"].message


def test_missing_kernels_are_noted_and_broken_ones_refused(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    assert diagnosis._cpp_kernels().status == "note"

    def broken():
        raise OSError("no such symbol")

    monkeypatch.setattr(native, "library", broken)
    assert diagnosis._cpp_kernels().status == "refused"


def test_a_vllm_that_cannot_be_imported_is_refused(monkeypatch, model):
    monkeypatch.setitem(sys.modules, "vllm", None)
    last = list(examine(model, ()))[-1]
    assert (last.name, last.status) == ("import vllm", "refused")


def test_the_runner_that_the_environment_asks_for_is_named(monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    assert diagnosis._default_runner() == "V2: VLLM_USE_V2_MODEL_RUNNER=1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/model"], "MODEL: got 'no/such/model', wanted"),
        (["--", "--kv-budget"], "MODEL: got '--kv-budget', wanted a model before the flags"),
    ],
)
def test_bad_input_ends_with_one_line(arguments, message):
    result = CliRunner().invoke(app, ["doctor", *arguments])
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_json_is_all_that_stands_on_standard_output(model):
    command = [sys.executable, "-m", "rkv_vllm.cli", "doctor", model, "--json"]
    done = subprocess.run(
        [*command, "--", "--kv-cache-dtype", "nvfp4"], capture_output=True, text=True, check=False
    )
    document = json.loads(done.stdout)
    assert done.returncode == 1, done.stderr
    assert document["ok"] is False
    messages = [f["message"] for f in document["findings"] if f["status"] == "refused"]
    assert len(messages) == 1
    assert "wanted auto, fp8, fp8_e4m3, fp8_e5m2; pass one of these" in messages[0]


def test_the_table_is_silent_about_what_is_refused_and_not_in_use(model, capsys):
    _print(list(examine(model, ["--kv-cache-dtype", "nvfp4"])), model, refused=True)
    table = capsys.readouterr().out
    assert "features" in table
    assert "does not support this KV" in " ".join(table.split())
    assert "not in use" not in table
    assert "micro-batching" not in table
    _print(list(examine(model, ())), model, refused=False)
    assert "features" not in capsys.readouterr().out


IMPORTS = {
    "No module named 'torchvision'": "pip install torchvision",
    "No module named 'PIL.Image'": "pip install pillow",
}


@pytest.mark.parametrize(("why", "cure"), IMPORTS.items(), ids=IMPORTS)
def test_a_class_that_vllm_cannot_import_is_one_sentence_and_no_log(why, cure):
    logger = logging.getLogger("vllm.model_executor.models.registry")
    logged = BufferingHandler(100)
    logger.addHandler(logged)
    with inspection_failures() as failures:
        try:
            raise RuntimeError(f"Error raised:\nTraceback\n  File x\nModuleNotFoundError: {why}\n")
        except RuntimeError:
            logger.exception("Error in inspecting model architecture '%s'", "SomeModel")
        logger.error("something else")
    logger.removeHandler(logged)
    assert [record.getMessage() for record in logged.buffer] == ["something else"]
    (sentence,) = failures
    assert sentence.startswith("vLLM cannot import SomeModel, this model's class: Module")
    assert why in sentence
    assert sentence.endswith(cure)
