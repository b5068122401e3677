"""Caches beyond 2**31 elements: every offset into them has 64 bits.

In a process of its own, because a wrapped offset is a crash. The 4 GiB that it maps are virtual:
of them a few pages are ever touched.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FAR_OFFSETS = """
import sys
import torch
from rkv_vllm.kernels.batch import Eviction, EvictionBatch
from rkv_vllm.kernels.ops import cpu_ops, naive_ops, triton_ops
from rkv_vllm.kernels.paged import PagedStates
from tests.kernels.cases import Case, random_keep, rkv_scores

# The third block, layer or head begins behind 2**31 elements; the others lie together.
FAR = 2**30 + 512
memory = torch.empty(2 * FAR + 4096, dtype=torch.bfloat16)
for shape, strides in (
    ((1, 3, 1, 16, 16), (0, FAR, 0)),
    ((3, 3, 1, 16, 16), (FAR, 256, 0)),
    ((1, 3, 3, 16, 16), (0, 256, FAR)),
):
    states = PagedStates(memory.as_strided(shape, (*strides, 16, 1)), None, 16)
    keys = torch.randn(shape[0], shape[2], 40, 16).bfloat16()
    states.write(torch.tensor([2, 0, 1]), keys)
    eviction = Eviction([2, 0, 1], [2, 0], 40, 40, 20, 5, seat=0, window_end=40)
    queries = torch.randn(1, shape[0], 9, 2 * shape[2], 16).bfloat16()
    case = Case(states, EvictionBatch.of([eviction], 8, "cpu"), [keys], queries, [])
    ops = {"triton": triton_ops, "cpu": lambda states: cpu_ops()}[sys.argv[1]](states)
    expected = rkv_scores(case, naive_ops(states))
    torch.testing.assert_close(rkv_scores(case, ops), expected, rtol=1e-4, atol=1e-7)
    keep = random_keep(case.batch, shape[0] * shape[2])
    ops.compact(states, case.batch, keep)
    assert torch.equal(states.read(torch.tensor([2, 0]), 25), case.kept_and_tail(keep, 0))
print("right")
"""


@pytest.mark.parametrize("version", ["cpu", "triton"])
def test_offsets_beyond_31_bits_of_blocks_layers_and_heads_are_right(version):
    command = [sys.executable, "-c", FAR_OFFSETS, version]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr
