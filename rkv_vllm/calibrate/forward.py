"""Runs a text through a model and shows what each attention layer computes.

transformers lets attention be exchanged by name: every layer of every model then hands over its
queries, keys and values after RoPE. Next: query_sums.py, which looks on.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from rkv_vllm.fit.refused_models import has_limited_layers

_ATTENTION_NAME = "rkv_vllm_observed"

# Those that the tests run; all of them rotate the two halves of a head against each other.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# Others change the frequencies with the length of the text.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class AttentionObserver(Protocol):
    """Looks on while a model reads."""

    def observe(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, output: Tensor
    ) -> None:
        """Take note of one layer's attention over one piece of the text, from position 0 on.

        Args:
            layer: number in the model.
            query: [query heads, n, head_size] after RoPE.
            key: [KV heads, n, head_size] after RoPE.
            value: [KV heads, n, head_size].
            output: [query heads, n, head_size], the mix of values that the queries attend to.
        """


def _observed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    observers: Sequence[AttentionObserver],
    caches: "_SharedCaches",
    **settings: object,
) -> tuple[Tensor, None]:
    """Causal attention of one text; `observers` and `caches` come from `read`."""
    settings["is_causal"] = True
    key, value = caches.of_layer(module.layer_idx, key, value)
    output, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, **settings)
    for observer in observers:
        observer.observe(module.layer_idx, query[0], key[0], value[0], output[0].transpose(0, 1))
    return output, None


ALL_ATTENTION_FUNCTIONS.register(_ATTENTION_NAME, _observed_attention)


class _SharedCaches:
    """Keys and values of one piece of text that other layers read in place of their own.

    Args:
        owners: by number of a layer that reads, the number of the one whose cache it reads.
    """

    def __init__(self, owners: Mapping[int, int]) -> None:
        self._owners = owners
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def of_layer(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What a layer attends to; its own are given."""
        if layer in self._owners:
            return self._kept[self._owners[layer]]
        if layer in self._owners.values():
            self._kept[layer] = key, value
        return key, value


def read_config(folder: Path) -> PreTrainedConfig:
    """Returns the configuration of a model that can be calibrated.

    Args:
        folder: of a checkpoint.

    Raises:
        ValueError: another kind of model, named with what would be taken.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    rope = getattr(config, "rope_parameters", None) or {}
    rope_type = rope.get("rope_type", "default")
    share = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0))
    windowed = getattr(config, "sliding_window", None) and getattr(
        config, "use_sliding_window", True
    )
    wrong = {
        f"a model of type {config.model_type!r}": config.model_type not in MODEL_TYPES,
        f"RoPE scaling {rope_type!r}": rope_type not in _ROPE_TYPES,
        f"RoPE on {share} of each head": share not in (None, 1, 1.0),
        "sliding-window attention": has_limited_layers(config.to_dict(), bool(windowed)),
    }
    if found := [feature for feature, is_there in wrong.items() if is_there]:
        raise ValueError(
            f"{', '.join(found)}, wanted full attention with RoPE on whole heads, one of the types "
            f"{', '.join(MODEL_TYPES)} and of the scalings {', '.join(_ROPE_TYPES)}"
        )
    return config


def load_model(folder: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Returns the decoder without its output layer, ready for `read`.

    Raises:
        OSError: its files are not complete.
        ValueError: transformers does not take them.
    """
    # The command that loads a model says so itself.
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=_ATTENTION_NAME, local_files_only=True
    )
    return model.get_decoder().eval().to(device)


def tokenize(folder: Path, text: str) -> list[int]:
    """Returns a text's tokens, as a server would count them.

    Raises:
        OSError: there is no tokenizer.
        ValueError: transformers does not take it.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # A text may be longer than the model's context: it is read in pieces.
    return tokenizer(text, verbose=False).input_ids


@torch.inference_mode()
def read(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    context: int,
    observers: Sequence[AttentionObserver],
    owners: Mapping[int, int] | None = None,
) -> Tensor:
    """Run a text in pieces, each from position 0 on.

    Args:
        model: made by `load_model`.
        token_ids: of the text.
        context: tokens of a piece, at most.
        observers: are shown every layer of every piece, with what it attends to.
        owners: by number of a layer that reads another one's cache, the number of that one.

    Returns:
        The hidden states behind the last layer, [num_tokens, hidden size] in the model's dtype.
    """
    hidden = []
    for first in range(0, len(token_ids), context):
        piece = torch.tensor([list(token_ids[first : first + context])], device=model.device)
        shared = _SharedCaches(owners or {})
        output = model(input_ids=piece, use_cache=False, observers=observers, caches=shared)
        hidden.append(output.last_hidden_state[0])
    return torch.cat(hidden)
