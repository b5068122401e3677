"""Keys or values of a request, as they lie in the blocks of a paged cache.

Knows strides and packings; knows no requests and no backends. worker/cache_views.py makes
these views from vLLM's layers, the kernels read and write through them.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """How one block of one head stores keys or values.

    Attributes:
        shape: dimensions of the packed block, in memory order.
        order: permutation that puts the token dimensions first and the head dimensions last.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]

    def element_offsets(self, block_size: int) -> Tensor:
        """Offset of every element inside the packed block, int64 [block_size, head_size]."""
        offsets = torch.arange(prod(self.shape)).view(self.shape).permute(self.order)
        return offsets.reshape(block_size, -1)


class PagedStates:
    """Keys or values of several layers, addressed by token.

    Args:
        blocks: [num_layers, num_blocks, num_kv_heads, block_size * head_size], a view of the cache
            whose last dimension is one packed block and contiguous.
        packing: the layout of that dimension.
        block_size: tokens per block.

    Raises:
        ValueError: `blocks` has other dimensions or a strided last one.
    """

    def __init__(self, blocks: Tensor, packing: Packing, block_size: int) -> None:
        if blocks.dim() != 4 or blocks.stride(-1) != 1 or blocks.shape[-1] != prod(packing.shape):
            raise ValueError(
                "blocks: expected [layers, blocks, heads, "
                f"{prod(packing.shape)}] with a contiguous last dimension, got "
                f"{list(blocks.shape)} with strides {blocks.stride()}"
            )
        self.blocks = blocks
        self.packing = packing
        self.block_size = block_size
        self.head_size = blocks.shape[-1] // block_size

    @property
    def num_layers(self) -> int:
        """Layers of this view."""
        return self.blocks.shape[0]

    @property
    def num_heads(self) -> int:
        """KV heads of one layer."""
        return self.blocks.shape[2]

    @cached_property
    def offsets(self) -> tuple[Tensor, Tensor]:
        """Offsets int64 [block_size] of tokens and [head_size] of dimensions inside a block.

        Raises:
            ValueError: an element's offset is not the sum of the two.
        """
        elements = self.packing.element_offsets(self.block_size)
        tokens, dims = elements[:, 0].contiguous(), elements[0].contiguous()
        if not torch.equal(elements, tokens.unsqueeze(1) + dims):
            raise ValueError(f"packing {self.packing} mixes tokens and dimensions")
        return tokens, dims

    def layers(self, layers: slice) -> "PagedStates":
        """The same view over some of the layers."""
        return PagedStates(self.blocks[layers], self.packing, self.block_size)

    def read(self, block_ids: Tensor, num_tokens: int) -> Tensor:
        """Copy the first `num_tokens` tokens of a row of blocks.

        Args:
            block_ids: int64 [n >= ceil(num_tokens / block_size)], the row in order.
            num_tokens: physical tokens.

        Returns:
            [num_layers, num_kv_heads, num_tokens, head_size] in the cache's dtype.
        """
        packed = self.blocks[:, block_ids].unflatten(-1, self.packing.shape)
        tokens = packed.permute(0, 2, 1, *(3 + dim for dim in self.packing.order))
        dense = tokens.reshape(self.num_layers, self.num_heads, -1, self.head_size)
        return dense[:, :, :num_tokens]

    def write(self, block_ids: Tensor, states: Tensor) -> None:
        """Fill a row of blocks with tokens; what follows the last token becomes zero.

        Args:
            block_ids: int64 [ceil(num_tokens / block_size)], distinct.
            states: [num_layers, num_kv_heads, num_tokens, head_size].
        """
        num_blocks = block_ids.shape[0]
        dense = states.new_zeros(
            self.num_layers, self.num_heads, num_blocks * self.block_size, self.head_size
        )
        dense[:, :, : states.shape[2]] = states
        order = self.packing.order
        permuted_shape = [self.packing.shape[dim] for dim in order]
        tokens = dense.view(self.num_layers, self.num_heads, num_blocks, *permuted_shape)
        packed = tokens.permute(0, 2, 1, *(3 + order.index(dim) for dim in range(len(order))))
        self.blocks[:, block_ids] = packed.flatten(3)
