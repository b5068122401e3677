"""Beam search under load waits in the queue once for every token, with stock vLLM as with us.

vLLM makes requests of one token each, one for every beam and step, and all of them line up behind
whoever waits.
"""

from itertools import count

import pytest

from tests.models import random_model
from tests.scheduling.simulation import Setting, SimulatedEngine

WIDTH = 4
NUM_TOKENS = 6
PROMPT = list(range(16))
LOADS = {
    "no queue": {"clients": 8, "num_blocks": 1000},
    "a queue": {"clients": 12, "num_blocks": 60},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model"))


def steps_of_a_search(model, *, clients: int, num_blocks: int, stock: bool) -> tuple[int, int]:
    """Steps until a search beside clients of 60 tokens each is done, and compactions until then."""
    setting = Setting(budget=16, buffer=8, window=4, num_blocks=num_blocks, stock=stock)
    engine, numbers = SimulatedEngine(model, setting), count()

    def step() -> None:
        names = [name for name in engine.outputs if name.startswith("client")]
        for _ in range(clients - len(set(names) - engine.finished)):
            number = next(numbers)
            engine.add(f"client-{number}", [number] * 12, 60)
        engine.step()

    for _ in range(100):
        step()
    beams, num_steps = [PROMPT], 0
    for token in range(NUM_TOKENS):
        names = [f"beam-{token}-{i}" for i in range(len(beams))]
        for name, beam in zip(names, beams, strict=True):
            engine.add(name, beam, 1)
        while not engine.finished.issuperset(names):
            step()
            num_steps += 1
        beams = [[*beams[i % len(beams)], 1000 + i] for i in range(WIDTH)]
    return num_steps, len(engine.directives)


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_a_search_takes_no_more_steps_than_with_stock(model, load):
    stock, none = steps_of_a_search(model, **load, stock=True)
    ours, num_compactions = steps_of_a_search(model, **load, stock=False)
    assert none == 0
    assert num_compactions > 20
    assert ours <= stock
    # Without a queue a step is a token; with one it takes a turn of the queue.
    assert (stock == NUM_TOKENS) == (load is LOADS["no queue"])
    assert stock == NUM_TOKENS or stock > 10 * NUM_TOKENS
