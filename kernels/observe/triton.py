"""observe in Triton: one program per token, most of which find -1 and end at once.

Runs once per attention layer inside captured graphs: fixed grid, fixed addresses, no allocation.
A list of watched tokens would need fewer programs, but its length changes from step to step and a
graph's grid cannot; an idle program costs far less than the launch that all of them share.
"""

import triton
import triton.language as tl
from torch import Tensor

from rkv_vllm.kernels.observe.naive import check_observe
from rkv_vllm.kernels.tiles import elements, floats_of_bytes, fp8_of

# Elements per inner step: 32 query heads of 128 take four steps of one program.
_TILE = 1024


def observe_triton(
    ring: Tensor,
    layer_idx: int,
    query: Tensor,
    token_rows: Tensor,
    query_scale: Tensor | None = None,
) -> None:
    """As `observe_naive`."""
    check_observe(ring, layer_idx, query, token_rows, query_scale)
    num_tokens, num_heads, head_size = query.shape
    if num_tokens == 0:
        return
    observe_kernel[(num_tokens,)](
        ring,
        ring.stride(0),
        ring.stride(2),
        layer_idx * ring.stride(1),
        elements(query, query.dtype),
        query.stride(0),
        query.stride(1),
        token_rows,
        query_scale,
        FP8=fp8_of(query.dtype, query.device),
        HEADS_PER_SCALE=num_heads if query_scale is None else num_heads // query_scale.numel(),
        RING_LEN=ring.shape[2],
        NUM_HEADS=num_heads,
        HEAD_SIZE=head_size,
        TILE=min(_TILE, triton.next_power_of_2(num_heads * head_size)),
    )


@triton.jit
def observe_kernel(
    p_ring,
    seat_stride,
    ring_stride,
    layer_offset,
    p_query,
    token_stride,
    head_stride,
    p_token_rows,
    p_query_scale,
    FP8: tl.constexpr,
    HEADS_PER_SCALE: tl.constexpr,
    RING_LEN: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Record one token if somebody watches it."""
    i_token = tl.program_id(0).to(tl.int64)
    row = tl.load(p_token_rows + i_token).to(tl.int64)
    if row < 0:
        return
    p_source = p_query + i_token * token_stride
    p_target = p_ring + (row // RING_LEN) * seat_stride + (row % RING_LEN) * ring_stride
    for start in range(0, NUM_HEADS * HEAD_SIZE, TILE):
        o_element = start + tl.arange(0, TILE)
        m_element = o_element < NUM_HEADS * HEAD_SIZE
        o_source = (o_element // HEAD_SIZE) * head_stride + o_element % HEAD_SIZE
        b_query = tl.load(p_source + o_source, mask=m_element)
        if p_query_scale is not None:
            i_scale = o_element // (HEAD_SIZE * HEADS_PER_SCALE)
            b_scale = tl.load(p_query_scale + i_scale, mask=m_element)
            b_query = floats_of_bytes(b_query, FP8).to(tl.float32) * b_scale
        tl.store(
            p_target + layer_offset + o_element,
            b_query.to(p_ring.dtype.element_ty),
            mask=m_element,
        )
