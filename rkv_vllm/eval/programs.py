"""Generated problems: small programs to be executed step by step, a line for each iteration.

A transcript is long and redundant, each line needs the one before and the program in the prompt,
and the last number is right or wrong beyond dispute: what a cache forgets shows. Knows no model.
"""

import random
from collections.abc import Iterator

from rkv_vllm.eval.question import Problem

_QUESTION = """Execute this Python program step by step.

```python
{program}
```

Write one line for every iteration of the loop, with the values after it, in this form:
{first_line}
After the last iteration write what the program prints."""


def make_programs(count: int, num_steps: int, seed: int) -> list[Problem]:
    """Returns programs with a loop of `num_steps` iterations, and what they print.

    Args:
        count: problems wanted.
        num_steps: iterations of each loop.
        seed: the same seed gives the same programs, fewer of them a part of more.
    """
    return [_program(num_steps, f"{seed}-{number}") for number in range(count)]


def _program(num_steps: int, identity: str) -> Problem:
    rng = random.Random(f"{identity}-{num_steps}")
    start, limit = rng.randrange(10, 60), rng.randrange(60, 100)
    up, down = rng.randrange(3, 9), rng.randrange(10, 30)
    program = f"""a = {start}
for i in range(1, {num_steps + 1}):
    if a > {limit}:
        a = a - {down}
    else:
        a = a + {up}
print(a)"""
    values = list(_run(start, limit, up, down, num_steps))
    question = _QUESTION.format(program=program, first_line=f"i=1: a={values[0]}")
    return Problem("trace", identity, question, str(values[-1]), "integer")


def _run(a: int, limit: int, up: int, down: int, num_steps: int) -> Iterator[int]:
    for _ in range(num_steps):
        a = a - down if a > limit else a + up
        yield a
