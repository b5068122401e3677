"""docs/tests.md names every public failure of our list, and only tests that are there."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "tests.md"
GITHUB = "https://github.com/"
# The repositories and numbers of the list that docs/tests.md goes by.
REPORTS = [
    *(f"SalesforceAIResearch/Random-Attention {number}" for number in ("1", "2", "3 and 4")),
    "SalesforceAIResearch/Random-Attention caveats",
    "Zefan-Cai/R-KV 25",
    *(f"vllm-project/vllm {number}" for number in (49449, 48245, 47900, 46066, 49674)),
    "vllm-project/vllm-ascend 16315",
    *(f"vllm-project/vllm {number}" for number in (25538, 37307, 39734)),
    *(f"vllm-project/vllm {number}" for number in (30916, 31955, 42619, 29045)),
    "WeianMao/triattention 24",
]


def rows() -> list[tuple[str, str, str]]:
    """(report, test, when) of each row; a row without a report goes on with the last one."""
    found, report = [], ""
    for line in TABLE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 4 or "::" not in cells[2]:
            continue
        report = cells[0] or report
        found.append((report, cells[2].strip("`"), cells[3]))
    return found


@cache
def functions_of(path: str) -> dict[str, bool]:
    """The tests of a file, and whether they are nightly ones."""
    tree = ast.parse((ROOT / path).read_text())
    marks = [
        ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    ]
    whole_file = any("mark.nightly" in mark for mark in marks)
    return {
        node.name: whole_file
        or any(ast.unparse(d) == "pytest.mark.nightly" for d in node.decorator_list)
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }


def named(report: str) -> set[str]:
    """What a cell of the first column links to, as it is written in `REPORTS`."""
    names = set()
    for text, url in re.findall(r"\[([^\]]+)\]\(([^)]+)\)", report):
        assert url.startswith(GITHUB), url
        owner, repository, kind, number = url.removeprefix(GITHUB).split("/")[:4]
        if kind == "tree":
            number = text.split(", ", 1)[1]
        else:
            assert kind in ("issues", "pull")
            assert text.endswith(f" {number}"), text
        names.add(f"{owner}/{repository} {number}")
    return names


def test_every_public_failure_of_the_list_is_in_the_table_and_no_other():
    assert set().union(*(named(report) for report, _, _ in rows())) == set(REPORTS)


@pytest.mark.parametrize(("report", "test", "when"), rows(), ids=lambda cell: cell[-40:])
def test_every_test_of_the_table_is_there_and_runs_when_it_says(report, test, when):
    path, name = test.split("::")
    assert name in functions_of(path)
    assert when == ("nightly" if functions_of(path)[name] else "daily")
    assert named(report)


def test_tests_that_re_enact_failures_are_all_in_the_table_and_name_the_report():
    in_table: dict[str, set[str]] = {}
    for report, test, _ in rows():
        in_table.setdefault(test, set()).update(re.findall(r"\d{4,}", report))
    for path in sorted(ROOT.glob("tests/**/test_bugs_*.py")):
        relative = path.relative_to(ROOT).as_posix()
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            docstring = ast.get_docstring(node) or ""
            assert GITHUB in docstring, node.name
            for number in in_table[f"{relative}::{node.name}"]:
                assert number in docstring, (node.name, number)
