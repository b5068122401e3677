"""What `config.json` of a checkpoint says about its size: no weights, no network, no vLLM.

Finds the file in a folder or in the local cache of the Hugging Face hub, and reads the shape of a
decoder with full attention out of it. Models of other kinds are refused by name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkv_vllm.cli.errors import REFUSED, CommandError
from rkv_vllm.fit.refusals import has_limited_layers

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DTYPES = ("auto", *DTYPE_BYTES)

# Bits per weight of methods whose config names none.
_METHOD_BITS = {"fp8": 8, "fbgemm_fp8": 8, "mxfp4": 4}
# Families whose query, key and value projections have biases although config.json does not say so.
_QKV_BIAS = ("qwen2", "qwen2_moe")


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
    cached = _in_hub_cache(model)
    if cached is None:
        raise CommandError(
            f"MODEL: got {model!r}, wanted a folder with config.json or a hub id in the local "
            f"cache; correct the path or run: hf download {model} config.json"
        )
    return cached


def _in_hub_cache(model: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def read_config(path: Path) -> dict[str, Any]:
    """Returns the fields of a `config.json`.

    Raises:
        CommandError: not a JSON object.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CommandError(
            f"{path}: got {error}, wanted a JSON object; download the file again", REFUSED
        ) from error
    if not isinstance(fields, dict):
        raise CommandError(
            f"{path}: got a JSON {type(fields).__name__}, wanted an object; download the file "
            "again",
            REFUSED,
        )
    return fields


@dataclass(frozen=True)
class Decoder:
    """The shape of a decoder with full attention in every layer.

    Attributes:
        num_layers: attention layers.
        num_heads: query heads per layer.
        num_kv_heads: KV heads per layer.
        head_size: elements of one key.
        max_positions: tokens of context that the checkpoint was made for, None if not stated.
        fields: config.json, that of the language part where there are several.
        is_multimodal: it has other parts, whose weights `num_weights` does not count.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_positions: int | None
    fields: Mapping[str, Any]
    is_multimodal: bool

    @property
    def elements_per_token(self) -> int:
        """Keys and values of one token in the whole model's KV cache."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size

    def dtype_bytes(self, dtype: str) -> int:
        """Bytes per element of weights and cache; vLLM's `auto` makes float32 a 16-bit type."""
        return 2 if dtype == "auto" else DTYPE_BYTES[dtype]

    def weight_bytes(self, dtype: str) -> int:
        """Estimates the bytes of the weights: a gated MLP or experts in every layer.

        Embeddings stay in `dtype`; linear layers take the bits that a quantised checkpoint
        names, less its scales and zero points (a few per cent).

        Raises:
            CommandError: the config does not tell, or the model is built otherwise.
        """
        embedding, linear = _num_weights(self)
        bits = _quantized_bits(self.fields)
        element = self.dtype_bytes(dtype)
        return int(embedding * element + linear * (element if bits is None else bits / 8))


def check_dtype(dtype: str) -> None:
    """Raise CommandError unless `--dtype` is one of DTYPES."""
    if dtype not in DTYPES:
        raise CommandError(f"--dtype: got {dtype!r}, wanted one of {', '.join(DTYPES)}; change it")


