"""How a layer may read the bytes of a quantised cache, and which numbers tell the ways apart.

vLLM stores fp8 caches as bytes. Backends differ in the float that they take a byte for, whatever
`--kv-cache-dtype` says, and in the factor: one of a layer, or one of each KV head. So all are tried
on what the layer itself writes. Next: cache_views.py, which tries them.
"""

from collections.abc import Callable, Collection
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import Attention

from rkv_vllm.kernels.paged import FLOATS_OF_A_BYTE, Quantisation

# Numbers that both floats hold, a little above: whoever cuts and whoever rounds stores the same.
_ABOVE = 1.01
# Far below the step from one number to the next, a quarter in e5m2; above rounding in any dtype.
TOLERANCE = 0.02


class Reading(NamedTuple):
    """One way to read the bytes of a layer.

    Attributes:
        dtype: float that a byte is.
        factors: of a layer, float32 [num_kv_heads] of its keys and of its values.
    """

    dtype: torch.dtype
    factors: Callable[[Attention], tuple[Tensor, Tensor]]

    def of_layers(self, layers: Collection[Attention]) -> tuple[Quantisation, Quantisation]:
        """Of keys and of values."""
        return tuple(
            Quantisation(self.dtype, torch.stack(of_layers).contiguous())
            for of_layers in zip(*map(self.factors, layers), strict=True)
        )


def _of_tensors(layer: Attention) -> tuple[Tensor, Tensor]:
    """Factors on the device, one or one for each KV head."""
    return tuple(
        scale.float().reshape(-1).expand(layer.num_kv_heads)
        for scale in (layer._k_scale, layer._v_scale)
    )


def _of_floats(layer: Attention) -> tuple[Tensor, Tensor]:
    """Factors that the host knows, one for all heads."""
    return tuple(
        torch.full((layer.num_kv_heads,), scale, dtype=torch.float32, device=layer.kv_cache.device)
        for scale in (layer._k_scale_float, layer._v_scale_float)
    )


def readings_of(layer: Attention) -> list[Reading | None]:
    """The ways in which a layer may read its cache; None: as it is."""
    if layer.kv_cache.dtype != torch.uint8:
        return [None]
    return [Reading(*way) for way in product(FLOATS_OF_A_BYTE, (_of_tensors, _of_floats))]


def trial_numbers(shape: tuple[int, int, int], factors: Tensor, generator: torch.Generator):
    """Numbers that a cache with these factors holds, and what to write for them.

    Args:
        shape: tokens, KV heads, elements.
        factors: float32 [KV heads].
        generator: on the CPU.

    Returns:
        Two float32 tensors of that shape: what is read, and what is written.
    """
    device = factors.device
    # 1 to 1.75 in quarters, times 1/4 to 2.
    fraction = torch.randint(4, 8, shape, generator=generator) / 4
    power = torch.randint(-2, 2, shape, generator=generator).float().exp2()
    sign = 2 * torch.randint(2, shape, generator=generator) - 1
    numbers = (sign * fraction * power).to(device) * factors.unsqueeze(-1)
    return numbers, numbers * _ABOVE
