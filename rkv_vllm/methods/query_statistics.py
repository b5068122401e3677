"""What a model's queries are like before RoPE: a small file, made once per model from a text.

`rkv-vllm calibrate` writes it (rkv_vllm/calibrate/), `triattention.py` reads it. A complex number
per frequency stands as RoPE pairs elements: element f of a head is its real, element
`f + head_size / 2` its imaginary part.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rkv_vllm.whole_file import whole_file

_FORMAT = "rkv-vllm query statistics"
_VERSION = "1"
_ROTARY_STYLE = "half-split"
_COUNTS = ("num_layers", "num_query_heads", "num_kv_heads", "head_size", "num_tokens")


@dataclass(frozen=True, eq=False)
class QueryStatistics:
    """Means over the tokens of a text, for every layer and query head of a whole model.

    Attributes:
        model: its name: the last part of a path or of a hub id.
        num_kv_heads: KV heads of a layer.
        num_tokens: tokens that were averaged.
        inv_freq: float32 [head_size / 2], RoPE's angle per position of each frequency.
        mean_query: float32 [layers, query heads, head_size], the mean as a complex number.
        mean_magnitude: float32 [layers, query heads, head_size / 2], the mean of its absolute.
    """

    model: str
    num_kv_heads: int
    num_tokens: int
    inv_freq: Tensor
    mean_query: Tensor
    mean_magnitude: Tensor

    @property
    def num_layers(self) -> int:
        """Attention layers."""
        return self.mean_query.shape[0]

    @property
    def num_query_heads(self) -> int:
        """Query heads of a layer."""
        return self.mean_query.shape[1]

    @property
    def head_size(self) -> int:
        """Elements of a query."""
        return self.mean_query.shape[2]

    def save(self, path: Path) -> None:
        """Write the file; whatever stops it leaves an older one as it was.

        Raises:
            OSError: it cannot be written.
        """
        metadata = {name: str(getattr(self, name)) for name in ("model", *_COUNTS)}
        metadata |= {"format": _FORMAT, "version": _VERSION, "rotary_style": _ROTARY_STYLE}
        metadata["rotary_dim"] = str(2 * self.inv_freq.shape[0])
        tensors = {
            name: getattr(self, name).float().contiguous()
            for name in ("inv_freq", "mean_query", "mean_magnitude")
        }
        with whole_file(path) as half:
            # Not `save_file`, whose files only their owner may read.
            half.write_bytes(save(tensors, metadata))


def load_statistics(path: str) -> QueryStatistics:
    """Read a file that `QueryStatistics.save` has written.

    Raises:
        ValueError: it cannot be read, or is another or a damaged file; says what was got.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            _check_metadata(metadata)
            tensors = {
                name: file.get_tensor(name) for name in ("inv_freq", "mean_query", "mean_magnitude")
            }
    except (OSError, SafetensorError) as error:
        raise ValueError(f"a file that cannot be read ({error})") from error
    try:
        counts = {name: int(metadata[name]) for name in _COUNTS}
        statistics = QueryStatistics(
            metadata["model"], counts["num_kv_heads"], counts["num_tokens"], **tensors
        )
    except (KeyError, ValueError) as error:
        raise ValueError(f"a damaged file (metadata: {error})") from error
    _check_tensors(tensors, counts)
    return statistics


def _check_metadata(metadata: dict[str, str]) -> None:
    if metadata.get("format") != _FORMAT:
        raise ValueError("a safetensors file without query statistics")
    if metadata.get("version") != _VERSION or metadata.get("rotary_style") != _ROTARY_STYLE:
        raise ValueError(
            f"a file of version {metadata.get('version')} with {metadata.get('rotary_style')} RoPE"
        )


def _check_tensors(tensors: dict[str, Tensor], counts: dict[str, int]) -> None:
    layers, heads, size = (counts[name] for name in ("num_layers", "num_query_heads", "head_size"))
    wanted = {
        "inv_freq": [size // 2],
        "mean_query": [layers, heads, size],
        "mean_magnitude": [layers, heads, size // 2],
    }
    for name, shape in wanted.items():
        tensor = tensors[name]
        if list(tensor.shape) != shape or tensor.dtype != torch.float32:
            raise ValueError(
                f"a damaged file ({name} is {tensor.dtype} {list(tensor.shape)}, not float32 "
                f"{shape})"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"a damaged file ({name} holds NaN or infinite numbers)")
