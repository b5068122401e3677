"""slots: physical slots, lengths and rows to observe of a step; everything else is padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rkv_vllm.kernels.slots import StepRows, StepSlots
from rkv_vllm.kernels.slots.naive import slots_naive
from rkv_vllm.kernels.slots.triton import slots_triton

MAX_REQS, MAX_TOKENS, MAX_BLOCKS, BLOCK_SIZE, RING = 6, 40, 12, 4, 5


def garbage() -> StepSlots:
    return StepSlots(
        torch.full((MAX_TOKENS,), 77, dtype=torch.int64),
        torch.full((MAX_TOKENS,), 77, dtype=torch.int32),
        torch.full((MAX_REQS,), 77, dtype=torch.int32),
    )


@st.composite
def steps(draw):
    """A step of some requests: (request states, tokens, lengths before, evicted, slots)."""
    states = draw(st.permutations(range(MAX_REQS)))[: draw(st.integers(0, MAX_REQS))]
    tokens = [draw(st.integers(1, 6)) for _ in states]
    lengths = [draw(st.integers(0, 30)) for _ in states]
    evicted = [draw(st.integers(0, length)) for length in lengths]
    slots = [draw(st.integers(-1, 2)) for _ in states]
    is_padding = [draw(st.integers(0, 9)) == 0 for _ in states]
    return states, tokens, lengths, evicted, slots, is_padding


@settings(max_examples=60, deadline=None)
@given(steps())
def test_triton_equals_the_reference(step):
    states, tokens, lengths, evicted, slots, is_padding = step
    state_idx = torch.tensor(
        [-1 if padding else state for state, padding in zip(states, is_padding, strict=True)],
        dtype=torch.int64,
    )
    query_start_loc = torch.tensor([0, *torch.tensor(tokens).cumsum(0).tolist()], dtype=torch.int32)
    positions = torch.zeros(MAX_TOKENS, dtype=torch.int64)
    num_evicted = torch.zeros(MAX_REQS, dtype=torch.int32)
    watched = torch.full((MAX_REQS,), -1, dtype=torch.int32)
    rows = zip(states, tokens, lengths, evicted, slots, query_start_loc.tolist(), strict=False)
    for state, count, length, gone, slot, first in rows:
        positions[first : first + count] = torch.arange(length, length + count)
        num_evicted[state], watched[state] = gone, slot
    table = torch.randperm(MAX_REQS * MAX_BLOCKS).view(MAX_REQS, MAX_BLOCKS).int()
    step_rows = StepRows(state_idx, query_start_loc, num_evicted, watched, RING)
    results = []
    for version in (slots_naive, slots_triton):
        out = garbage()
        version(step_rows, positions, table, BLOCK_SIZE, out)
        results.append(out)
    for name in ("slot_mapping", "token_rows", "seq_lens"):
        assert getattr(results[0], name).equal(getattr(results[1], name)), name


@pytest.mark.parametrize("version", [slots_naive, slots_triton])
def test_a_compacted_and_watched_request(version):
    """Worked by hand: 3 tokens at logical 20..22, of which 13 were evicted, beside a decode."""
    out = garbage()
    table = torch.arange(MAX_REQS * MAX_BLOCKS, dtype=torch.int32).view(MAX_REQS, -1)
    positions = torch.tensor([20, 21, 22, 5] + [0] * (MAX_TOKENS - 4))
    rows = StepRows(
        torch.tensor([4, 1]),
        torch.tensor([0, 3, 4], dtype=torch.int32),
        torch.tensor([0, 0, 0, 0, 13, 0], dtype=torch.int32),
        torch.tensor([-1, -1, 0, -1, 2, -1], dtype=torch.int32),
        RING,
    )
    version(rows, positions, table, BLOCK_SIZE, out)
    first_block = 4 * MAX_BLOCKS
    physical_7_8_9 = [(first_block + 1) * 4 + 3, (first_block + 2) * 4, (first_block + 2) * 4 + 1]
    assert out.slot_mapping[:4].tolist() == [*physical_7_8_9, (MAX_BLOCKS + 1) * 4 + 1]
    assert out.token_rows[:4].tolist() == [10, 11, 12, -1]
    assert out.seq_lens.tolist() == [10, 6, 0, 0, 0, 0]
    assert (out.slot_mapping[4:] == -1).all()
    assert (out.token_rows[4:] == -1).all()
