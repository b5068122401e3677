"""vLLM's version, Python's version and the platform are one truth in the code and its metadata."""

import re
import tomllib
from pathlib import Path

import pytest
import vllm
from packaging.specifiers import SpecifierSet
from vllm.platforms import current_platform

import rkv_vllm
from rkv_vllm.fit.versions import SUPPORTED_VLLM, check_vllm_version

ROOT = Path(rkv_vllm.__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "0.34.0rc1.dev2+g123", "1.0.0"])
def test_untested_vllm_version_is_refused_before_the_model_loads(arguments, monkeypatch, version):
    engine_args = arguments()
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(ValueError, match=rf"got {re.escape(version)}, wanted >=0.32.0,<0.34; run"):
        engine_args.create_engine_config()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.0+cpu", "0.32.1rc1", "0.33.0"])
def test_tested_vllm_version_is_accepted(monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    check_vllm_version()


def test_platform_without_a_worker_is_refused(arguments, monkeypatch):
    engine_args = arguments()
    monkeypatch.setattr(type(current_platform), "device_name", "rocm")
    with pytest.raises(
        ValueError, match="no worker for this platform: got 'rocm', wanted one of cpu, cuda"
    ):
        engine_args.create_engine_config()
    with pytest.raises(ValueError, match="got 'rocm'"):
        rkv_vllm.engine_args()


def test_requirement_of_the_package_is_the_supported_range():
    (required,) = [
        each for each in PYPROJECT["project"]["dependencies"] if each.startswith("vllm>")
    ]
    minors = {f"0.{minor}.{patch}" for minor in range(28, 40) for patch in (0, 3)}
    got = SpecifierSet(required.removeprefix("vllm"))
    assert set(got.filter(minors)) == set(SpecifierSet(SUPPORTED_VLLM).filter(minors))


def test_python_version_is_the_same_everywhere():
    project = PYPROJECT["project"]
    oldest = project["requires-python"].removeprefix(">=")
    assert f"Programming Language :: Python :: {oldest}" in project["classifiers"]
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    assert f"Python {oldest}" in (ROOT / "README.md").read_text()
    stand_in = tomllib.loads((ROOT / "packaging/vllm-cpu-dist/pyproject.toml").read_text())
    assert stand_in["project"]["requires-python"] == project["requires-python"]
