"""Every loop is found, wherever it is cut; text that only looks alike is not taken for one."""

import math
import re
import subprocess
import sys
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rkv_vllm.scheduling.repetition import MAX_PERIOD, MIN_COPIES, MIN_TOKENS, tail_repeats

PERIODS = st.integers(1, MAX_PERIOD)


def tokens_of_loop(period: int) -> int:
    """Fewest tokens that are a loop."""
    return max(MIN_TOKENS, MIN_COPIES * period)


def repeated(block: Sequence[int], length: int) -> list[int]:
    return [*block * math.ceil(length / len(block))][:length]


def has_a_period(token_ids: Sequence[int]) -> bool:
    """The definition, one token at a time."""
    return any(
        tokens_of_loop(period) <= len(token_ids)
        and all(
            token_ids[-i] == token_ids[-i - period]
            for i in range(1, tokens_of_loop(period) - period + 1)
        )
        for period in range(1, MAX_PERIOD + 1)
    )


@given(period=PERIODS, before=st.integers(0, 300), more=st.integers(0, 300), seed=st.integers())
@example(period=1, before=0, more=0, seed=0)
@example(period=MAX_PERIOD, before=0, more=0, seed=0)
@example(period=MAX_PERIOD, before=7, more=1, seed=0)
def test_a_repeated_block_is_found_wherever_it_is_cut(period, before, more, seed):
    random = Random(seed)
    block = [random.randrange(5) for _ in range(period)]
    loop = repeated(block, tokens_of_loop(period) + more)
    assert tail_repeats([*(random.randrange(5) for _ in range(before)), *loop])


@given(period=PERIODS, seed=st.integers())
@example(period=1, seed=0)
@example(period=MIN_TOKENS // MIN_COPIES + 1, seed=0)
def test_one_token_less_or_another_one_is_no_loop(period, seed):
    block = Random(seed).sample(range(10_000), period)
    loop = repeated(block, tokens_of_loop(period))
    assert tail_repeats(loop)
    assert not tail_repeats(loop[1:])
    assert not tail_repeats([*loop, -1])
    assert not tail_repeats([-1, *loop[1:]])
    changed = Random(seed).randrange(len(loop))
    assert not tail_repeats([*loop[:changed], -1, *loop[changed + 1 :]])


@pytest.mark.parametrize("period", [MAX_PERIOD + 1, 2 * MAX_PERIOD])
def test_blocks_longer_than_the_longest_are_not_looked_for(period):
    assert not tail_repeats([*range(period)] * MIN_COPIES)


@given(
    seed=st.integers(),
    vocabulary=st.sampled_from([1, 2, 3, 50]),
    pieces=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 400)), max_size=4),
    num_last=st.sampled_from([0, 0, 1, 10]),
)
def test_says_what_the_definition_says(seed, vocabulary, pieces, num_last):
    random = Random(seed)
    token_ids = []
    for period, length in [*pieces, (num_last or 1, num_last)]:
        block = [random.randrange(vocabulary) for _ in range(period)]
        token_ids += repeated(block, length)
        # A new token after a loop; or the block again, so that two loops of one block meet.
        token_ids += random.choice([[], [], [vocabulary], block])
    assert tail_repeats(token_ids) == tail_repeats(tuple(token_ids)) == has_a_period(token_ids)


@given(seed=st.integers(), vocabulary=st.sampled_from([2, 10, 50_000]), length=st.integers(0, 2000))
def test_random_text_is_no_loop(seed, vocabulary, length):
    random = Random(seed)
    assert not tail_repeats([random.randrange(vocabulary) for _ in range(length)])


def trace(num_steps: int, seed: int) -> str:
    """A program executed step by step, whose variables keep their values most of the time."""
    random, a, b, lines = Random(seed), 3, 5, []
    for step in range(num_steps):
        lines.append(f"step {step}: a = {a}, b = {b}, so a < b is {a < b} and nothing changes")
        if random.random() < 0.2:
            a, b = b, (a + b) % 7
    return "\n".join(lines)


TEXTS = {
    "trace": trace(200, seed=0),
    "trace of a state that never changes": "\n".join(f"i = {i}: x = 0" for i in range(300)),
    "table": "\n".join(f"| {i} |" + " |" * 12 for i in range(60)),
    "multiplication table": "\n".join(f"{i} * {j} = {i * j}" for i in range(20) for j in range(20)),
    "list": "\n".join(f"{i}. The next number is {i * i}." for i in range(200)),
    "ruler": "Results\n" + "-" * 100 + "\n| a | b |\n|" + "---|" * 20 + "\n" + "=" * 100,
    "digits": "1/3 = 0." + "3" * 100 + ", 1/7 = 0." + "142857" * 20,
    "code": "def f(rows):\n"
    + "".join(" " * 4 * d + f"for i{d} in rows[{d}]:\n" for d in range(1, 20))
    + " " * 80
    + "total += 1\n" * 3,
    "three equal paragraphs": "Wait, let me check this once more. It is as I said. So it holds. "
    * 3,
    "identity matrix": "\n".join(
        " & ".join(str(int(i == j)) for j in range(12)) + r" \\" for i in range(12)
    ),
}


@pytest.mark.parametrize("as_tokens", [list, re.compile(r"\d|\w+|\s+|[^\w\s]").findall])
@pytest.mark.parametrize("name", TEXTS)
def test_text_that_looks_alike_is_no_loop_at_any_moment(name, as_tokens):
    pieces = as_tokens(TEXTS[name])
    ids = {piece: i for i, piece in enumerate(set(pieces))}
    token_ids = [ids[piece] for piece in pieces]
    assert not any(tail_repeats(token_ids[:end]) for end in range(len(token_ids) + 1))
    # Whoever says it again and again is in a loop.
    again = repeated(token_ids[-MAX_PERIOD:], tokens_of_loop(MAX_PERIOD))
    assert tail_repeats([*token_ids, *again])


def test_neither_vllm_nor_torch_is_imported():
    code = (
        "import sys, rkv_vllm.scheduling.repetition; "
        "assert not {'vllm', 'torch', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
