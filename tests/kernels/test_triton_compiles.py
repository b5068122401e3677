"""Every Triton kernel compiles for a GPU: its interpreter accepts what the compiler does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


KERNELS = [
    "stats_kernel+IMPORTANCE+REDUNDANCY",
    "stats_kernel+IMPORTANCE+REDUNDANCY+CENTER",
    "stats_kernel+IMPORTANCE",
    "stats_kernel+REDUNDANCY",
    "combine_kernel+IMPORTANCE+REDUNDANCY",
    "combine_kernel+IMPORTANCE+REDUNDANCY+DEFENSIVE",
    "combine_kernel+IMPORTANCE+ADD",
    "sums_kernel",
    "mean_kernel",
    "search_kernel",
    "search_kernel+CENTER",
    "finish_kernel+IMPORTANCE+REDUNDANCY",
    "finish_kernel+IMPORTANCE+REDUNDANCY+DEFENSIVE",
    "finish_kernel+IMPORTANCE",
    "finish_kernel+IMPORTANCE+DEFENSIVE",
    "finish_kernel+REDUNDANCY",
    "average_kernel",
    "range_kernel",
    "select_kernel",
    "compact_kernel",
    "compact_kernel+BOTH",
    "slots_kernel",
    "observe_kernel",
    *(
        name.format(fp8)
        for fp8 in ("NATIVE", "E4M3", "E5M2")
        for name in (
            "stats_kernel+{}+IMPORTANCE+REDUNDANCY",
            "stats_kernel+{}+IMPORTANCE+REDUNDANCY+CENTER",
            "stats_kernel+{}+IMPORTANCE",
            "stats_kernel+{}+REDUNDANCY",
            "range_kernel+{}",
            "sums_kernel+{}",
            "search_kernel+{}",
            "search_kernel+{}+CENTER",
            "observe_kernel+{}",
        )
    ),
]


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> list[list[str]]:
    """The words of each line that compile_for_gpu.py prints."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_for_gpu"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    # Shown where a test fails: the kernels before a bad one have passed, the others have no line.
    print(done.stderr[-4000:])
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernel_compiles_for_an_h100(lines, kernel):
    files = [rest for word, name, *rest in lines if (word, name) == ("compiled", kernel)]
    # A cubin is what ptxas made: machine code for that GPU.
    assert len(files) == 1
    assert "cubin" in files[0]


@pytest.mark.parametrize("kernel", KERNELS)
def test_other_lengths_need_no_second_compilation(lines, kernel):
    # It would stop serving for a second in the middle of a request.
    assert ["reused", kernel] in lines
