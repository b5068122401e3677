"""The benchmarks run, check before they boast, and refuse a ratio that would mean nothing."""

import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.children import Launcher
from benchmarks.gpu.comparisons import compare_outputs
from benchmarks.pairs_visited import Tile, share_visited, similar_and_newest
from benchmarks.released_formulation import released_scores
from rkv_vllm.methods import available_methods
from tests.methods.dense import scores

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"

# Keeps the best candidate twice and another one not at all.
WRONG_SELECT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import bench_kernels, kernel_versions
right = kernel_versions.ops_for
def ops_for(states, window=8):
    ops = right(states, window)
    def select(scores, batch):
        keep = ops.select(scores, batch)
        keep[:, :, 1] = keep[:, :, 0]
        return keep
    return ops._replace(select=select)
kernel_versions.ops_for = ops_for
bench_kernels.main(sys.argv[1:])
"""


def run_child(*command: str) -> tuple[int, str, dict]:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ, capture_output=True, text=True
    )
    assert done.stdout, done.stderr
    return done.returncode, done.stdout, json.loads(done.stdout.splitlines()[-1])


def test_the_kernel_benchmark_checks_then_times_and_ends_with_json():
    rc, shown, document = run_child(str(BENCHMARKS / "bench_kernels.py"), "--smoke")
    assert rc == 0
    assert document["failed_checks"] == []
    (case,) = document["cases"]
    assert set(case["checks"].values()) == {"ok"}
    assert case["speedup"].keys() == {"naive", "released", "released, by head"}
    assert "x faster than released" in shown
    kinds = {"random", "clustered"}
    kinds |= {f"{kind}, centred" for kind in kinds}
    assert {row["keys"] for row in document["pairs_visited"]} == kinds
    assert document["observe"][0]["failed_checks"] == []


def test_the_method_benchmark_times_every_method_beside_rkv():
    rc, shown, document = run_child(str(BENCHMARKS / "bench_methods.py"), "--smoke")
    assert rc == 0
    assert document["failed_checks"] == []
    (table,) = document["tables"]
    methods = {name.partition(",")[0] for name in table["times_rkv"]}
    assert methods == {*available_methods()} - {"recent"}
    assert table["times_rkv"]["rkv"] == 1.0
    assert "x rkv" in shown


def test_a_wrong_kernel_gets_no_speedup_and_a_failing_exit_code():
    rc, shown, document = run_child("-c", WRONG_SELECT, str(BENCHMARKS), "--smoke")
    assert rc == 1
    (case,) = document["cases"]
    assert "select" in document["failed_checks"]
    assert case["speedup"] is None
    assert "x faster" not in shown


def test_the_n_by_n_version_that_does_not_fit_is_reported_with_its_bytes():
    limit = ["--memory-limit-gib", "0.00001"]
    rc, shown, document = run_child(str(BENCHMARKS / "bench_kernels.py"), "--smoke", *limit)
    assert rc == 0
    (case,) = document["cases"]
    assert case["speedup"].keys() == {"naive"}
    assert "does not fit" in shown
    assert case["released_bytes_per_head"] == 96 * 96 * 9


@pytest.mark.parametrize("in_flight", [pytest.param("1", marks=pytest.mark.nightly), "2"])
def test_the_scheduler_benchmark_wants_every_due_compaction_booked(in_flight):
    options = ["--requests", "9", "--steps", "70", "--round", "7", "--buffer", "16"]
    script = str(BENCHMARKS / "bench_scheduler.py")
    rc, shown, document = run_child(script, *options, "--in-flight", in_flight)
    assert (rc, document["failed"]) == (0, [])
    far, compacting = document["cases"]
    assert (far["ours"]["compactions"], far["wanted_compactions"]) == (0, 0)
    # Prompts of 256 to 264 tokens; after 71 steps 326 to 334 are computed, due from 272 on.
    assert compacting["ours"]["compactions"] == compacting["wanted_compactions"] >= 9 * 3
    assert far["ratio"] > 0 < compacting["ratio"]
    assert "far from due" in shown


IDLE_SCHEDULER = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import bench_scheduler
from rkv_vllm.scheduling.planner import GroupPlanner
GroupPlanner.plan_step = lambda *_: None
bench_scheduler.main()
"""


def test_a_scheduler_that_books_nothing_gets_no_ratio():
    options = ["--requests", "3", "--steps", "70", "--buffer", "16"]
    rc, _, document = run_child("-c", IDLE_SCHEDULER, str(BENCHMARKS), *options)
    assert rc == 1
    assert document["cases"][1]["ratio"] is None
    assert "3 requests, compacting: 0 compactions booked, wanted" in document["failed"][0]


def test_the_released_formulation_scores_like_ours():
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(6, 150, 32, generator=generator) + torch.randn(6, 1, 32, generator=generator)
    queries = torch.randn(18, 8, 32, generator=generator)
    for heads_at_once in (6, 4):
        got = released_scores(keys, queries, window=8, heads_at_once=heads_at_once)
        torch.testing.assert_close(got, scores(keys, queries), rtol=1e-4, atol=1e-7)


