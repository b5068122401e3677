"""What a checkpoint says about its size: from `config.json`, no network, no vLLM.

Finds the file in a folder or in the local cache of the Hugging Face hub, and reads the shape of a
decoder out of it. Models that R-KV does not support are refused by name. transformers is asked only
for what the text part of a multimodal model leaves to its defaults.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkv_vllm.cli.errors import REFUSED, CommandError
from rkv_vllm.cli.layers import Layers, read_layers
from rkv_vllm.cli.options import DTYPE_BYTES, DTYPES

_WEIGHT_FILES = ("*.safetensors", "*.bin")
# What Decoder and the estimate of weights are made of.
_SHAPE = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)


def find_config(model: str) -> Path:
    """Returns the `config.json` of a model.

    Args:
        model: a folder that holds one, or a hub id whose `config.json` is in the local cache.

    Raises:
        CommandError: there is none.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return folder / "config.json"
        raise CommandError(
            f"MODEL: got {model!r}, a folder without config.json, wanted one that has it; pass the "
            "folder of a Hugging Face checkpoint"
        )
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        cached = None
    if not isinstance(cached, str):
        raise CommandError(
            f"MODEL: got {model!r}, wanted a folder with config.json or a hub id in the local "
            f"cache; correct the path or run: hf download {model} config.json"
        )
    return Path(cached)


def read_config(path: Path) -> dict[str, Any]:
    """Returns the fields of a `config.json`.

    Raises:
        CommandError: not a JSON object.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError(f"a JSON {type(fields).__name__}")
    except (OSError, ValueError) as error:
        raise CommandError(
            f"{path}: got {error}, wanted a JSON object; download the file again", REFUSED
        ) from error
    return fields


@dataclass(frozen=True)
class Decoder:
    """The shape of a decoder.

    Attributes:
        num_layers: of all kinds.
        num_heads: query heads per layer.
        num_kv_heads: KV heads per layer.
        head_size: elements of one key.
        max_positions: tokens of context that the checkpoint was made for, None if not stated.
        fields: config.json, that of the language part where there are several.
        layers: those with a cache, by kind.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_positions: int | None
    fields: Mapping[str, Any]
    layers: Layers

    @property
    def elements_per_token(self) -> int:
        """Keys and values of one token, as if all layers kept it."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size

    def dtype_bytes(self, dtype: str) -> int:
        """Bytes per element of weights and cache; vLLM's `auto` makes float32 a 16-bit type."""
        return 2 if dtype == "auto" else DTYPE_BYTES[dtype]


def check_dtype(dtype: str) -> None:
    """Raise CommandError unless `--dtype` is one of DTYPES."""
    if dtype not in DTYPES:
        raise CommandError(f"--dtype: got {dtype!r}, wanted one of {', '.join(DTYPES)}; change it")


