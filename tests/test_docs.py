"""What README and docs/ name exists: files, flags, targets of make, commands."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import rkv_vllm
from rkv_vllm.cli import app
from rkv_vllm.flags import OPTION_FLAG
from rkv_vllm.options import OPTIONS, flagged_method_options

ROOT = Path(rkv_vllm.__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
VLLMS_FLAGS = {"--kv-cache-dtype", "--kv-cache-memory-bytes", "--kv-transfer-config"}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"(?m)^#+ (.+)$", page.read_text())
    return {re.sub(r"[^\w -]", "", text).strip().lower().replace(" ", "-") for text in headings}


def links(page: Path) -> Iterator[tuple[Path, str]]:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            yield (page.parent / path if path else page), anchor


@every_page
def test_every_link_leads_somewhere(page):
    for target, anchor in links(page):
        assert target.exists(), target
        assert not anchor or anchor in anchors(target), (target, anchor)


def test_every_page_is_found_from_the_readme():
    reached = set()
    to_visit = {PAGES[0]}
    while to_visit:
        page = to_visit.pop()
        reached.add(page)
        found = {target.resolve() for target, _ in links(page) if target.suffix == ".md"}
        to_visit |= {each for each in found if each in PAGES} - reached
    assert reached == set(PAGES)


@every_page
def test_flags_of_ours_targets_and_commands_exist(page):
    text = page.read_text()
    ours = {option.flag for option in {**OPTIONS, **flagged_method_options()}.values()}
    flags = set(re.findall(r"--kv-[a-z-]*[a-z]", text))
    # One that is named as the former spelling of another.
    former = set(re.findall(r"was `(--kv-[a-z-]+)`", text))
    assert flags - former <= ours | VLLMS_FLAGS | {OPTION_FLAG, "--kv-some-thing"}
    makefile = (ROOT / "Makefile").read_text()
    for line in re.findall(r"(?m)(?:^|`)make ((?:[a-z0-9.-]+ ?)+)", text):
        for target in line.split():
            assert re.search(rf"(?m)^{re.escape(target)}:", makefile), target
    commands = {command.name for command in app.registered_commands}
    assert set(re.findall(r"\brkv-vllm ([a-z]+)(?= [A-Zm.-]|`)", text)) <= commands


def test_the_readmes_tree_names_what_exists():
    tree = (ROOT / "README.md").read_text().split("## Files\n```\n")[1].split("```")[0]
    names = set(re.findall(r"\b[a-z_0-9]+\.(?:py|md)\b", tree))
    assert len(names) > 60
    folders = ("rkv_vllm", "kernels", "tests", "examples", "benchmarks", "docs")
    found = {path.name for folder in folders for path in (ROOT / folder).rglob("*.*")}
    assert names <= found
