"""The walk that looks for leftovers sees what is nested and what it is told to leave."""

import re
from dataclasses import dataclass, field

import pytest

from tests.leftovers import assert_nothing_is_left, container_sizes


@dataclass(slots=True)
class Inner:
    known: dict[str, list[int]] = field(default_factory=dict)
    near: set[str] = field(default_factory=set)


class Outer(dict):
    def __init__(self) -> None:
        self.tracks = ((1, Inner()),)
        self.finished_reports = []


for ours in (Inner, Outer):
    ours.__module__ = "rkv_vllm.made_up"


@pytest.mark.parametrize(
    ("path", "fill"),
    [
        ("tracks[0][1].known", lambda outer: outer.tracks[0][1].known.update(r=[])),
        ("tracks[0][1].near", lambda outer: outer.tracks[0][1].near.add("r")),
        ("tracks", lambda outer: setattr(outer, "tracks", [1])),
        ("finished_reports", lambda outer: outer.finished_reports.extend(range(257))),
    ],
)
def test_whatever_holds_more_than_at_the_start_is_named(path, fill):
    outer = Outer()
    before = container_sizes(outer)
    outer.finished_reports.extend(range(256))
    assert_nothing_is_left(before, outer)
    fill(outer)
    with pytest.raises(AssertionError, match=re.escape(f"'Outer.{path}'")):
        assert_nothing_is_left(before, outer)