def read_decoder(fields: Mapping[str, Any]) -> Decoder:
    """Reads the shape of a decoder.

    Args:
        fields: the content of a `config.json`.

    Raises:
        CommandError: a field is missing or wrong, or R-KV does not support the model.
    """
    text = fields.get("text_config", fields)
    if not isinstance(text, dict):
        raise _wrong_field("text_config", text, "an object")
    if text is not fields and any(text.get(name) is None for name in _SHAPE):
        text = _with_defaults(fields, text)
    _refuse_other_attention(text)
    num_heads = _positive(text, "num_attention_heads")
    num_layers = _positive(text, "num_hidden_layers")
    max_positions = text.get("max_position_embeddings")
    return Decoder(
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_positive(text, "num_key_value_heads", num_heads),
        head_size=_positive(text, "head_dim", _positive(text, "hidden_size") // num_heads),
        max_positions=max_positions if isinstance(max_positions, int) else None,
        fields=text,
        layers=_layers(text, num_layers),
    )


def _with_defaults(fields: Mapping[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """The text part with what transformers leaves out of the file when it saves a nested config."""
    # Imports torch.
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    others = {name: value for name, value in fields.items() if name != "model_type"}
    try:
        config = AutoConfig.for_model(fields.get("model_type"), **others)
    # A family that it does not know, or values that it refuses.
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError):
        return text
    return config.get_text_config().to_dict() | text


def _layers(fields: Mapping[str, Any], num_layers: int) -> Layers:
    try:
        layers = read_layers(fields, num_layers)
    except ValueError as error:
        raise CommandError(
            f"config.json: got {error}, wanted layers of full attention, with a window or with a "
            "state whose size the file tells; choose another checkpoint or complete the file",
            REFUSED,
        ) from error
    if layers.num_full:
        return layers
    found = ", ".join(f"{each.count} layers with {each.name}" for each in layers.kept)
    raise CommandError(
        f"config.json: got {found}, wanted one of full attention or more: only such a layer has "
        "anything to compress; see rkv-vllm doctor MODEL",
        REFUSED,
    )


def _refuse_other_attention(fields: Mapping[str, Any]) -> None:
    """Refuse what a cache of keys and values per head does not describe."""
    found = {
        "multi-head latent attention (kv_lora_rank)": fields.get("kv_lora_rank"),
        "an encoder beside the decoder (is_encoder_decoder)": fields.get("is_encoder_decoder"),
    }
    for feature, is_there in found.items():
        if is_there:
            raise CommandError(
                f"config.json: got {feature}, wanted a decoder that caches keys and values per "
                "head; R-KV does not support this model, see rkv-vllm doctor MODEL",
                REFUSED,
            )


def _positive(fields: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = fields.get(name)
    if value is None and default:
        return default
    if type(value) is not int or value < 1:
        raise _wrong_field(name, value, "a whole number, at least 1")
    return value


def _wrong_field(name: str, got: object, wanted: str) -> CommandError:
    found = "nothing" if got is None else repr(got)
    return CommandError(
        f"config.json, field {name!r}: got {found}, wanted {wanted}; this command reads decoders "
        "that name their fields as Llama does: choose another checkpoint or complete the file",
        REFUSED,
    )


def weight_bytes(folder: Path, decoder: Decoder, dtype: str) -> tuple[int, bool]:
    """Bytes of the weights in vLLM's memory, and whether they are a guess.

    Taken from the checkpoint's index or files where they are there, else estimated.

    Args:
        folder: of `config.json`.
        decoder: what that says.
        dtype: of the weights that are not quantised.

    Raises:
        CommandError: neither files nor config tell.
    """
    index = folder / "model.safetensors.index.json"
    total = read_config(index).get("metadata", {}).get("total_size") if index.exists() else None
    if not total:
        sizes = (sum(file.stat().st_size for file in folder.glob(kind)) for kind in _WEIGHT_FILES)
        total = next(filter(None, sizes), None)
    if not total:
        return _estimated_bytes(decoder, decoder.dtype_bytes(dtype)), True
    if not decoder.fields.get("quantization_config"):
        stored = decoder.fields.get("dtype") or decoder.fields.get("torch_dtype")
        total = total * decoder.dtype_bytes(dtype) // DTYPE_BYTES.get(stored, 2)
    return int(total), False


def _estimated_bytes(decoder: Decoder, element: int) -> int:
    """A gated MLP, or experts, in every layer; no quantisation, no biases."""
    fields = decoder.fields
    unusual = {
        "quantization_config": fields.get("quantization_config"),
        "mlp_only_layers": fields.get("mlp_only_layers"),
        "decoder_sparse_step": fields.get("decoder_sparse_step", 1) != 1,
        "layers with a state": decoder.layers.state is not None,
    }
    if named := [name for name, is_there in unusual.items() if is_there]:
        raise CommandError(
            f"config.json: got {', '.join(named)} and no weights beside it, wanted them or a model "
            "whose weights can be estimated; pass their size with --weights, as in --weights 15GiB",
            REFUSED,
        )
    hidden = _positive(fields, "hidden_size")
    experts = fields.get("num_experts") or fields.get("num_local_experts") or 0
    width = fields.get("moe_intermediate_size") if experts else None
    width = width or _positive(fields, "intermediate_size")
    shared = fields.get("shared_expert_intermediate_size") or 0
    mlp = 3 * hidden * (width * max(1, experts) + shared) + hidden * experts
    attention = 2 * hidden * (decoder.num_heads + decoder.num_kv_heads) * decoder.head_size
    tables = 1 if fields.get("tie_word_embeddings") else 2
    embedding = tables * _positive(fields, "vocab_size") * hidden
    norms = (2 * decoder.num_layers + 1) * hidden
    return element * (embedding + norms + decoder.num_layers * (attention + mlp))
