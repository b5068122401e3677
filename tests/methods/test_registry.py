import subprocess
import sys
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest

from rkv_vllm import methods
from rkv_vllm.methods import CompressionMethod, available_methods, get_method
from rkv_vllm.methods.rkv import RKV


class Newest(CompressionMethod):
    """What a file of another distribution may hold."""

    @classmethod
    def from_config(cls, config):
        return cls()

    def keep_indices(self, keys, values, queries, budget):
        raise NotImplementedError


@pytest.fixture
def register(monkeypatch):
    """Pretend that exactly the given name=value pairs are installed."""
    module = ModuleType("other_distribution")
    module.Newest = Newest
    module.number = 7
    monkeypatch.setitem(sys.modules, "other_distribution", module)

    def pretend(**values):
        def entry_points(*, group):
            return tuple(EntryPoint(name, value, group) for name, value in values.items())

        monkeypatch.setattr(methods, "entry_points", entry_points)

    return pretend


def test_rkv_is_there_without_distribution_metadata(register):
    register()
    assert available_methods() == ["rkv"]
    assert get_method("rkv") is RKV


def test_rkv_is_there_once_when_the_metadata_lists_it_too(register):
    register(rkv="rkv_vllm.methods.rkv:RKV")
    assert available_methods() == ["rkv"]
    assert get_method("rkv") is RKV


def test_another_distribution_adds_a_method(register):
    register(newest="other_distribution:Newest")
    assert available_methods() == ["newest", "rkv"]
    assert get_method("newest") is Newest
    assert get_method("rkv") is RKV


def test_unknown_name_lists_the_available_ones(register):
    register(newest="other_distribution:Newest")
    with pytest.raises(ValueError, match=r"unknown .* 'snap'; available: newest, rkv"):
        get_method("snap")


def test_the_group_of_the_entry_points_is_the_documented_one(monkeypatch):
    asked = []
    monkeypatch.setattr(methods, "entry_points", lambda *, group: asked.append(group) or ())
    available_methods()
    assert asked == ["rkv_vllm.methods"]


def test_a_name_registered_twice_is_refused(register):
    register(rkv="other_distribution:Newest")
    with pytest.raises(ValueError, match="'rkv' is registered twice"):
        get_method("rkv")


def test_an_entry_that_is_no_method_is_refused(register):
    register(newest="other_distribution:number")
    with pytest.raises(TypeError, match="other_distribution:number"):
        get_method("newest")


def test_a_method_must_implement_the_interface():
    with pytest.raises(TypeError, match="abstract"):
        type("Half", (CompressionMethod,), {})()


def test_importing_the_method_does_not_import_vllm():
    code = "import rkv_vllm.methods.rkv, sys; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
