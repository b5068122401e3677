"""When a request is compacted, down to what, and how long it can get until then.

Pure arithmetic on lengths: knows no vLLM, no tensors and no blocks. Lengths are logical unless they
say otherwise, because those never shrink. Start check, admission and `rkv-vllm plan` ask the same
`bound`. Next: scheduling/planner.py, which asks the policy in every step.
"""

from typing import NamedTuple, Protocol


class Terms(NamedTuple):
    """What holds for one request in one KV-cache group, in tokens.

    Attributes:
        budget: tokens behind the protected prefix that a compaction keeps, window included.
        buffer: decoded tokens between two compactions.
        prefix_len: tokens at the front that are never evicted.
        prompt_chunk: a longer prefill is compacted at every multiple of it; 0: it is cached whole.
    """

    budget: int
    buffer: int
    prefix_len: int = 0
    prompt_chunk: int = 0


class Policy(Protocol):
    """A rule of when."""

    def first_due_at(self, terms: Terms, prefill_len: int) -> int:
        """Settled tokens at which a request that decodes that far is compacted first.

        Args:
            terms: of the request.
            prefill_len: tokens that its cache holds when it begins to decode.
        """

    def next_due_at(self, terms: Terms, settled_len: int) -> int:
        """Settled tokens at which it is compacted again, `settled_len` being those at the last."""

    def watches_from(self, due_at: int) -> int:
        """Position of the first query that judges the compaction which is due at `due_at`."""

    def bound(self, terms: Terms, prefill_len: int, final_len: int, in_flight: int) -> int:
        """Most physical tokens that a request holds in its life.

        Args:
            terms: of the request.
            prefill_len: tokens computed before the first one is decoded; compacted between its
                chunks where `terms` say so.
            final_len: tokens that it cannot exceed.
            in_flight: tokens computed while a compaction waits for the step's output.
        """


class EveryBuffer:
    """Compact whenever `buffer` tokens have piled up above prefix and budget.

    Args:
        window: newest tokens whose queries judge the others.

    Source: SPEC section 3, rules 1 and 2.
    """

    def __init__(self, window: int) -> None:
        self._window = window

    def first_due_at(self, terms: Terms, prefill_len: int) -> int:
        """See `Policy`."""
        return max(terms.prefix_len + terms.budget, prefill_len) + terms.buffer

    def next_due_at(self, terms: Terms, settled_len: int) -> int:
        """See `Policy`."""
        return settled_len + terms.buffer

    def watches_from(self, due_at: int) -> int:
        """See `Policy`."""
        return due_at - self._window

    def bound(self, terms: Terms, prefill_len: int, final_len: int, in_flight: int) -> int:
        """See `Policy`."""
        return min(
            final_len, self.first_due_at(terms, longest_prefill(terms, prefill_len)) + in_flight
        )


def longest_prefill(terms: Terms, prefill_len: int) -> int:
    """Most physical tokens of a prefill: all of them, or what is kept and one chunk.

    Args:
        terms: of the request.
        prefill_len: its logical tokens.

    Source: SPEC section 6.
    """
    if not terms.prompt_chunk:
        return prefill_len
    return min(prefill_len, terms.prefix_len + terms.budget + terms.prompt_chunk)


def longest_cache(terms: Terms, final_len: int, in_flight: int, slack: int = 0) -> int:
    """Most physical tokens that a request ever needs, a recompute of all its text included.

    What start check, front end and `rkv-vllm plan` hold against the pool.

    Args:
        terms: of the request.
        final_len: tokens that it cannot exceed.
        in_flight: see `Policy.bound`.
        slack: tokens above prefix and budget that it needs until it can be compacted, at least;
            `ServerOptions.slack`.
    """
    bound = EveryBuffer(window=0).bound(terms, final_len, final_len, in_flight)
    return max(bound, min(final_len, terms.prefix_len + terms.budget + slack + in_flight))


def floor_len(terms: Terms, growth: int, block_size: int) -> int:
    """Tokens below which a request of these terms cannot be kept.

    A compaction frees something only when a whole block has piled up.

    Args:
        terms: of the request.
        growth: tokens that it grows by until its next compaction can be carried out.
        block_size: tokens of a block.
    """
    return terms.prefix_len + terms.budget + block_size + growth


def floor_blocks(terms: Terms, window: int, in_flight: int, block_size: int) -> int:
    """Blocks of the smallest pool that serves a request of these terms."""
    return -(-floor_len(terms, window + in_flight, block_size) // block_size)
