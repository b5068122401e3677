"""Keys or values of several layers, as they lie in the blocks of a paged cache.

Knows strides and packings; knows no requests and no backends. worker/cache_views.py makes
these views from vLLM's layers, the kernels read and write through them.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

FLOATS_OF_A_BYTE = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Packing:
    """How one block of one head stores keys or values where it is no plain matrix.

    Attributes:
        shape: dimensions of the packed block, in memory order.
        order: permutation that puts the token dimensions first and the head dimensions last.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]


@dataclass(frozen=True)
class Quantisation:
    """How the bytes of a quantised cache are read: a float of one byte times a factor.

    Attributes:
        dtype: of that float, torch.float8_e4m3fn or torch.float8_e5m2.
        scale: float32 [num_layers, num_kv_heads], the factors.
    """

    dtype: torch.dtype
    scale: Tensor


class PagedStates:
    """Keys or values of several layers, addressed by token.

    Args:
        blocks: with a packing [num_layers, num_blocks, num_kv_heads, block_size * head_size], a
            view whose last dimension is one packed block and contiguous. Without one
            [num_layers, num_kernel_blocks, num_kv_heads, kernel_block_size, head_size], a view
            with any strides.
        packing: the layout of a packed block, None for a plain view.
        block_size: tokens that one id of a block table stands for. Of a plain view it may be a
            multiple of kernel_block_size; id b then stands for the neighbours
            b * ratio ... b * ratio + ratio - 1.
        quantisation: how blocks of bytes are read, None where they hold floats.

    Attributes:
        cells: [num_layers, num_blocks, num_kv_heads, *token dimensions, *head dimensions], the
            same memory with one axis per stride.
        num_token_dims: how many dimensions of `cells` count the tokens of a block.

    Raises:
        ValueError: the shape or the strides of `blocks` fit neither description.
    """

    def __init__(
        self,
        blocks: Tensor,
        packing: Packing | None,
        block_size: int,
        quantisation: Quantisation | None = None,
    ) -> None:
        self.blocks = blocks
        self.packing = packing
        self.block_size = block_size
        self.quantisation = quantisation
        split = _split_plain(blocks, block_size) if packing is None else _unpack(blocks, packing)
        self.cells = split
        self.num_token_dims = _count_token_dims(split.shape[3:], block_size)
        self.head_size = prod(split.shape[3 + self.num_token_dims :])
        if quantisation is not None:
            _check_quantisation(quantisation, split)

    @property
    def num_layers(self) -> int:
        """Layers of this view."""
        return self.cells.shape[0]

    @property
    def num_blocks(self) -> int:
        """Blocks that ids of a block table can name."""
        return self.cells.shape[1]

    @property
    def num_heads(self) -> int:
        """KV heads of one layer."""
        return self.cells.shape[2]

    @property
    def device(self) -> torch.device:
        """Where the cache lies."""
        return self.blocks.device

    @property
    def dtype(self) -> torch.dtype:
        """What attention takes an element of the cache for."""
        return self.blocks.dtype if self.quantisation is None else self.quantisation.dtype

    @cached_property
    def offsets(self) -> tuple[Tensor, Tensor]:
        """Offsets int64 [block_size] of tokens and [head_size] of dimensions inside a block."""
        first_head_dim = 3 + self.num_token_dims
        tokens = _offsets(self.cells, range(3, first_head_dim))
        dims = _offsets(self.cells, range(first_head_dim, self.cells.dim()))
        return tokens, dims

    def layers(self, layers: slice) -> "PagedStates":
        """The same view over some of the layers."""
        quantisation = self.quantisation
        if quantisation is not None:
            quantisation = Quantisation(quantisation.dtype, quantisation.scale[layers])
        return PagedStates(self.blocks[layers], self.packing, self.block_size, quantisation)

    def scale_of_heads(self, of_layers: Tensor) -> Tensor:
        """Factors of what is computed from the elements as they are stored.

        Args:
            of_layers: float32 [num_layers], factors of what is computed from `numbers`.

        Returns:
            Contiguous float32 [num_layers * num_kv_heads].
        """
        by_head = of_layers.repeat_interleave(self.num_heads)
        if self.quantisation is not None:
            by_head *= self.quantisation.scale.flatten()
        return by_head

    def numbers(self, block_ids: Tensor, stop: int, start: int = 0) -> Tensor:
        """The tokens of `read` as attention takes them.

        Returns:
            [num_layers, num_kv_heads, stop - start, head_size] in the cache's dtype; of a quantised
            cache float32.
        """
        stored = self.read(block_ids, stop, start)
        if self.quantisation is None:
            return stored
        floats = stored.view(self.quantisation.dtype).float()
        return floats.mul_(self.quantisation.scale[:, :, None, None])

    def fill_with_noise(self, block_id: int) -> None:
        """Fill one block of all layers with finite numbers of no meaning."""
        cells = self.cells[:, block_id]
        # From 2 ** -6 in e4m3 and 2 ** -13 in e5m2 up to 2 in both.
        cells.normal_() if self.quantisation is None else cells.random_(0x08, 0x41)

    def read(self, block_ids: Tensor, stop: int, start: int = 0) -> Tensor:
        """Copy tokens [start, stop) of a row of blocks; reads no block before that of `start`.

        Args:
            block_ids: int32 or int64 [n >= ceil(stop / block_size)], the row in order.
            stop: physical tokens.
            start: physical tokens to leave out at the front.

        Returns:
            [num_layers, num_kv_heads, stop - start, head_size] as stored, maybe bytes.
        """
        first = start // self.block_size
        last = -(-stop // self.block_size)
        rows = self.cells[:, block_ids[first:last]].transpose(1, 2)
        dense = rows.reshape(self.num_layers, self.num_heads, -1, self.head_size)
        left_out = first * self.block_size
        return dense[:, :, start - left_out : stop - left_out]

    def write(self, block_ids: Tensor, states: Tensor) -> None:
        """Fill a row of blocks with tokens; what follows the last token becomes zero.

        Args:
            block_ids: int32 or int64 [ceil(num_tokens / block_size)], distinct.
            states: [num_layers, num_kv_heads, num_tokens, head_size], as stored.
        """
        num_blocks = block_ids.shape[0]
        dense = states.new_zeros(
            self.num_layers, self.num_heads, num_blocks * self.block_size, self.head_size
        )
        dense[:, :, : states.shape[2]] = states
        rows = dense.view(self.num_layers, self.num_heads, num_blocks, *self.cells.shape[3:])
        self.cells[:, block_ids] = rows.transpose(1, 2)


def _unpack(blocks: Tensor, packing: Packing) -> Tensor:
    if blocks.dim() != 4 or blocks.stride(-1) != 1 or blocks.shape[-1] != prod(packing.shape):
        raise ValueError(
            f"blocks: expected [layers, blocks, heads, {prod(packing.shape)}] with a contiguous "
            f"last dimension, got {list(blocks.shape)} with strides {blocks.stride()}"
        )
    unpacked = blocks.unflatten(-1, packing.shape)
    return unpacked.permute(0, 1, 2, *(3 + dim for dim in packing.order))


def _check_quantisation(quantisation: Quantisation, cells: Tensor) -> None:
    dtype, scale = quantisation.dtype, quantisation.scale
    shape = (cells.shape[0], cells.shape[2])
    if dtype not in FLOATS_OF_A_BYTE or cells.dtype != torch.uint8:
        raise ValueError(
            f"quantisation: expected bytes read as one of {FLOATS_OF_A_BYTE}, got {cells.dtype} "
            f"read as {dtype}"
        )
    if scale.shape != shape or scale.dtype != torch.float32 or scale.device != cells.device:
        raise ValueError(
            f"quantisation: expected scale float32 {list(shape)} on {cells.device}, got "
            f"{scale.dtype} {list(scale.shape)} on {scale.device}"
        )


def _split_plain(blocks: Tensor, block_size: int) -> Tensor:
    """Give the kernel blocks of one block an axis of their own if there are several."""
    fits = blocks.dim() == 5 and block_size % blocks.shape[3] == 0
    ratio = block_size // blocks.shape[3] if fits else 0
    if not ratio or blocks.shape[1] % ratio:
        raise ValueError(
            "blocks: expected [layers, kernel blocks, heads, kernel_block_size, head_size] whose "
            f"kernel blocks make whole blocks of {block_size} tokens, got {list(blocks.shape)}"
        )
    if ratio == 1:
        return blocks
    return blocks.unflatten(1, (-1, ratio)).movedim(2, 3)


def _count_token_dims(shape: tuple[int, ...], block_size: int) -> int:
    for count in range(1, len(shape)):
        if prod(shape[:count]) == block_size:
            return count
    raise ValueError(
        f"a block of cells {list(shape)} has no leading dimensions of {block_size} tokens: its "
        "packing mixes tokens and dimensions, or block_size is another"
    )


def _offsets(cells: Tensor, dims: range) -> Tensor:
    offsets = torch.zeros((), dtype=torch.int64)
    for dim in dims:
        steps = torch.arange(cells.shape[dim]) * cells.stride(dim)
        offsets = offsets.unsqueeze(-1) + steps
    return offsets.flatten().contiguous()
