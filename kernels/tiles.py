"""What the Triton kernels share: tiles of a paged cache, and how to say to them where it lies.

Imported only where Triton serves. Next: rkv/triton/__init__.py.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.paged import PagedStates

# Tokens per tile. 64 rows are one warp group's tensor-core instruction on Hopper; 64 columns keep
# the products (64 x 64 float32 over 128 threads: 32 registers) and two tiles of bf16 keys of 128
# dimensions in registers. Wider tiles would lengthen the search: most tokens find their key among
# the newest 3 percent, and a tile is searched as a whole. Not measured on a GPU yet.
TILE = tl.constexpr(64)
# Tokens at once where a program goes through one number per token of a head.
ROW_TILE = tl.constexpr(1024)

# What the bytes of a quantised cache are to a kernel: to be decoded, or floats of the hardware.
E4M3, E5M2, NATIVE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)

_DECODED = {torch.float8_e4m3fn: E4M3.value, torch.float8_e5m2: E5M2.value}

# Triton compiles once more for every class of these (1, multiples of 16, others), which would stop
# serving for a second whenever a flush brings a new one. Strides and the cache itself stay special.
VARYING = (
    "p_block_table",
    "table_stride",
    "p_settled_lens",
    "p_prefix_lens",
    "p_seats",
    "p_window_ends",
    "p_scale",
    "p_soft_cap",
    "num_layers",
    "max_len",
    "num_tiles",
    "num_parts",
    "max_candidates",
    "rows_per_request",
    "first_member",
    "stop_member",
    "group",
)


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


def grain_of(states: PagedStates) -> int:
    """Tokens that lie one after the other wherever a tile or a kernel block of them begins."""
    return math.gcd(kernel_block_size(states), TILE.value)


def most_tiles(states: PagedStates, batch: EvictionBatch, num_left_out: int = 0) -> int:
    """Tiles of the request that has the most.

    Args:
        states: the cache; tiles begin where a grain of it begins.
        batch: the requests.
        num_left_out: judged tokens at the end that no tile has to hold.
    """
    grain = grain_of(states)
    positions = max(e.prefix_len % grain + e.num_judged for e in batch.evictions) - num_left_out
    return triton.cdiv(positions, TILE.value)


def layout_of(states: PagedStates) -> dict[str, int | bool]:
    """What is fixed as long as a cache lives."""
    block_d = max(16, triton.next_power_of_2(states.head_size))
    return {
        "NUM_HEADS": states.num_heads,
        "HEAD_SIZE": states.head_size,
        "BLOCK_D": block_d,
        "BLOCK_SIZE": states.block_size,
        "KERNEL_BLOCK_SIZE": kernel_block_size(states),
        "GRAIN": grain_of(states),
        "FP8": fp8_of(states.dtype, states.device),
        # The interpreter multiplies bf16 as if it were integers.
        "IN_FLOAT32": is_interpreted(),
        # Tiles of wider heads need the registers of more threads.
        "num_warps": 4 if block_d <= 128 else 8,
    }


def add_up_layout(states: PagedStates) -> dict[str, int]:
    """The part of `layout_of` for kernels that read no keys."""
    layout = layout_of(states)
    return {key: layout[key] for key in ("HEAD_SIZE", "BLOCK_D", "GRAIN")}


def register_limit(states: PagedStates, most: int) -> dict[str, int]:
    """Registers of a thread as an option of a launch, where fewer than it would like are worth it.

    Products in float32 and wider heads need what they ask for; AMD's compiler knows no such limit.

    Args:
        states: what is read.
        most: registers.
    """
    few = states.dtype.itemsize <= 2 and states.head_size <= 128 and torch.version.hip is None
    return {"maxnreg": most} if few else {}


def fp8_of(dtype: torch.dtype, device: torch.device) -> int:
    """How a kernel takes elements of a dtype; 0 unless that is a float of a byte."""
    if dtype in _DECODED and has_fp8(device):
        return NATIVE.value
    return _DECODED.get(dtype, 0)


@cache
def has_fp8(device: torch.device) -> bool:
    """Whether Triton compiles fp8 for this device; before sm_89 it does not know E4M3."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def elements(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as a kernel takes them, other elements as they are.

    Args:
        stored: elements of a cache, or queries.
        dtype: what they are.
    """
    fp8 = fp8_of(dtype, stored.device)
    if not fp8:
        return stored
    return stored.view(dtype if fp8 == NATIVE.value else torch.uint8)


def is_interpreted() -> bool:
    """Whether TRITON_INTERPRET was set when the kernels were imported."""
    return isinstance(token_places, InterpretedFunction)


@triton.jit
def tile_of_program(num_tiles):
    """Row and tile of this program, whose neighbours have the same row."""
    i_program = tl.program_id(0).to(tl.uint32)
    i_row = i_program // num_tiles.to(tl.uint32)
    return i_row.to(tl.int32), (i_program - i_row * num_tiles.to(tl.uint32)).to(tl.int32)


@triton.jit
def place_of_row(i_row, num_layers, NUM_HEADS: tl.constexpr):
    """Request, layer and head of a row; without a sign, and with one division that is one."""
    i_row = i_row.to(tl.uint32)
    per_request = (num_layers * NUM_HEADS).to(tl.uint32)
    i_request = i_row // per_request
    inside = i_row - i_request * per_request
    i_layer = inside // NUM_HEADS
    return i_request.to(tl.int32), i_layer.to(tl.int32), (inside % NUM_HEADS).to(tl.int32)


@triton.jit
def judged_span(p_prefix_lens, p_settled_lens, i_request, GRAIN: tl.constexpr):
    """Protected and settled tokens of a request, and where its first tile begins.

    That is with the grain of the first judged token: `lead` tokens before it, at position `start`.
    """
    prefix_len = tl.load(p_prefix_lens + i_request)
    settled_len = tl.load(p_settled_lens + i_request)
    lead = prefix_len % GRAIN
    return prefix_len, settled_len, lead, prefix_len - lead


@triton.jit
def states_of_head(p_states, strides, p_block_table, table_stride, i_request, i_layer, i_head):
    """One head of one layer, and the block ids of a request."""
    p_head = p_states + i_layer.to(tl.int64) * strides.layer + i_head.to(tl.int64) * strides.head
    return p_head, p_block_table + i_request.to(tl.int64) * table_stride


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
    # Division of what may be negative takes three more instructions.
    o_token = o_token.to(tl.uint32)
    block = tl.load(p_row + o_token // BLOCK_SIZE, mask=m_token, other=0).to(tl.int64)
    inside = o_token % BLOCK_SIZE
    kernel_block = (inside // KERNEL_BLOCK_SIZE).to(tl.int64)
    token = (inside % KERNEL_BLOCK_SIZE).to(tl.int64)
    return block * strides.block + kernel_block * strides.kernel_block + token * strides.token


@triton.jit
def floats_of_bytes(b_bytes, FP8: tl.constexpr):
    """Bytes of E4M3 or E5M2 as the float16 that they are exactly.

    Where the hardware does not do it in arithmetic of bits, as in csrc/cpu/heads.h; in Triton's
    interpreter too, whose own fp8 knows no NaN and cuts what is small. Hardware is worth it: the
    search of E4M3 takes 1173 instructions per column tile of sm_90 in arithmetic of bits.
    """
    if FP8 == NATIVE:
        b_floats = b_bytes.to(tl.float16)
    elif FP8 == E5M2:
        b_floats = (b_bytes.to(tl.uint16) << 8).to(tl.float16, bitcast=True)
    else:
        magnitude = (b_bytes & 0x7F).to(tl.uint16)
        half = (b_bytes & 0x80).to(tl.uint16) << 8 | magnitude << 7
        b_floats = half.to(tl.float16, bitcast=True) * 256.0
        b_floats = tl.where(magnitude == 0x7F, float("nan"), b_floats).to(tl.float16)
    return b_floats


@triton.jit
def load_tile(
    p_head,
    p_row,
    first,
    stop,
    strides,
    TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KERNEL_BLOCK_SIZE: tl.constexpr,
    GRAIN: tl.constexpr,
    FP8: tl.constexpr,
    begin=0,
    MASKED: tl.constexpr = False,
):
    """Keys or values [TOKENS, BLOCK_D] of one head at positions [first, first + TOKENS).

    In the cache's dtype; of an fp8 cache float16 without the head's factor (`floats_of_bytes`).

    Goes by grains, so that a thread looks up one block and one offset for many tokens, and without
    masks: what stands before or behind the tokens in their first and last grain is read as it is,
    and rows behind the last grain repeat it. MASKED, positions outside of [begin, stop) are zero:
    that is for whoever adds rows up.

    `first` is a multiple of GRAIN, `stop` > 0 the number of positions that hold tokens.
    """
    last_grain = (stop - 1) // GRAIN * GRAIN
    grain = tl.minimum(first + tl.arange(0, TOKENS // GRAIN) * GRAIN, last_grain)
    places = token_places(p_row, grain, grain >= 0, strides, BLOCK_SIZE, KERNEL_BLOCK_SIZE)
    o_token = tl.arange(0, GRAIN).to(tl.int64) * strides.token
    o_dim = tl.arange(0, BLOCK_D)
    p_cells = p_head + places[:, None, None] + o_token[None, :, None]
    p_cells += (o_dim * strides.dim)[None, None, :]
    m_dim = (o_dim < HEAD_SIZE)[None, None, :]
    if MASKED:
        position = (first + tl.arange(0, TOKENS // GRAIN) * GRAIN)[:, None] + tl.arange(0, GRAIN)
        m_token = (position >= begin) & (position < stop)
        b_states = tl.load(p_cells, mask=m_token[:, :, None] & m_dim, other=0.0)
    elif HEAD_SIZE == BLOCK_D:
        b_states = tl.load(p_cells)
    else:
        b_states = tl.load(p_cells, mask=m_dim, other=0.0)
    b_states = tl.reshape(b_states, (TOKENS, BLOCK_D))
    return b_states if FP8 == 0 else floats_of_bytes(b_states, FP8)


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
