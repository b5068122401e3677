"""Which layers of a model are compacted, and what the others keep, by the fields of config.json.

Knows the fields of model families, no memory and no requests. Next: capacity.py, which divides the
cache among them.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FULL = ("full_attention", "attention")
WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
# Without a cache.
NO_CACHE = ("mlp", "moe")
# Gemma 3's checkpoints leave it out.
_GEMMA3_PATTERN = 6
_NEMOTRON_TYPES = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}


@dataclass(frozen=True)
class State:
    """What a layer keeps of all tokens together, in elements, on all ranks.

    Attributes:
        conv: elements of the last inputs of its convolution, in the model's dtype.
        recurrent: elements of its recurrence.
        recurrent_bytes: per element; None in the model's dtype.
        num_blocks: that a request holds with prefix caching: the newest state, and those at the
            ends of blocks.
    """

    conv: int
    recurrent: int
    recurrent_bytes: int | None
    num_blocks: int

    def num_bytes(self, element: int) -> int:
        """Of one layer, where the model's dtype has `element` bytes."""
        return self.conv * element + self.recurrent * (self.recurrent_bytes or element)


@dataclass(frozen=True)
class KeptLayers:
    """Layers beside the compacted ones, of one kind.

    Attributes:
        count: how many.
        name: what they are.
        window: most tokens that such a layer sees; None where it has a state.
        state: None where it has a window.
    """

    count: int
    name: str
    window: int | None = None
    state: State | None = None


@dataclass(frozen=True)
class Layers:
    """The layers of a model that have a cache.

    Attributes:
        num_full: of full attention; these are compacted.
        kept: the others, which vLLM keeps as they are.
    """

    num_full: int
    kept: tuple[KeptLayers, ...] = ()

    @property
    def state(self) -> State | None:
        """Of the layers that have one."""
        return next((each.state for each in self.kept if each.state is not None), None)

    def describe(self) -> str:
        """What is compacted and what is not, for people."""
        compacted = f"{self.num_full} of full attention are compacted"
        others = [f"{each.count} with {each.name}" for each in self.kept]
        return f"{compacted}; as vLLM has them: {', '.join(others) or 'none'}"


def read_layers(fields: Mapping[str, Any], num_layers: int) -> Layers:
    """Counts the layers by kind.

    Args:
        fields: of the language part of a `config.json`.
        num_layers: of the model.

    Raises:
        ValueError: a kind that is not known; the message names it.
    """
    types = _layer_types(fields, num_layers)
    counts = Counter(types)
    num_full = sum(counts.pop(name, 0) for name in FULL)
    for name in NO_CACHE:
        counts.pop(name, None)
    kept = []
    for name, count in counts.items():
        if name in WINDOWS:
            window = fields.get(WINDOWS[name])
            if type(window) is not int or window < 1:
                raise ValueError(f"{name} layers without {WINDOWS[name]}")
            what = "chunks" if name == "chunked_attention" else "a window"
            kept.append(KeptLayers(count, f"{what} of {window} tokens", window=window))
        else:
            what, state = _state(name, fields)
            kept.append(KeptLayers(count, what, state=state))
    return Layers(num_full, tuple(kept))


def _layer_types(fields: Mapping[str, Any], num_layers: int) -> Sequence[str]:
    """The kind of each layer, as transformers names them."""
    if types := fields.get("layer_types") or fields.get("layers_block_type"):
        return types
    if pattern := fields.get("hybrid_override_pattern"):
        return [_NEMOTRON_TYPES.get(letter, letter) for letter in pattern]
    family = str(fields.get("model_type"))
    if interval := fields.get("full_attention_interval"):
        return _every(interval, num_layers, "linear_attention")
    if (full := fields.get("full_attn_idxs")) is not None:
        return ["full_attention" if i in full else "conv" for i in range(num_layers)]
    if family.startswith("gemma3"):
        pattern = fields.get("sliding_window_pattern") or _GEMMA3_PATTERN
        return _every(pattern, num_layers, "sliding_attention")
    if family == "gemma2":
        return _every(2, num_layers, "sliding_attention")
    if fields.get("attention_chunk_size"):
        return ["chunked_attention"] * num_layers
    if fields.get("sliding_window") and fields.get("use_sliding_window", True):
        return ["sliding_attention"] * num_layers
    return ["full_attention"] * num_layers


def _every(interval: int, num_layers: int, other: str) -> list[str]:
    """Each `interval`-th layer sees all."""
    return ["full_attention" if (i + 1) % interval == 0 else other for i in range(num_layers)]


def _state(name: str, fields: Mapping[str, Any]) -> tuple[str, State]:
    readers: dict[str, tuple[str, Callable[[Mapping[str, Any]], State]]] = {
        "conv": ("a short convolution", _short_conv),
        "mamba": ("a state (Mamba2)", _mamba2),
        "linear_attention": ("a state (gated delta net)", _gated_delta_net),
    }
    what, read = readers.get(name, (name, None))
    if read is _gated_delta_net and "mamba_num_heads" in fields:
        # transformers calls Nemotron-H's so.
        what, read = readers["mamba"]
    if read is None:
        raise ValueError(f"layers of kind {name!r}")
    try:
        return what, read(fields)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{name} layers without {error}") from error


def _short_conv(fields: Mapping[str, Any]) -> State:
    width = fields.get("conv_dim") or fields["hidden_size"]
    return State((fields["conv_L_cache"] - 1) * width, 0, None, num_blocks=2)


def _mamba2(fields: Mapping[str, Any]) -> State:
    if "mamba_num_heads" in fields:
        heads, size = fields["mamba_num_heads"], fields["mamba_head_dim"]
        groups, states = fields["n_groups"], fields["ssm_state_size"]
        kernel, is_float32 = fields["conv_kernel"], True
    else:
        heads, size = fields["mamba_n_heads"], fields["mamba_d_head"]
        groups, states = fields["mamba_n_groups"], fields["mamba_d_state"]
        kernel, is_float32 = fields["mamba_d_conv"], False
    conv = (kernel - 1) * (heads * size + 2 * groups * states)
    # A third block holds the state at the end of the last full one of a prompt.
    return State(conv, heads * size * states, 4 if is_float32 else None, num_blocks=3)


def _gated_delta_net(fields: Mapping[str, Any]) -> State:
    keys = fields["linear_num_key_heads"] * fields["linear_key_head_dim"]
    heads, size = fields["linear_num_value_heads"], fields["linear_value_head_dim"]
    conv = (fields["linear_conv_kernel_dim"] - 1) * (2 * keys + heads * size)
    is_float32 = fields.get("mamba_ssm_dtype") == "float32"
    recurrent = heads * size * fields["linear_key_head_dim"]
    return State(conv, recurrent, 4 if is_float32 else None, num_blocks=2)
