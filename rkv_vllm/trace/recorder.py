"""Follows every token of one request through its compactions, head by head.

A compactor names survivors by their physical position, which every compaction changes. The recorder
keeps the logical position of each cached token and composes. Knows tensors and directives, neither
vLLM nor text. Next: record.py for what comes out.
"""

import numpy as np
import torch
from torch import Tensor

from rkv_vllm.trace.record import NEVER, RANK_LEVELS, CompactionStep, Evictions
from rkv_vllm.worker.flush import Choice


class TraceRecorder:
    """Looks on while the only request of a compactor is compacted (a `ChoiceObserver`)."""

    def __init__(self, max_len: int, window: int) -> None:
        """Make room.

        Args:
            max_len: tokens that the request can have, prompt and output.
            window: newest settled tokens, which have no score.
        """
        self._max_len = max_len
        self._window = window
        self._steps: list[CompactionStep] = []
        self._layers: list[_LayerHistory] = []
        # Of each compaction, over all heads: sum of the ranks of each token, heads that judged it.
        self._rank_sums: list[tuple[Tensor, Tensor]] = []

    def chosen(self, choice: Choice) -> None:
        """Note which tokens some layers keep.

        Raises:
            RuntimeError: several requests, or one that was preempted: positions start over then.
        """
        if len(choice.directives) != 1:
            raise RuntimeError(f"trace: got {len(choice.directives)} requests at once, wanted one")
        first_layer = choice.heads.layers.start
        if first_layer == 0:
            self._begin(choice)
        step, num_heads = self._steps[-1], choice.heads.keys.num_heads
        budget = step.settled_len - step.num_evicted
        keep = choice.keep[0, :, :budget].long().cpu().unflatten(0, (-1, num_heads))
        scores = choice.scores[0, :, : step.settled_len - self._window].cpu()
        ranks = rank(scores).unflatten(0, (-1, num_heads))
        for i, (kept, ranked) in enumerate(zip(keep, ranks, strict=True), first_layer):
            if i == len(self._layers):
                self._layers.append(_LayerHistory(num_heads, self._max_len))
            judged = self._layers[i].note(len(self._steps) - 1, step, kept)
            self._note_ranks(self._layers[i], judged[:, : ranked.shape[1]], ranked)

    def result(self, num_tokens: int) -> Evictions:
        """What has happened so far.

        Args:
            num_tokens: tokens of the request, prompt and output.
        """
        layers = [layer.evicted_at[:, :num_tokens] for layer in self._layers]
        evicted_at = torch.stack(layers).numpy().astype(np.uint16)
        last_rank = mean_rank = None
        if self._rank_sums:
            ranks = [layer.last_rank[:, :num_tokens] for layer in self._layers]
            last_rank = torch.stack(ranks).numpy()
            means = [total / count.clamp(min=1) for total, count in self._rank_sums]
            mean_rank = torch.stack(means)[:, :num_tokens].round().to(torch.uint8).numpy()
        return Evictions(list(self._steps), evicted_at, last_rank, mean_rank)

    def _begin(self, choice: Choice) -> None:
        directive = choice.directives[0]
        evicted = sum(step.num_evicted for step in self._steps)
        if directive.num_evicted_before != evicted:
            raise RuntimeError(
                f"trace: got a request with {directive.num_evicted_before} tokens evicted before, "
                f"wanted {evicted}: it was preempted, or another one came"
            )
        self._steps.append(
            CompactionStep(
                settled_len=directive.settled_len,
                total_len=directive.total_len,
                logical_len=directive.total_len + evicted,
                num_evicted=directive.num_evict,
                freed_blocks=directive.num_freed_blocks,
            )
        )

    def _note_ranks(self, layer: "_LayerHistory", candidates: Tensor, ranks: Tensor) -> None:
        layer.last_rank.scatter_(1, candidates, ranks)
        if len(self._rank_sums) < len(self._steps):
            sums = torch.zeros(self._max_len), torch.zeros(self._max_len, dtype=torch.int32)
            self._rank_sums.append(sums)
        total, count = self._rank_sums[-1]
        flat = candidates.flatten()
        total.scatter_add_(0, flat, ranks.flatten().float())
        count.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))


class _LayerHistory:
    """The heads of one layer.

    Attributes:
        logical: int64 [heads, n], logical position of each token that the last compaction left.
        evicted_at: int32 [heads, max_len], as in `Evictions`.
        last_rank: uint8 [heads, max_len], as in `Evictions`.
    """

    def __init__(self, num_heads: int, max_len: int) -> None:
        self.logical = torch.empty((num_heads, 0), dtype=torch.int64)
        self.evicted_at = torch.full((num_heads, max_len), NEVER, dtype=torch.int32)
        self.last_rank = torch.zeros((num_heads, max_len), dtype=torch.uint8)

    def note(self, index: int, step: CompactionStep, keep: Tensor) -> Tensor:
        """Let go of what a compaction evicts.

        Args:
            index: of the compaction.
            step: its lengths.
            keep: int64 [heads, budget], physical positions of the survivors.

        Returns:
            int64 [heads, settled_len], logical positions of the tokens that were judged.
        """
        num_heads, num_left = self.logical.shape
        first_new = num_left + step.logical_len - step.total_len
        new = torch.arange(first_new, step.logical_len).expand(num_heads, -1)
        cached = torch.cat((self.logical, new), dim=1)
        judged = cached[:, : step.settled_len]
        stays = torch.zeros_like(judged, dtype=torch.bool).scatter_(1, keep, True)
        evicted = judged[~stays].view(num_heads, step.num_evicted)
        self.evicted_at.scatter_(1, evicted, index)
        self.logical = torch.cat((judged.gather(1, keep), cached[:, step.settled_len :]), dim=1)
        return judged


def rank(scores: Tensor) -> Tensor:
    """Rank each row's scores: 1 for the worst up to 1 + RANK_LEVELS for the best.

    Args:
        scores: float [rows, candidates].

    Returns:
        uint8 of the same shape, rounded. Of equal scores the earlier one ranks higher, as in
        `select`, which keeps it.
    """
    best_first = scores.argsort(dim=1, descending=True, stable=True)
    num_worse = torch.arange(scores.shape[1] - 1, -1, -1).expand_as(scores)
    ranks = torch.empty_like(best_first).scatter_(1, best_first, num_worse)
    scale = RANK_LEVELS / max(scores.shape[1] - 1, 1)
    return (1 + (ranks * scale).round()).to(torch.uint8)
