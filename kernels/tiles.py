"""What the Triton kernels share: tiles of a paged cache, and how to say to them where it lies.

Imported only where Triton serves. Next: rkv/triton.py.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from rkv_vllm.kernels.paged import PagedStates


class Strides(NamedTuple):
    """Element strides of a plain view, as the kernels take them.

    Attributes:
        layer: from layer to layer.
        head: from KV head to KV head.
        block: from block to block of a block table.
        kernel_block: between the kernel blocks of one block, 0 when it is only one.
        token: from token to token of a kernel block.
        dim: from dimension to dimension.
    """

    layer: int
    head: int
    block: int
    kernel_block: int
    token: int
    dim: int


def strides_of(states: PagedStates) -> Strides:
    """Strides of a plain view.

    Raises:
        ValueError: the view is packed in a way that strides cannot describe.
    """
    layer, block, head, *inside = states.cells.stride()
    if states.num_token_dims > 2 or len(inside) != states.num_token_dims + 1:
        raise ValueError(
            "cells: expected at most two dimensions of tokens and one of elements for Triton, got "
            f"{list(states.cells.shape[3:])} with {states.num_token_dims} of tokens"
        )
    kernel_block = inside[0] if len(inside) == 3 else 0
    return Strides(layer, head, block, kernel_block, inside[-2], inside[-1])


def kernel_block_size(states: PagedStates) -> int:
    """Tokens along the innermost dimension of tokens."""
    return states.cells.shape[2 + states.num_token_dims]


def is_interpreted() -> bool:
    """Whether TRITON_INTERPRET was set when the kernels were imported."""
    return isinstance(token_places, InterpretedFunction)


@triton.jit
def token_places(
    p_row,
    o_token,
    m_token,
    strides,
    BLOCK_SIZE: tl.constexpr,
    KERNEL_BLOCK_SIZE: tl.constexpr,
):
    """Offsets int64 of tokens within one head of one layer."""
    block = tl.load(p_row + o_token // BLOCK_SIZE, mask=m_token, other=0).to(tl.int64)
    inside = o_token % BLOCK_SIZE
    kernel_block = (inside // KERNEL_BLOCK_SIZE).to(tl.int64)
    token = (inside % KERNEL_BLOCK_SIZE).to(tl.int64)
    return block * strides.block + kernel_block * strides.kernel_block + token * strides.token


@triton.jit
def load_tile(
    p_head,
    p_row,
    o_token,
    m_token,
    strides,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KERNEL_BLOCK_SIZE: tl.constexpr,
):
    """Keys [tokens, BLOCK_D] of one head in the cache's dtype, zero outside."""
    places = token_places(
        p_row,
        o_token,
        m_token,
        strides,
        BLOCK_SIZE,
        KERNEL_BLOCK_SIZE,
    )
    o_dim = tl.arange(0, BLOCK_D)
    m_dim = o_dim < HEAD_SIZE
    p_keys = p_head + places[:, None] + o_dim[None, :] * strides.dim
    return tl.load(p_keys, mask=m_token[:, None] & m_dim[None, :], other=0.0)


@triton.jit
def product(a, b, IN_FLOAT32: tl.constexpr):
    """Product a @ b, accumulated in float32.

    Products of 16-bit floats are exact there. Those of float32 are made of three on tensor cores,
    which keeps 22 bits of each factor, an error below that of adding 128 of them up. Exact ones
    have no tensor core: the search took a minute to compile and 10 KiB of stack per thread.
    """
    if IN_FLOAT32:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")
