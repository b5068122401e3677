"""Random numbers that depend on what they are drawn for and on nothing else.

A number is a hash of the compaction's seed, the layer and the KV head in the whole model, and the
token's place: the same on every device, rank and version of torch, in any order and batch. Integers
only, so there is nothing to round. Next: random.py, which is nothing but this.

Source: the hash is the finaliser of SplitMix64: Steele, Lea, Flood, Fast Splittable Pseudorandom
Number Generators (OOPSLA 2014), figure 17.
"""

import torch
from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.methods.base import Heads, ModelFacts, layer_number

# 64-bit integers as torch has them: signed, and their products wrap around.
_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
# Steps of this size visit all numbers, evenly spread.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


class Draws:
    """Uniform numbers for the candidates of a model's heads.

    Args:
        model: the layers; their numbers in the whole model are in their names.
    """

    def __init__(self, model: ModelFacts) -> None:
        layers = torch.tensor([layer_number(name) for name in model.layers])
        heads = torch.arange(model.first_kv_head, model.first_kv_head + model.num_kv_heads)
        self._heads = ((layers << 32).unsqueeze(1) + heads).to(model.scale.device)

    def uniform(self, heads: Heads, batch: EvictionBatch) -> Tensor:
        """Draw a number for each candidate, and some more behind the shorter rows.

        Returns:
            float32 [requests, layers * KV heads, most candidates], odd multiples of 2**-24 between
            0 and 1.
        """
        own_heads = self._heads[heads.layers].flatten()
        rows = _mix(_mix(batch.seeds.clone()).unsqueeze(1) + own_heads)
        steps = _GOLDEN * torch.arange(batch.max_candidates, device=rows.device)
        drawn = _mix(rows.unsqueeze(2) + steps)
        # The top 23 bits: with a half added, a float32 holds them exactly.
        drawn >>= 41
        drawn &= 2**23 - 1
        return drawn.float().add_(0.5).mul_(2.0**-23)


def _mix(numbers: Tensor) -> Tensor:
    """Hash int64 numbers in place: every bit of the result depends on every bit."""
    numbers ^= _shifted(numbers, 30)
    numbers *= _FACTORS[0]
    numbers ^= _shifted(numbers, 27)
    numbers *= _FACTORS[1]
    numbers ^= _shifted(numbers, 31)
    return numbers


def _shifted(numbers: Tensor, shift: int) -> Tensor:
    """To the right, as unsigned numbers: torch would copy the sign."""
    return (numbers >> shift).bitwise_and_(2 ** (64 - shift) - 1)
