"""What a trace holds: one request, its tokens, and which head let go of which token when.

Plain data, numpy only. Filled by recorder.py and capture.py, shown by page.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# In `Trace.evicted_at`: still in the cache when the text ended.
NEVER = 65535

# A rank r, from 0 (worst) to 1 (best), is stored as 1 + round(RANK_LEVELS * r); 0 is "not judged".
# The page shows whole percents.
RANK_LEVELS = 100


class Piece(NamedTuple):
    """The text of one token.

    Attributes:
        text: what it says; where a character takes several tokens, all of them have its text.
        part: which of those tokens this is, from 0.
        num_parts: how many there are, 1 for nearly all tokens.
    """

    text: str
    part: int = 0
    num_parts: int = 1


class CompactionStep(NamedTuple):
    """One compaction. Lengths in tokens, per layer and head.

    Attributes:
        settled_len: physical length that was judged.
        total_len: physical length before it.
        logical_len: tokens of text that had been cached by then.
        num_evicted: tokens that every head let go.
        freed_blocks: blocks the request held less of afterwards.
    """

    settled_len: int
    total_len: int
    logical_len: int
    num_evicted: int
    freed_blocks: int


@dataclass(frozen=True, eq=False)
class Evictions:
    """What happened to every token in every head.

    Attributes:
        steps: the compactions in order.
        evicted_at: uint16 [layers, KV heads, tokens], index into `steps` of the compaction that
            evicted the token, `NEVER` without one.
        last_rank: uint8 [layers, KV heads, tokens], rank of the token's score among those of its
            head when it was judged last; None when the method has no scores.
        mean_rank: uint8 [compactions, tokens], mean rank in the heads that judged the token then;
            None when the method has no scores.
    """

    steps: list[CompactionStep]
    evicted_at: np.ndarray
    last_rank: np.ndarray | None
    mean_rank: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Trace:
    """One request from its prompt to its last token.

    Attributes:
        model: its name.
        options: what was asked for, compression and sampling, by name.
        versions: distributions and their versions.
        prompt_len: tokens of the prompt.
        pieces: text of all tokens, prompt first. The last one was sampled and never cached.
        window: newest settled tokens, which no compaction evicts.
        finish_reason: vLLM's word: "length" or "stop".
        evictions: what compression did.
    """

    model: str
    options: dict[str, str | int | float]
    versions: dict[str, str]
    prompt_len: int
    pieces: list[Piece]
    window: int
    finish_reason: str
    evictions: Evictions

    @property
    def cached_len(self) -> int:
        """Tokens that were ever in the cache."""
        return len(self.pieces) - 1

    def counts(self) -> dict[str, int]:
        """The numbers of the page's header; lengths in tokens, sums over compactions."""
        steps = self.evictions.steps
        evicted = sum(step.num_evicted for step in steps)
        return {
            "prompt_tokens": self.prompt_len,
            "output_tokens": len(self.pieces) - self.prompt_len,
            "compactions": len(steps),
            "evicted_tokens": evicted,
            "freed_blocks": sum(step.freed_blocks for step in steps),
            "logical_len": self.cached_len,
            "physical_len": self.cached_len - evicted,
        }
