"""Explicit eviction where every layer has its own budget, or keeps its cache.

The rule and the attention are those of reference.py; here each layer counts for itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from rkv_vllm.options import ServerOptions
from tests.reference import Keep, ReferenceRequest, Store, load_model, single_thread


@dataclass
class LayeredResult:
    """What one request produced.

    Attributes:
        token_ids: output tokens.
        logprobs: log-probability of each.
        compactions: of each layer.
    """

    token_ids: list[int]
    logprobs: list[float]
    compactions: list[int]


class LayerLengths:
    """Lengths of one layer's cache, which only grows by decoding here."""

    def __init__(
        self, number: int, config: ServerOptions | None, prefill_len: int, keep: Keep | None
    ) -> None:
        self.number = number
        self.config = config
        self.keep = keep
        self.num_evicted = 0
        self.physical_len = self.counted_from = prefill_len
        self.compactions = 0

    def compact_if_due(self, cache, unprocessed_steps: int) -> None:
        """Take note of one more token, and evict when SPEC 3 says so."""
        settled_len = self.physical_len - unprocessed_steps
        self.physical_len += 1
        config = self.config
        if (
            config is None
            or settled_len < config.budget + config.buffer
            or settled_len - self.counted_from < config.buffer
        ):
            return
        keep = self.keep
        if keep is not None:
            keep = partial(keep, self.number, settled_len + self.num_evicted)
        cache.evict(settled_len, config, keep=keep)
        self.num_evicted += settled_len - config.budget
        self.physical_len -= settled_len - config.budget
        self.counted_from = config.budget
        self.compactions += 1


@single_thread()
@torch.inference_mode()
def generate_layered_reference(
    model_dir: Path,
    prompt_ids: Sequence[int],
    num_tokens: int,
    configs: Sequence[ServerOptions | None],
    unprocessed_steps: int = 0,
    keep: Keep | None = None,
    store: Store | None = None,
) -> LayeredResult:
    """Generates greedily for one request.

    Args:
        model_dir: folder of a model that transformers can load.
        prompt_ids: tokens of the prompt.
        num_tokens: output tokens.
        configs: of each layer what to keep and when; None keeps its whole cache.
        unprocessed_steps: as in `generate_reference`.
        keep: what chooses, None for R-KV.
        store: how the cache rounds, None for one that does not.
    """
    widest = next(config for config in configs if config is not None)
    loaded = load_model(model_dir, torch.float32)
    request = ReferenceRequest(loaded, widest, unprocessed_steps, store=store)
    layers = [
        LayerLengths(number, config, len(prompt_ids), keep) for number, config in enumerate(configs)
    ]
    result = LayeredResult([], [], [])
    logprobs = request.prefill(prompt_ids)
    while True:
        token_id = int(logprobs.argmax())
        result.token_ids.append(token_id)
        result.logprobs.append(float(logprobs[token_id]))
        if len(result.token_ids) == num_tokens:
            break
        logprobs = request.forward([token_id])
        for layer, cache in zip(layers, request.layer_caches, strict=True):
            layer.compact_if_due(cache, unprocessed_steps)
    result.compactions = [layer.compactions for layer in layers]
    return result
