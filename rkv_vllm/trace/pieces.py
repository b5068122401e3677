"""The text that each token adds, also where a character takes several tokens."""

from collections.abc import Sequence
from typing import Protocol

from rkv_vllm.trace.record import Piece

# What decoders write for bytes that are no whole character yet.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"

# A character has four bytes at most, and every token one at least.
_MAX_PARTS = 4


class Detokenizer(Protocol):
    """The part of a tokenizer that is used here."""

    def decode(self, ids: list[int], skip_special_tokens: bool = ...) -> str:
        """Return the text of some tokens."""


def split_text(tokenizer: Detokenizer, token_ids: Sequence[int]) -> list[Piece]:
    """Find the text of every token.

    A token is decoded behind the piece before it, because many tokenizers drop the blank at the
    start of a text. Tokens that hold parts of a character share its text.

    Args:
        tokenizer: with `decode`.
        token_ids: of the whole text.

    Returns:
        One piece per token. The texts of the first parts, joined, are the text.
    """
    pieces: list[Piece] = []
    context_start = 0
    while (start := len(pieces)) < len(token_ids):
        context = token_ids[context_start:start]
        num_parts, text = _shortest_text(tokenizer, context, token_ids[start:][:_MAX_PARTS])
        pieces.extend(Piece(text, part, num_parts) for part in range(num_parts))
        # Broken bytes are no context: what follows could make characters of them.
        context_start = start + num_parts if text.endswith(_INCOMPLETE) else start
    return pieces


def _shortest_text(
    tokenizer: Detokenizer, context: Sequence[int], ahead: Sequence[int]
) -> tuple[int, str]:
    """Returns how many of the next tokens make whole characters, and these; else the first one."""
    start = len(tokenizer.decode(list(context), skip_special_tokens=False))
    texts = []
    for num_parts in range(1, len(ahead) + 1):
        ids = [*context, *ahead[:num_parts]]
        texts.append(tokenizer.decode(ids, skip_special_tokens=False)[start:])
        if not texts[-1].endswith(_INCOMPLETE):
            return num_parts, texts[-1]
    return 1, texts[0]
