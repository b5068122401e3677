"""Compacts long prompts between their chunks, so that a request never outgrows one bound.

A prefill that is longer than what its request keeps and one chunk ("long") is compacted wherever it
reaches a multiple of the chunk, judged by the last queries before that boundary. Nothing of a
prompt can be rolled back, so all of it is settled there. Boundaries are absolute positions of the
text: neither load nor prefix hits move them, and so the result depends on the chunk only. A step
may compute any part of a chunk, but the whole window before a boundary in one step: so a seat is
needed for one step only. Knows lengths; knows neither vLLM nor blocks. Next: scheduler.py.

Source: SPEC section 6.
"""

from collections.abc import Sequence

from rkv_vllm.policy import Terms
from rkv_vllm.scheduling.planner import Seats


class PromptRule:
    """Where prefills stop and are compacted.

    Args:
        chunk: tokens between two boundaries, at least the window.
        seats: of the query ring that decoding requests share.
        num_extra: further seats of the ring, numbered behind those, for prompts.
    """

    def __init__(self, chunk: int, seats: Seats, num_extra: int) -> None:
        self._chunk = chunk
        self._seats = seats
        self._num_extra = num_extra
        self._num_ends = 0

    def first_boundary(self, terms: Sequence[Terms] | None, prefill_len: int) -> int | None:
        """Where a prefill is compacted first; None if it never is.

        Args:
            terms: of the request in each group; None if its cache is kept whole.
            prefill_len: tokens to compute before the first one is decoded.
        """
        if terms is None or not terms[0].prompt_chunk:
            return None
        kept = min(own.prefix_len + own.budget for own in terms)
        if prefill_len <= kept + self._chunk:
            return None
        return (kept // self._chunk + 1) * self._chunk

    def is_boundary(self, terms: Sequence[Terms] | None, prefill_len: int, position: int) -> bool:
        """Whether the cache is compacted once `position` tokens of the prefill are computed."""
        if position % self._chunk or position >= prefill_len:
            return False
        first = self.first_boundary(terms, prefill_len)
        return first is not None and position >= first

    def longest_hit(
        self, terms: Sequence[Terms] | None, prefill_len: int, block_size: int
    ) -> int | None:
        """Most tokens that may come from the prefix cache; None for no limit.

        Those blocks hold uncompacted text, and the window of the first compaction has to be seen.
        """
        first = self.first_boundary(terms, prefill_len)
        if first is None:
            return None
        return (first - self._seats.window) // block_size * block_size

    def begin_step(self) -> None:
        """All seats for prompts are free again."""
        self._num_ends = 0

    def cap(
        self, terms: Sequence[Terms] | None, prefill_len: int, num_computed: int, num_new: int
    ) -> int:
        """How many of the next `num_new` tokens of a prefill a step may compute, perhaps none.

        Args:
            terms: of the request in each group; None if its cache is kept whole.
            prefill_len: see `first_boundary`.
            num_computed: tokens computed so far.
            num_new: tokens that the step has room for.
        """
        first = self.first_boundary(terms, prefill_len)
        if first is None:
            return num_new
        boundary = max(first, (num_computed // self._chunk + 1) * self._chunk)
        end = num_computed + num_new
        window_start = boundary - self._seats.window
        if boundary >= prefill_len or end <= window_start:
            return num_new
        if end >= boundary and (self._num_ends < self._num_extra or not self._seats.count):
            self._num_ends += 1
            return boundary - num_computed
        return window_start - num_computed

    def seat(self, index: int) -> int | None:
        """Seat of the step's `index`-th prompt at a boundary; None when no queries are needed."""
        return self._seats.count + index if self._seats.count else None
