"""A disk that is full or cannot be written: one line says so, and no part of a file is left."""

import json
import os
import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure
from typer.testing import CliRunner

from rkv_vllm.bench import plot as bench_plot
from rkv_vllm.cache_owners import write_owners
from rkv_vllm.cli import app
from rkv_vllm.cli import trace as trace_command
from rkv_vllm.cli.errors import CommandError
from rkv_vllm.eval import plot as eval_plot
from rkv_vllm.layer_budgets import LayerClass, write_classes
from rkv_vllm.methods.query_statistics import QueryStatistics
from rkv_vllm.whole_file import what_is_missing, whole_file
from tests.checkpoint_configs import LLAMA, write_config
from tests.disk import enlarge, fill, small_disk
from tests.eval.fake_server import fake_server


@pytest.fixture
def disk(tmp_path):
    (tmp_path / "disk").mkdir()
    with small_disk(tmp_path / "disk", 256 << 10) as folder:
        yield folder


def draw_without_document(plot, path, monkeypatch):
    monkeypatch.setattr(plot, "make_figure", lambda document: Figure(figsize=(2, 2)))
    plot.draw(path, {})


def save_statistics(path):
    ones = torch.ones(2, 2, 4)
    QueryStatistics("tiny", 1, 300, torch.ones(2), ones, torch.ones(2, 2, 2)).save(path)


WRITERS = {
    "bench.png": lambda path, patch: draw_without_document(bench_plot, path, patch),
    "eval.png": lambda path, patch: draw_without_document(eval_plot, path, patch),
    "budgets.json": lambda path, _: write_classes(path, "tiny", [LayerClass((0, 1), 1.0)]),
    "owners.json": lambda path, _: write_owners(path, "tiny", 2, {1: 0}),
    "statistics": lambda path, _: save_statistics(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_does_not_fit_leaves_the_older_one_as_it_was(disk, name, monkeypatch):
    path = disk / name
    path.write_bytes(b"older")
    fill(disk)
    with pytest.raises(OSError, match="No space left on device"):
        WRITERS[name](path, monkeypatch)
    assert sorted(os.listdir(disk)) == sorted([name, "filling"])
    assert path.read_bytes() == b"older"
    (disk / "filling").unlink()
    WRITERS[name](path, monkeypatch)
    assert os.listdir(disk) == [name]
    assert path.read_bytes() != b"older"


def test_whatever_interrupts_a_writer_leaves_nothing(tmp_path):
    def write() -> None:
        with whole_file(tmp_path / "plot.png") as half:
            half.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert os.listdir(tmp_path) == []


def test_what_a_path_lacks_is_found_out_by_trying(disk):
    (disk / "folder").mkdir()
    assert what_is_missing(disk / "file") is None
    assert what_is_missing(disk / "folder") == "a file, not a folder"
    assert what_is_missing(disk / "no" / "file") == "a file in a folder that exists"
    # Nobody but the kernel may write there, not even root, to whom `os.access` promises it.
    assert what_is_missing(disk.parent.joinpath("/proc/file")).startswith("a folder that can be")
    fill(disk)
    wanted = "a folder that can be written to (No space left on device)"
    assert what_is_missing(disk / "file") == wanted
    assert sorted(os.listdir(disk)) == ["filling", "folder"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "MODEL", "--gpu-memory", "80GiB", "--output-len", "9", "--plot", "DISK/p.png"],
        ["trace", "MODEL", "Hello", "--output", "DISK/trace.html"],
        ["calibrate", "MODEL", "--out", "DISK/statistics"],
        ["eval", "MODEL", "--base-url", "URL", "--plot", "DISK/p.png"],
        ["bench", "MODEL", "--plot", "DISK/p.png"],
    ],
    ids=lambda arguments: f"{arguments[0]} {arguments[-2]}",
)
def test_commands_say_so_before_they_begin(disk, tmp_path, arguments):
    model = write_config(tmp_path / "llama", LLAMA)
    fill(disk)
    names = {"MODEL": str(model), "URL": "http://127.0.0.1:9"}
    given = [names.get(each, each.replace("DISK", str(disk))) for each in arguments]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"Error: {arguments[-2]}: got ")
    assert "No space left on device" in line
    assert os.listdir(disk) == ["filling"]


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_output_into_a_full_disk_is_one_line_on_stderr(tmp_path, as_json):
    model = write_config(tmp_path / "llama", LLAMA)
    command = [sys.executable, "-m", "rkv_vllm.cli", "plan", str(model), *as_json]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*command, "--gpu-memory", "80GiB", "--output-len", "900"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: got No space left on device, wanted room for the output")


def test_a_plot_that_no_longer_fits_ends_plan_with_one_line(disk, tmp_path, monkeypatch):
    model = write_config(tmp_path / "llama", LLAMA)
    fill(disk)
    # As if the disk had filled up since.
    monkeypatch.setattr("rkv_vllm.cli.errors.what_is_missing", lambda path: None)
    plot = ["--plot", str(disk / "plan.png")]
    arguments = [str(model), "--gpu-memory", "80GiB", "--output-len", "900", "--json", *plot]
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: --plot: got [Errno 28] No space left on device")
    assert os.listdir(disk) == ["filling"]


def test_a_trace_that_no_longer_fits_leaves_no_page(disk, monkeypatch):
    fill(disk)
    monkeypatch.setattr("rkv_vllm.trace.page.render", lambda trace: bytes(5000))
    with pytest.raises(CommandError, match=r"^--output: got \[Errno 28\]") as raised:
        trace_command._write(disk / "trace.html", None)
    assert raised.value.exit_code == 1
    assert os.listdir(disk) == ["filling"]


def test_an_evaluation_out_of_room_keeps_whole_lines_and_goes_on_later(disk, tmp_path):
    rows = [{"question": f"{number}?", "answer": 5, "id": number} for number in range(40)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = disk / "out.jsonl"
    own = ["--problems", str(tmp_path / "mine.jsonl"), "--out", str(out), "--json"]
    with fake_server() as server:
        command = ["eval", "tiny", *own, "--base-url", server.url, "--budgets", "64"]
        fill(disk)
        refused = CliRunner().invoke(app, command)
        assert refused.exit_code == 2
        assert "--out: got [Errno 28] No space left on device" in refused.stderr
        (disk / "filling").write_bytes(bytes((256 << 10) - 4096))
        stopped = CliRunner().invoke(app, command)
        assert stopped.exit_code == 1, stopped.output
        last = stopped.stderr.splitlines()[-1]
        assert last.startswith("Error: --out: got No space left on device while writing ")
        assert "repeat the command" in last
        kept = out.read_bytes()
        assert kept.endswith(b"\n")
        lines = [json.loads(line) for line in kept.splitlines()]
        assert 2 <= len(lines) < 80
        enlarge(disk, 1 << 20)
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        assert out.read_bytes().startswith(kept)
        # Nobody was asked twice but those whose answers were under way when it stopped.
        assert 80 <= len(server.asked) <= 80 + 16