def read_decoder(fields: Mapping[str, Any]) -> Decoder:
    """Reads the shape of a decoder.

    Args:
        fields: the content of a `config.json`.

    Raises:
        CommandError: a field is missing or wrong, or attention is not full in every layer.
    """
    text = fields.get("text_config", fields)
    if not isinstance(text, dict):
        raise _wrong_field("text_config", text, "an object")
    _refuse_other_attention(text)
    num_heads = _positive(text, "num_attention_heads")
    hidden_size = _positive(text, "hidden_size")
    max_positions = text.get("max_position_embeddings")
    return Decoder(
        num_layers=_positive(text, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_positive(text, "num_key_value_heads", num_heads),
        head_size=_positive(text, "head_dim", hidden_size // num_heads),
        max_positions=max_positions if isinstance(max_positions, int) else None,
        fields=text,
        is_multimodal=text is not fields,
    )


def _refuse_other_attention(fields: Mapping[str, Any]) -> None:
    """Refuse what a KV cache of one size per token does not describe."""
    windowed = fields.get("sliding_window") and fields.get("use_sliding_window", True)
    found = {
        "multi-head latent attention (kv_lora_rank)": fields.get("kv_lora_rank"),
        "chunked attention (attention_chunk_size)": fields.get("attention_chunk_size"),
        "sliding-window or linear attention layers": has_limited_layers(fields, bool(windowed)),
        "an encoder beside the decoder (is_encoder_decoder)": fields.get("is_encoder_decoder"),
    }
    for feature, is_there in found.items():
        if is_there:
            raise CommandError(
                f"config.json: got {feature}, wanted full attention in every layer; R-KV does not "
                "support this model, see rkv-vllm doctor MODEL",
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


def _num_weights(decoder: Decoder) -> tuple[int, int]:
    """Number of weights in (embeddings and norms, linear layers)."""
    fields = decoder.fields
    hidden_size = _positive(fields, "hidden_size")
    query_size = decoder.num_heads * decoder.head_size
    kv_size = decoder.num_kv_heads * decoder.head_size
    attention = 2 * hidden_size * (query_size + kv_size)
    has_bias = fields.get("attention_bias") or fields.get("model_type") in _QKV_BIAS
    bias = query_size + 2 * kv_size if has_bias else 0
    mlp = sum(_mlp_weights(fields, i) for i in range(decoder.num_layers))
    tables = 1 if fields.get("tie_word_embeddings") else 2
    embedding = tables * _positive(fields, "vocab_size") * hidden_size
    norms = (2 * decoder.num_layers + 1) * hidden_size
    return embedding + norms + decoder.num_layers * bias, decoder.num_layers * attention + mlp


def _mlp_weights(fields: Mapping[str, Any], layer: int) -> int:
    """Weights of gate, up and down projection of one layer, those of all its experts included."""
    hidden_size = _positive(fields, "hidden_size")
    experts = next((name for name in ("num_experts", "num_local_experts") if fields.get(name)), "")
    step = _positive(fields, "decoder_sparse_step", 1)
    is_dense = layer in (fields.get("mlp_only_layers") or ()) or (layer + 1) % step != 0
    if not experts or is_dense:
        return 3 * hidden_size * _mlp_width(fields)
    num_experts = _positive(fields, experts)
    width = fields.get("moe_intermediate_size") or _mlp_width(fields)
    shared = fields.get("shared_expert_intermediate_size") or 0
    return hidden_size * (3 * (num_experts * width + shared) + num_experts)


def _mlp_width(fields: Mapping[str, Any]) -> int:
    width = fields.get("intermediate_size")
    if type(width) is not int:
        found = "nothing" if width is None else repr(width)
        raise CommandError(
            f"config.json, field 'intermediate_size': got {found}, wanted the width of the MLP to "
            "estimate the weights; pass their size with --weights, for example --weights 15GiB",
            REFUSED,
        )
    return width


def _quantized_bits(fields: Mapping[str, Any]) -> float | None:
    """Bits per weight of a quantised checkpoint, None for a plain one.

    Raises:
        CommandError: the config names a method but no bits.
    """
    quantization = fields.get("quantization_config")
    if not quantization:
        return None
    if not isinstance(quantization, dict):
        raise _wrong_field("quantization_config", quantization, "an object")
    found = [quantization.get(name) for name in ("bits", "w_bit")]
    found += [quantization.get(f"load_in_{n}bit") and n for n in (4, 8)]
    for group in (quantization.get("config_groups") or {}).values():
        found.append((group.get("weights") or {}).get("num_bits"))
    found.append(_METHOD_BITS.get(quantization.get("quant_method")))
    bits = next((bits for bits in found if bits), None)
    if bits is None:
        raise CommandError(
            f"config.json, quantization_config: got {quantization.get('quant_method')!r} without "
            "the number of bits, wanted it to estimate the weights; pass their size with --weights",
            REFUSED,
        )
    return bits
