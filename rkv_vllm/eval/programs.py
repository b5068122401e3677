"""Generated problems: a small program to be executed step by step, a line for each iteration.

A transcript is long and redundant, each line needs the one before and a number of the program in
the prompt, and the last one is right or wrong beyond dispute: what a cache forgets shows. Knows no
model.
"""

import random
from itertools import accumulate

from rkv_vllm.eval.question import Problem

_QUESTION = """Execute this Python program step by step.

```python
x = {numbers}
total = {start}
for i in range({num_steps}):
    total = total + x[i]
print(total)
```

Write one line for each iteration of the loop and nothing else, then what the program prints, \
exactly in this form:
{first_lines}
...
Answer: <what is printed>"""
# Small models slip at sums with a carry, and find their number by its index only.
_LARGEST = 5


def make_programs(count: int, num_steps: int, seed: int) -> list[Problem]:
    """Returns programs with a loop of `num_steps` iterations, and what they print.

    Args:
        count: problems wanted.
        num_steps: iterations of each loop.
        seed: the same seed gives the same programs, fewer of them a part of more.
    """
    return [_program(num_steps, f"{num_steps}-{seed}-{number}") for number in range(count)]


def _program(num_steps: int, identity: str) -> Problem:
    rng = random.Random(identity)
    start, *numbers = (rng.randint(1, _LARGEST) for _ in range(num_steps + 1))
    totals = list(accumulate(numbers, initial=start))
    lines = [
        f"i={i}: x[i]={x}, total={t}"
        for i, (x, t) in enumerate(zip(numbers, totals[1:], strict=True))
    ]
    table = "{" + ", ".join(f"{i}: {x}" for i, x in enumerate(numbers)) + "}"
    question = _QUESTION.format(
        numbers=table, start=start, num_steps=num_steps, first_lines="\n".join(lines[:2])
    )
    return Problem("trace", identity, question, str(totals[-1]), "integer")
