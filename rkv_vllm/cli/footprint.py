"""How many tokens one request keeps in its cache while it lives: with and without R-KV.

Arithmetic on lengths, no model, no memory. A request lives for `output_len` steps; in step t
(1 is its prefill) it has computed `prompt_len + t - 1` tokens, because the last token that it
outputs is never computed. A prefill in chunks and waiting for an observation slot are left out.
"""

from typing import NamedTuple


class Ramp(NamedTuple):
    """Consecutive steps in which a request grows by one token per step, from `first` to `last`."""

    first: int
    last: int
    times: int = 1

    @property
    def num_steps(self) -> int:
        """Steps of all repetitions."""
        return self.times * (self.last - self.first + 1)


class Life(NamedTuple):
    """The tokens that a request holds, step by step.

    Attributes:
        ramps: one after the other.
        later_peak: most tokens that it can hold in a ramp after the first one, 0 without any.
    """

    ramps: tuple[Ramp, ...]
    later_peak: int = 0

    @property
    def num_steps(self) -> int:
        """Steps from the prefill to the last output token."""
        return sum(ramp.num_steps for ramp in self.ramps)

    @property
    def peak_len(self) -> int:
        """Most tokens held in any step."""
        return max(ramp.last for ramp in self.ramps)

    @property
    def mean_len(self) -> float:
        """Tokens held, averaged over the steps."""
        return self.block_steps(1) / self.num_steps

    def block_steps(self, block_size: int) -> int:
        """Blocks held, summed over the steps; the last block of a request is partly empty."""
        return sum(
            times * (_blocks_up_to(last, block_size) - _blocks_up_to(first - 1, block_size))
            for first, last, times in self.ramps
        )

    def reserved_block_steps(self, block_size: int) -> int:
        """Blocks that it still grows into, summed over the steps.

        A request with a prompt above the budget is at its longest once, before its first
        compaction; after that, room for `later_peak` is enough.
        """
        first = self.ramps[0]
        later = self.num_steps - first.num_steps
        return first.num_steps * _num_blocks(first.last, block_size) + later * _num_blocks(
            self.later_peak, block_size
        )


def _num_blocks(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


def _blocks_up_to(num_tokens: int, block_size: int) -> int:
    """Sum of ceil(n / block_size) over n = 1 .. num_tokens."""
    full, rest = divmod(num_tokens, block_size)
    return block_size * full * (full + 1) // 2 + rest * (full + 1)


def stock_life(prompt_len: int, output_len: int) -> Life:
    """A request of stock vLLM: every token stays.

    Args:
        prompt_len: tokens, at least 1.
        output_len: tokens, at least 1.
    """
    return Life((Ramp(prompt_len, prompt_len + output_len - 1),))


def rkv_life(prompt_len: int, output_len: int, budget: int, buffer: int, in_flight: int) -> Life:
    """A request with R-KV.

    It grows to `max(prompt_len, budget) + buffer + in_flight` tokens, shrinks to
    `budget + in_flight`, and grows from there by `buffer` tokens, again and again.

    Args:
        prompt_len: tokens, at least 1.
        output_len: tokens, at least 1.
        budget: tokens kept by a compaction.
        buffer: tokens decoded between two compactions.
        in_flight: tokens of a request that are computed but not settled, that of the step itself
            included: 1 with synchronous scheduling, 2 with asynchronous scheduling.

    Source: SPEC sections 3 and 4.1.
    """
    first = Ramp(prompt_len, max(prompt_len, budget) + buffer + in_flight)
    if output_len <= first.num_steps:
        return stock_life(prompt_len, output_len)
    cycles, rest = divmod(output_len - first.num_steps, buffer)
    lowest = budget + in_flight + 1
    ramps = [first]
    if cycles:
        ramps.append(Ramp(lowest, lowest + buffer - 1, cycles))
    if rest:
        ramps.append(Ramp(lowest, lowest + rest - 1))
    return Life(tuple(ramps), later_peak=lowest + buffer - 1)