def test_pairs_visited_are_counted_per_tile():
    keys = torch.eye(8)
    keys[7] = keys[5]
    similar, newest = similar_and_newest(keys)
    assert newest.tolist() == [-1, -1, -1, -1, -1, 7, -1, 5]
    assert similar == pytest.approx(2 / 56)
    # Rows 0 to 3 find nothing; rows 4 and 6 make rows 5 and 7 go on to the end.
    assert share_visited(newest, Tile(4, 2)) == 1.0
    # Alone, row 5 sees columns 6 and 7, row 7 sees 4 to 7.
    assert share_visited(newest, Tile(1, 2)) == pytest.approx((6 * 8 + 2 + 4) / 64)
    # In steps of three from token 0 the newest one has two columns.
    assert share_visited(newest, Tile(1, 3)) == pytest.approx((6 * 8 + 5 + 2) / 64)


def new_output(token_ids: list[int], logprobs: list[float], compactions: int = 3) -> dict:
    return {"token_ids": [token_ids], "logprobs": [logprobs], "compactions": compactions}


EXPECTED = new_output([1, 2, 3], [-1.0, -2.0, -3.0])


@pytest.mark.parametrize(
    ("got", "dtype", "is_equal"),
    [
        (EXPECTED, "float32", True),
        (new_output([1, 2, 4], [-1.0, -2.0, -3.0]), "float32", False),
        (new_output([1, 2, 3], [-1.0, -2.1, -3.0]), "float32", False),
        (new_output([1, 2, 3], [-1.0, -2.0, -3.0], compactions=2), "float32", False),
        # A toss-up, and what follows it is another text.
        (new_output([1, 4, 9], [-1.0, -3.4, -9.0]), "float16", True),
        (new_output([1, 4, 9], [-1.0, -3.6, -9.0]), "float16", False),
    ],
)
def test_outputs_are_equal_token_for_token_but_for_tossups_of_16_bits(got, dtype, is_equal):
    assert (not compare_outputs(got, EXPECTED, dtype)["problems"]) == is_equal


def test_nothing_compacted_is_not_equal():
    idle = new_output([1, 2, 3], [-1.0, -2.0, -3.0], compactions=0)
    assert compare_outputs(idle, idle, "float32")["problems"] == ["nothing was compacted"]


WRITE = "from pathlib import Path; Path('name.json').write_text('{}')"


@pytest.mark.parametrize(
    ("code", "limit", "rc", "problem"),
    [
        (WRITE, 60, 0, None),
        (f"{WRITE}; raise OSError('no disk')", 60, 1, "exit status 1: .*no disk"),
        (f"{WRITE}; import time; time.sleep(600)", 3, None, "stopped after [3-9] s"),
        ("print(3)", 60, 0, "no result"),
    ],
)
def test_a_child_that_fails_keeps_its_partial_result_and_says_why(
    tmp_path, code, limit, rc, problem
):
    script = tmp_path / "child.py"
    script.write_text(code)
    child = Launcher(tmp_path, {}, deadline=time.monotonic() + 100).run("name", script, [], limit)
    assert child.rc == rc
    assert child.result == (None if problem == "no result" else {})
    assert (child.problem is None) if problem is None else re.search(problem, child.problem)


def test_a_package_from_elsewhere_is_a_problem(tmp_path):
    script = tmp_path / "child.py"
    launcher = Launcher(tmp_path, {}, deadline=time.monotonic() + 100)
    for package, is_right in ((tmp_path / "site" / "a.py", True), ("/elsewhere/a.py", False)):
        script.write_text(f"""print('{{"package": "{package}"}}')""")
        child = launcher.run("name", script, [], 60)
        assert (child.problem is None) == is_right


def rehearsed(tmp_path, *phases: str) -> dict:
    """What verify.py keeps of these phases; children fail unless they import its copy."""
    script = str(BENCHMARKS / "gpu" / "verify.py")
    done = subprocess.run(
        [sys.executable, script, "--rehearse", "--phases", ",".join(phases)],
        env={**os.environ, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout.splitlines()[-1])
    document = json.loads((tmp_path / "verify.json").read_text())
    # What is shown is the document without its numbers.
    assert [(c["name"], c["ok"]) for c in shown["checks"]] == [
        (c["name"], c["ok"]) for c in document["checks"]
    ]
    assert len(done.stdout.splitlines()[-1]) < 12_000
    return document


def test_verify_checks_a_copy_of_the_package_and_keeps_document_and_logs(tmp_path):
    document = rehearsed(tmp_path, "sanitizer")
    assert [(check["name"], check["ok"]) for check in document["checks"]] == [("sanitizer", True)]
    with tarfile.open(tmp_path / "logs.tgz") as archive:
        assert archive.getnames() == ["sanitizer.log"]


@pytest.mark.nightly
@pytest.mark.engine
def test_verify_serves_every_load_on_one_engine_per_side(tmp_path):
    document = rehearsed(tmp_path, "serving")
    names = [check["name"].partition(",")[0] for check in document["checks"]]
    assert names == ["ample", "ample", "starved", "starved", "long outputs", "ample again"]
    for check in document["checks"]:
        stock, ours = check["numbers"]["stock"], check["numbers"]["rkv"]
        assert check["numbers"]["ratio"] == ours["tokens_per_s"] / stock["tokens_per_s"]
        assert ours["compactions"] > stock["compactions"] == 0
        assert 0 < ours["flush_share"] < 1
    starved = [check["numbers"]["stock"] for check in document["checks"][2:4]]
    assert [run["pool_blocks"] for run in starved] == [2048 // 32, 1024 // 32]
    # The small pool is short of blocks, the large one is not.
    assert [run["preemptions"] > 0 for run in starved] == [False, True]
    assert starved[1]["peak_blocks"] <= 1024 // 32 < starved[0]["peak_blocks"]
