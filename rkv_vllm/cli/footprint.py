"""How many tokens one request keeps in its cache while it lives: with and without R-KV.

Arithmetic on lengths, no model, no memory. A request lives for `output_len` steps; in step t
(1 is its prefill) it has computed `prompt_len + t - 1` tokens, because the last token that it
outputs is never computed. A prefill in chunks and waiting for a seat are left out.
"""

from typing import NamedTuple

import numpy as np

from rkv_vllm.policy import EveryBuffer, Terms, longest_prefill


class Life(NamedTuple):
    """Tokens of one request, step by step; arrays of its `output_len` steps.

    Attributes:
        held: in the cache.
        reserved: that it still grows into, for which admission keeps room.
    """

    held: np.ndarray
    reserved: np.ndarray


def num_blocks(num_tokens: int | np.ndarray, block_size: int) -> int | np.ndarray:
    """Blocks that tokens take; the last one is partly empty."""
    return -(-num_tokens // block_size)


def stock_life(prompt_len: int, output_len: int) -> Life:
    """A request of stock vLLM, lengths at least 1: every token stays."""
    held = prompt_len + np.arange(output_len)
    return Life(held, np.full_like(held, held[-1]))


def rkv_life(prompt_len: int, output_len: int, terms: Terms, in_flight: int) -> Life:
    """A request with R-KV.

    It grows until its first compaction, shrinks to `prefix + budget + in_flight`, and grows from
    there by `buffer` tokens, again and again. A prompt above the budget makes it longest before; of
    one that is compacted between its chunks only the last chunk is left when it decodes.

    Args:
        prompt_len: tokens, at least 1.
        output_len: tokens, at least 1.
        terms: budget, buffer, protected prefix and chunk of prompts.
        in_flight: tokens of a request that are computed but not settled, that of the step itself
            included: 1 with synchronous scheduling, 2 with asynchronous scheduling.

    Source: SPEC sections 3, 4.1 and 6.
    """
    peak = longest_prefill(terms, prompt_len)
    if peak < prompt_len:
        # The last chunk is never empty.
        rest = prompt_len - (prompt_len - 1) // terms.prompt_chunk * terms.prompt_chunk
        shortened = terms.prefix_len + terms.budget + rest
        life = rkv_life(shortened, output_len, terms._replace(prompt_chunk=0), in_flight)
        life.held[0] = peak
        life.reserved[0] = max(peak, life.reserved[0])
        return life
    stock = stock_life(prompt_len, output_len)
    longest = EveryBuffer(window=0).bound(terms, prompt_len, stock.held[-1], in_flight)
    lowest = terms.prefix_len + terms.budget + in_flight
    since_first = stock.held - longest
    is_compacted = since_first > 0
    return Life(
        np.where(is_compacted, lowest + 1 + (since_first - 1) % terms.buffer, stock.held),
        np.where(is_compacted, lowest + terms.buffer, longest),
    )
