"""Traces of any size without an engine: heads that agree in part, scores that drift."""

from dataclasses import replace

import numpy as np
import torch

from rkv_vllm.methods import Heads
from rkv_vllm.options import ServerOptions
from rkv_vllm.scheduling.directive import EvictionDirective
from rkv_vllm.trace.record import Piece, Trace
from rkv_vllm.trace.recorder import TraceRecorder
from rkv_vllm.worker.flush import Choice

TEXT = "the of and a, to in is that. it was for on are as with they at be this from I ↵↵"


class Keys:
    """As much of `PagedStates` as a recorder asks for."""

    def __init__(self, num_heads: int) -> None:
        self.num_heads = num_heads


def directive(config: ServerOptions, settled_len: int, evicted: int) -> EvictionDirective:
    """A compaction with one token behind the settled ones, in blocks of 16."""
    num_blocks = -(-(settled_len + 1) // 16)
    left = -(-(config.budget + 1) // 16)
    return EvictionDirective(
        req_id="trace",
        group_id=0,
        num_evicted_before=evicted,
        prefix_len=0,
        settled_len=settled_len,
        total_len=settled_len + 1,
        num_evict=settled_len - config.budget,
        seat=0,
        prompt_len=1,
        seed=0,
        method_options=None,
        old_block_ids=list(range(num_blocks)),
        new_block_ids=list(range(left)),
    )


def synthetic_trace(
    num_tokens: int = 400,
    prompt_len: int = 40,
    num_layers: int = 4,
    num_heads: int = 2,
    config: ServerOptions | None = None,
    pieces: list[Piece] | None = None,
    with_scores: bool = True,
    **changes: object,
) -> Trace:
    """A trace as the recorder makes it, of random scores that tokens and heads have in common.

    Args:
        num_tokens: tokens of prompt and output.
        prompt_len: tokens of the prompt.
        num_layers: layers.
        num_heads: KV heads per layer.
        config: budget, buffer and window.
        pieces: the text; without it, words.
        with_scores: whether the method has scores.
        changes: other fields of `Trace`.
    """
    config = config or ServerOptions(budget=64, buffer=32)
    generator = torch.Generator().manual_seed(0)
    heads = num_layers * num_heads
    common = torch.randn(num_tokens, generator=generator)
    own = torch.randn(heads, num_tokens, generator=generator)
    recorder = TraceRecorder(num_tokens, config.window)
    cached = torch.empty((heads, 0), dtype=torch.int64)
    logical_len, evicted = max(config.budget, prompt_len) + config.buffer, 0
    while logical_len + 2 < num_tokens:
        new = torch.arange(cached.shape[1] + evicted, logical_len).expand(heads, -1)
        cached = torch.cat((cached, new), dim=1)
        drift = torch.randn(heads, cached.shape[1], generator=generator)
        scores = common[cached] + own.gather(1, cached) + 0.5 * drift
        num_candidates = cached.shape[1] - config.window
        scores = scores[:, :num_candidates]
        best = scores.topk(config.budget - config.window, dim=1).indices
        window = torch.arange(num_candidates, cached.shape[1]).expand(heads, -1)
        keep = torch.cat((best, window), dim=1).sort(dim=1).values
        found = directive(config, cached.shape[1], evicted)
        shown = Heads(slice(0, num_layers), Keys(num_heads), None, None)
        recorder.chosen(
            Choice([found], shown, None, scores.unsqueeze(0), keep.int().unsqueeze(0), ())
        )
        cached = cached.gather(1, keep)
        evicted += found.num_evict
        logical_len += config.buffer
    if pieces is None:
        words = np.random.default_rng(0).choice(TEXT.split(), num_tokens)
        pieces = [Piece(f" {word}".replace("↵", "\n")) for word in words]
    assert len(pieces) == num_tokens
    evictions = recorder.result(num_tokens)
    if not with_scores:
        evictions = replace(evictions, last_rank=None, mean_rank=None)
    fields = {
        "model": "synthetic",
        "options": {"method": "rkv", "budget": config.budget, "buffer": config.buffer},
        "versions": {"rkv-vllm": "0.1.0", "vllm": "0.32.0+cpu"},
        "prompt_len": prompt_len,
        "pieces": pieces,
        "window": config.window,
        "finish_reason": "length",
        "evictions": evictions,
    }
    return Trace(**{**fields, **changes})
