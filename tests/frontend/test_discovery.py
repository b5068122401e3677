"""vLLM finds our stat logger exactly while compression and its own statistics are on."""

import sys
from importlib.metadata import distributions, entry_points
from pathlib import Path

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import STAT_LOGGER_PLUGINS_GROUP, load_plugins_by_group
from vllm.v1.metrics.loggers import load_stat_logger_plugin_factories

import rkv_vllm
from rkv_vllm import plugin
from rkv_vllm.frontend.discovery import show_stat_logger
from rkv_vllm.frontend.stat_logger import CompressionStatLogger
from tests.checkpoint_configs import LLAMA, write_config


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    plugin.register()
    return write_config(tmp_path_factory.mktemp("llama"), LLAMA)


@pytest.fixture(autouse=True)
def _hidden():
    show_stat_logger(False)
    yield
    show_stat_logger(False)


def make_config(model: str, compression: bool, **options) -> None:
    if compression:
        options |= rkv_vllm.engine_args(budget=96, buffer=32)
    EngineArgs(model=model, skip_tokenizer_init=True, **options).create_engine_config()


def test_only_the_engine_config_decides(model):
    assert load_stat_logger_plugin_factories() == []
    make_config(model, compression=True)
    assert load_stat_logger_plugin_factories() == [CompressionStatLogger]
    make_config(model, compression=True)
    assert load_stat_logger_plugin_factories() == [CompressionStatLogger]
    make_config(model, compression=False, disable_log_stats=True)
    assert load_stat_logger_plugin_factories() == []
    make_config(model, compression=False)
    assert load_stat_logger_plugin_factories() == []


def test_a_config_without_compression_hides_nothing_from_one_made_before(model):
    # Both engines may be made after both configs. Without compression the logger shows nothing.
    make_config(model, compression=True)
    make_config(model, compression=False)
    assert load_stat_logger_plugin_factories() == [CompressionStatLogger]


def test_disabled_statistics_stay_disabled(model):
    # Any plugin in the group would switch them on again.
    make_config(model, compression=True, disable_log_stats=True)
    assert load_stat_logger_plugin_factories() == []


def test_installing_the_package_declares_no_stat_logger():
    pyproject = Path(rkv_vllm.__file__).parents[1] / "pyproject.toml"
    assert STAT_LOGGER_PLUGINS_GROUP not in pyproject.read_text()
    assert not entry_points(group=STAT_LOGGER_PLUGINS_GROUP)


def test_vllm_plugins_allows_our_two_plugins_together(monkeypatch):
    show_stat_logger(True)
    monkeypatch.setenv("VLLM_PLUGINS", "rkv")
    assert load_plugins_by_group(STAT_LOGGER_PLUGINS_GROUP) == {"rkv": CompressionStatLogger}
    assert "rkv" in load_plugins_by_group("vllm.general_plugins")
    monkeypatch.setenv("VLLM_PLUGINS", "something_else")
    assert load_stat_logger_plugin_factories() == []


def test_nothing_else_is_found_or_lost():
    before, finders = {each.metadata["Name"] for each in distributions()}, list(sys.meta_path)
    show_stat_logger(True)
    assert {each.metadata["Name"] for each in distributions()} - before == {"rkv-vllm-metrics"}
    with pytest.raises(ModuleNotFoundError):
        __import__("rkv_vllm_metrics")
    show_stat_logger(False)
    assert {each.metadata["Name"] for each in distributions()} == before
    assert sys.meta_path == finders
