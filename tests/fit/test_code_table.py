"""A release that changes the code of what we rest on is noticed; comments are not code."""

import ast
import json
import tarfile
import time
import zipfile

import pytest
import vllm
from packaging.version import Version

from rkv_vllm.cli import diagnosis
from rkv_vllm.fit import code_table
from rkv_vllm.fit.code_hash import code_hash
from rkv_vllm.fit.overrides import MISSING
from rkv_vllm.fit.source import Source
from scripts.vllm_signatures import opened
from tests.fit.conftest import OFF

PLAIN = """
@decorate
def chosen(a, b=1, *, c=None):
    total = a + b
    if c: return f"{total:>{b}} ü"
    return total
"""
# Of PLAIN, under every Python from 3.10 to 3.13.
PLAIN_HASH = "fcb5ff5158f53fc6"

SAME = {
    "comments, layout": """
@decorate
def chosen(
    a, b = 1, *,
    c = None,
):
    # Adds.
    total = (a
             + b)
    if c:
        return f'{total:>{b}} \\u00fc'
    return total
""",
    "types, docstring": '''
@decorate
def chosen(a: int, b: int = 1, *, c: str | None = None) -> int | str:
    """Adds two numbers."""
    total: int = a + b
    other: str
    if c: return f"{total:>{b}} ü"
    return total
''',
}
OTHER = {
    "operator": PLAIN.replace("a + b", "a - b"),
    "value": PLAIN.replace("b=1", "b=2"),
    "text": PLAIN.replace("ü", "u"),
    "name": PLAIN.replace("c=None", "d=None"),
    "decorator": PLAIN.replace("@decorate", "@cache"),
    "statement less": PLAIN.replace("    if c: ", "    "),
    "a first statement that is no text": PLAIN.replace("    total", "    1\n    total", 1),
}
# A dataclass takes a name with a type as a field, and one without as a mere value.
FIELD = "class Kept:\n    first: int\n    second: int = 1\n"
OTHER_FIELD = {
    "field less": "class Kept:\n    second: int = 1\n",
    "no field": FIELD.replace("second: int", "second"),
}


def hashed(text):
    return code_hash(ast.parse(text).body[0])


def test_hash_of_a_text_is_the_same_under_every_python():
    assert hashed(PLAIN) == PLAIN_HASH


@pytest.mark.parametrize("text", SAME.values(), ids=SAME)
def test_what_python_does_not_run_is_not_hashed(text):
    assert hashed(text) == PLAIN_HASH


@pytest.mark.parametrize("text", OTHER.values(), ids=OTHER)
def test_other_code_has_another_hash(text):
    assert hashed(text) != PLAIN_HASH


def test_fields_of_a_class_are_code_and_their_types_are_not():
    assert hashed(FIELD.replace("int", "str")) == hashed(FIELD)
    assert hashed(FIELD) not in [hashed(text) for text in OTHER_FIELD.values()]


# What a start says. Most of the table of the installed release is as installed.

TESTED = Version(vllm.__version__).public
MINOR = TESTED.rpartition(".")[0]
CHANGED = "vllm.v1.core.block_pool:BlockPool.touch"
GONE = "vllm.v1.core.block_pool:BlockPool.no_such_function"


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """A folder with a table, two of whose functions the installed vLLM has not so."""
    table = json.loads(code_table.table_path(TESTED).read_text())
    few = dict(list(table.items())[:3]) | {CHANGED: "0" * 16, GONE: "1" * 16}
    (tmp_path / f"code-{TESTED}.json").write_text(json.dumps(few))
    (tmp_path / "code-0.31.9.json").write_text(json.dumps({GONE: MISSING}))
    monkeypatch.setattr(code_table, "FOLDER", tmp_path)
    code_table.compare.cache_clear()
    yield tmp_path
    code_table.compare.cache_clear()


@pytest.mark.parametrize("patch", ["1", "3.dev7+g123", "1rc1"])
def test_a_patch_release_with_other_code_is_a_warning_that_names_it(
    arguments, monkeypatch, tables, warnings, patch
):
    monkeypatch.setattr(vllm, "__version__", f"{MINOR}.{patch}")
    arguments().create_engine_config()
    (warning,) = warnings
    assert warning.startswith(f"vLLM {MINOR}.{patch}: 2 of 5 functions")
    told = f"have other code than in {TESTED}, with which it was tested: {CHANGED}, {GONE}"
    assert told in warning
    assert f'docs/versions.md), or run: pip install "vllm=={TESTED}"' in warning


def test_a_patch_release_with_the_same_code_is_no_warning_and_doctor_says_so(
    arguments, monkeypatch, warnings
):
    monkeypatch.setattr(vllm, "__version__", f"{MINOR}.7")
    arguments().create_engine_config()
    assert warnings == []
    verdict = diagnosis._code(code_table.compare(f"{MINOR}.7"))
    assert verdict.status == "ok"
    assert verdict.message.endswith(f" functions as in {TESTED}")


@pytest.mark.parametrize("version", [TESTED, f"{TESTED}+cpu"])
def test_a_release_that_has_a_table_costs_no_start_anything(
    arguments, monkeypatch, tables, warnings, version
):
    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.setattr(code_table, "Source", None)
    code_table.warn_of_changed_code()
    started = time.perf_counter()
    code_table.warn_of_changed_code()
    assert time.perf_counter() - started < 0.05
    arguments().create_engine_config()
    assert warnings == []


def test_nothing_is_compared_while_compression_is_off(arguments, monkeypatch, tables, warnings):
    monkeypatch.setattr(vllm, "__version__", f"{MINOR}.1")
    monkeypatch.setattr(code_table, "Source", None)
    arguments(**OFF).create_engine_config()
    assert warnings == []


def test_the_nearest_older_release_of_the_minor_version_is_compared(tables):
    for release in (f"{MINOR}.4", "0.41.1"):
        (tables / f"code-{release}.json").write_text(json.dumps({GONE: MISSING}))
    assert code_table.compare(f"{MINOR}.3").release == TESTED
    assert code_table.compare(f"{MINOR}.5") == (f"{MINOR}.4", 1, ())
    assert code_table.compare("0.41.0").release == "0.41.1"
    assert code_table.compare("0.42.0") is None


def test_doctor_shows_what_a_build_has_changed_whatever_it_calls_itself(tables):
    status, message = diagnosis._code(code_table.compare(vllm.__version__))
    assert status == "note"
    assert f"{CHANGED}, {GONE}" in message


def test_an_sdist_a_zip_file_and_a_folder_are_read_alike(tmp_path):
    package = tmp_path / "sdist-1.0" / "vllm"
    package.mkdir(parents=True)
    (package / "_version.py").write_text("__version__ = version = '1.0'\n")
    (package / "one.py").write_text(PLAIN)
    with tarfile.open(tmp_path / "sdist-1.0.tar.gz", "w:gz") as archive:
        archive.add(package.parent, "sdist-1.0")
    with zipfile.ZipFile(tmp_path / "wheel.whl", "w") as wheel:
        for path in package.iterdir():
            wheel.write(path, f"vllm/{path.name}")
    for path in (package.parent, tmp_path / "sdist-1.0.tar.gz", tmp_path / "wheel.whl"):
        with opened(path) as found:
            assert isinstance(found, Source)
            assert found.version() == "1.0"
            assert found.code_hash("vllm.one:chosen") == PLAIN_HASH
            assert found.code_hash("vllm.one:other") == MISSING
