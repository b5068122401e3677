"""Tells from token ids alone whether a text has run into a loop: what too small a budget leads to.

Only exact repetition counts. Lines that differ in a number are legitimate in tables, lists and the
steps of a program, and no threshold tells them from a loop that counts. vLLM's own check
(`SamplingParams.repetition_detection`, which ends a request) asks for the same number of copies
however short they are, so that what finds loops of sentences also finds a row of dashes; ours asks
for a number of tokens as well. Imports no vLLM: `rkv-vllm eval` reads finished outputs with it.
"""

from collections.abc import Sequence

# Longest block of tokens whose copies are looked for: some paragraphs.
MAX_PERIOD = 256
# A loop has at least so many copies of its block, and so many tokens in all. It goes on to the end
# of the output, so it gets there; rulers, empty cells and the digits of 1/3 do not. A matrix of 64
# zeros does: it is taken for a loop.
MIN_COPIES = 4
MIN_TOKENS = 128
# Newest tokens that are compared first: in ordinary text they hardly ever come twice.
_GLANCE = 8


def tail_repeats(token_ids: Sequence[int]) -> bool:
    """Whether a text ends in copies of one block of tokens; the last copy may be cut short.

    Takes a few microseconds, whatever the length of the text.

    Args:
        token_ids: of the output, oldest first: a sequence whose slices compare as a whole, such as
            a list, a tuple or vLLM's `ConstantList`.

    Returns:
        Whether for some period of 1 to `MAX_PERIOD` tokens the last
        `max(MIN_TOKENS, MIN_COPIES * period)` tokens have it: each equals the one a period later.
    """
    newest_first = token_ids[: -MAX_PERIOD - _GLANCE - 1 : -1]
    newest = newest_first[:_GLANCE]
    period = 0
    while (period := _next_equal(newest_first, period)) > 0:
        if newest_first[period : period + _GLANCE] != newest:
            continue
        length = max(MIN_TOKENS, MIN_COPIES * period)
        if length > len(token_ids):
            return False
        if token_ids[-length:-period] == token_ids[period - length :]:
            return True
    return False


def _next_equal(newest_first: Sequence[int], after: int) -> int:
    """How many tokens before the last one its next equal stands; -1 without one in reach."""
    try:
        return newest_first.index(newest_first[0], after + 1, MAX_PERIOD + 1)
    except (ValueError, IndexError):
        return -1
