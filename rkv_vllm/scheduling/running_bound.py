"""A bound over the running requests that costs one look at each while a step admits many.

Walking all running requests for every newcomer would take seconds when a thousand come at once.
Knows requests, no blocks. Next: admission.py and floors.py, which ask.
"""

import operator
from collections.abc import Callable, Sequence
from functools import reduce

from vllm.v1.request import Request

Running = Callable[[], Sequence[Request]]


class RunningBound:
    """Upper bound of a sum (or maximum) over the running requests.

    While vLLM admits requests, those that run change in one way only: a newcomer may begin to share
    blocks of theirs.

    Args:
        running: all running requests; while a step admits, newcomers come behind the others.
        term: of one request.
        raised: most by which one that was admitted can have raised what all others come to.
        join: of two terms, `operator.add` or `max`.

    Attributes:
        is_exact: whether the last bound was the sum itself, since nobody was admitted before.
    """

    def __init__(
        self,
        running: Running,
        term: Callable[[Request], float],
        raised: Callable[[Request], float],
        join: Callable[[float, float], float] = operator.add,
    ) -> None:
        self._running = running
        self._term = term
        self._raised = raised
        self._join = join
        self._count = 0
        self._bound = 0.0
        self.is_exact = True

    def restart(self) -> None:
        """Lengths and blocks of running requests may have changed."""
        self._count = 0

    def get(self) -> float:
        """No less than what all running requests come to."""
        running = self._running()
        if len(running) > self._count + 1:
            # How much several raised the others by cannot be told when all of them are there.
            self._count = 0
        newcomers = running[self._count :]
        if not self._count:
            self._bound, self.is_exact = 0.0, True
        elif newcomers:
            self._bound = reduce(self._join, map(self._raised, newcomers), self._bound)
            self.is_exact = False
        self._bound = reduce(self._join, map(self._term, newcomers), self._bound)
        self._count = len(running)
        return self._bound
