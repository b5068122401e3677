"""An fp8 cache as vLLM's own op fills it: what the reference rounds keys and values with."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.platforms import current_platform

SUPPORTED = torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()
needs_fp8_on_cpu = pytest.mark.skipif(
    not (SUPPORTED or current_platform.is_cuda()),
    reason="vLLM's fp8 cache on a CPU needs AVX-512 or AMX",
)
# Values of --kv-cache-dtype and the float that CPU_ATTN takes a byte for.
DTYPES = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
_BLOCK_SIZE = 32


class Fp8Store:
    """A `Store` of tests/reference.py.

    Args:
        cache_dtype: as for `--kv-cache-dtype`.
        scales: factor of the keys and of the values of each layer; none: 1.
    """

    def __init__(self, cache_dtype: str, scales: Sequence[tuple[float, float]] = ()) -> None:
        self.cache_dtype = cache_dtype
        self.scales = scales

    def __call__(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What attention reads of keys and values [heads, tokens, d]."""
        scales = self.scales[layer] if self.scales else (1.0, 1.0)
        if current_platform.is_cuda():
            dtype, numbers = DTYPES[self.cache_dtype], zip((keys, values), scales, strict=True)
            return tuple((part / scale).to(dtype).to(part.dtype) * scale for part, scale in numbers)
        heads, tokens, size = keys.shape
        num_blocks = math.ceil(tokens / _BLOCK_SIZE)
        cache = torch.zeros(num_blocks, heads, 2 * _BLOCK_SIZE, size, dtype=torch.uint8)
        ops.cpu_attn_reshape_and_cache(
            keys.transpose(0, 1).contiguous(),
            values.transpose(0, 1).contiguous(),
            *cache.chunk(2, dim=2),
            torch.arange(tokens),
            "vec",
            k_scale=scales[0],
            v_scale=scales[1],
            kv_cache_dtype=self.cache_dtype,
        )
        halves = cache.view(num_blocks, heads, 2, _BLOCK_SIZE * size)
        # Blocks hold a matrix of keys transposed, and one of values.
        key_bytes = halves[:, :, 0].unflatten(2, (size, _BLOCK_SIZE)).transpose(2, 3)
        value_bytes = halves[:, :, 1].unflatten(2, (_BLOCK_SIZE, size))
        return tuple(
            part.transpose(0, 1)
            .reshape(heads, -1, size)[:, :tokens]
            .contiguous()
            .view(DTYPES[self.cache_dtype])
            .to(keys.dtype)
            * scale
            for part, scale in zip((key_bytes, value_bytes), scales, strict=True)
        )


def calibrated_model(directory: Path, model: Path, scales: Sequence, strategy: str) -> Path:
    """A copy of a model whose checkpoint asks for an fp8 cache and brings its factors.

    Args:
        directory: folder to write to.
        model: folder of a model in one file of weights.
        scales: (keys, values) of each layer, each a number or one for every KV head.
        strategy: "tensor" or "attn_head", as llm-compressor calls them.

    Returns:
        The folder. transformers cannot load it: the reference takes the first one.
    """
    path = directory / f"calibrated-{strategy}"
    shutil.copytree(model, path)
    weights = load_file(path / "model.safetensors")
    for layer, pair in enumerate(scales):
        for name, factors in zip(("k_scale", "v_scale"), pair, strict=True):
            tensor = torch.tensor(factors, dtype=torch.float32).reshape(-1)
            weights[f"model.layers.{layer}.self_attn.{name}"] = tensor
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": {
            "num_bits": 8,
            "type": "float",
            "strategy": strategy,
            "dynamic": False,
            "symmetric": True,
        },
    }
    (path / "config.json").write_text(json.dumps(config))
    return path
