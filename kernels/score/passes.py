"""The four kernels of score in Triton; triton.py says what each is for and launches them."""

import triton
import triton.language as tl

from rkv_vllm.kernels.tiles import load_tile, product

# Tokens per tile. 64 rows are one warp group's tensor-core instruction on Hopper; 64 columns keep
# the products (64 x 64 float32 over 128 threads: 32 registers) and two tiles of bf16 keys of 128
# dimensions in registers. Wider tiles would lengthen the search: most tokens find their key among
# the newest 3 percent, and a tile is searched as a whole. Not measured on a GPU yet.
TILE = tl.constexpr(64)
# Tiles that `combine` adds up at once.
COMBINE_TILES = tl.constexpr(16)
# Tokens at once where a program goes through all tokens of a head.
FINISH_TILE = tl.constexpr(1024)
# Column sums are below 2**20 tokens in any context length, so a sum stays below 2**61.
FIXED_POINT = tl.constexpr(float(2**40))
NORM_EPSILON = tl.constexpr(1e-8)

# Triton compiles once more for every class of these (1, multiples of 16, others), which would stop
# serving for a second whenever a flush brings a new one. Strides and the cache itself stay special.
VARYING = (
    "p_block_table",
    "table_stride",
    "p_settled_lens",
    "p_slots",
    "p_window_ends",
    "p_non_finite",
    "num_layers",
    "max_len",
    "num_tiles",
    "max_candidates",
    "rows_per_request",
)


@triton.jit
def _window_logits(
    p_query,
    ring_stride,
    head_stride,
    window_end,
    ring_len,
    keys,
    m_candidate,
    scale,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_W: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    """Logits [BLOCK_W, tokens], max over the group, and how many of its inputs are not finite."""
    o_window = tl.arange(0, BLOCK_W)
    o_dim = tl.arange(0, BLOCK_D)
    ring_idx = (window_end - WINDOW + o_window) % ring_len
    p_rows = p_query + ring_idx[:, None].to(tl.int64) * ring_stride + o_dim[None, :]
    m_rows = (o_window < WINDOW)[:, None] & (o_dim < HEAD_SIZE)[None, :]
    m_logits = (o_window < WINDOW)[:, None] & m_candidate[None, :]
    keys_t = tl.trans(keys)
    logits = tl.full((BLOCK_W, keys.shape[0]), float("-inf"), tl.float32)
    num_bad = tl.zeros((BLOCK_W, keys.shape[0]), tl.int32)
    for i_group in range(GROUP):
        queries = tl.load(p_rows + i_group * head_stride, mask=m_rows, other=0.0)
        part = product(queries.to(keys.dtype), keys_t, IN_FLOAT32) * scale
        # The maximum would hide a NaN or -inf. False for NaN as well.
        is_finite = tl.abs(part) < float("inf")
        num_bad += (m_logits & (is_finite == 0)).to(tl.int32)
        logits = tl.maximum(logits, part)
    return tl.where(m_logits, logits, float("-inf")), num_bad


@triton.jit(do_not_specialize=VARYING)
def stats_kernel(
    p_keys,
    layer_stride,
    head_stride,
    block_stride,
    kernel_block_stride,
    token_stride,
    dim_stride,
    p_queries,
    query_slot_stride,
    query_layer_stride,
    query_ring_stride,
    query_head_stride,
    p_block_table,
    table_stride,
    p_settled_lens,
    p_slots,
    p_window_ends,
    p_inverse_norms,
    p_tile_sums,
    p_tile_maxima,
    p_tile_denominators,
    num_layers,
    max_len,
    num_tiles,
    ring_len,
    scale,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_W: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KERNEL_BLOCK_SIZE: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    """What a tile of tokens contributes to the sums of its head."""
    i_tile = tl.program_id(0) % num_tiles
    i_row = tl.program_id(0) // num_tiles
    i_request = i_row // (num_layers * NUM_HEADS)
    i_layer = i_row // NUM_HEADS % num_layers
    i_head = i_row % NUM_HEADS
    n = tl.load(p_settled_lens + i_request)
    if i_tile * TILE >= n:
        return
    o_token = i_tile * TILE + tl.arange(0, TILE)
    m_token = o_token < n
    keys = load_tile(
        p_keys + i_layer.to(tl.int64) * layer_stride + i_head.to(tl.int64) * head_stride,
        p_block_table + i_request.to(tl.int64) * table_stride,
        o_token,
        m_token,
        block_stride,
        kernel_block_stride,
        token_stride,
        dim_stride,
        HEAD_SIZE,
        BLOCK_D,
        BLOCK_SIZE,
        KERNEL_BLOCK_SIZE,
    )
    wide = keys.to(tl.float32)
    inverse_norms = 1.0 / (tl.sqrt(tl.sum(wide * wide, axis=1)) + NORM_EPSILON)
    tl.store(p_inverse_norms + i_row.to(tl.int64) * max_len + o_token, inverse_norms, mask=m_token)
    o_dim = tl.arange(0, BLOCK_D)
    i_part = i_row.to(tl.int64) * num_tiles + i_tile
    tile_sum = tl.sum(wide * inverse_norms[:, None], axis=0)
    tl.store(p_tile_sums + i_part * HEAD_SIZE + o_dim, tile_sum, mask=o_dim < HEAD_SIZE)

    m_candidate = o_token < n - WINDOW
    slot = tl.load(p_slots + i_request).to(tl.int64)
    logits, num_bad = _window_logits(
        p_queries
        + slot * query_slot_stride
        + i_layer.to(tl.int64) * query_layer_stride
        + (i_head * GROUP).to(tl.int64) * query_head_stride,
        query_ring_stride,
        query_head_stride,
        tl.load(p_window_ends + i_request),
        ring_len,
        keys,
        m_candidate,
        scale,
        GROUP,
        WINDOW,
        BLOCK_W,
        HEAD_SIZE,
        BLOCK_D,
        IN_FLOAT32,
    )
    o_window = tl.arange(0, BLOCK_W)
    largest = tl.max(logits, axis=1)
    weights = tl.where(m_candidate[None, :], tl.exp(logits - largest[:, None]), 0.0)
    denominators = tl.sum(weights, axis=1)
    denominators = tl.where(tl.sum(num_bad, axis=1) > 0, float("nan"), denominators)
    m_window = o_window < WINDOW
    tl.store(p_tile_maxima + i_part * BLOCK_W + o_window, largest, mask=m_window)
    tl.store(p_tile_denominators + i_part * BLOCK_W + o_window, denominators, mask=m_window)


@triton.jit(do_not_specialize=VARYING)
def combine_kernel(
    p_settled_lens,
    p_tile_sums,
    p_tile_maxima,
    p_tile_denominators,
    p_totals,
    p_maxima,
    p_denominators,
    rows_per_request,
    num_tiles,
    WINDOW: tl.constexpr,
    BLOCK_W: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum of the unit keys and softmax statistics of one head."""
    i_row = tl.program_id(0).to(tl.int64)
    n = tl.load(p_settled_lens + i_row // rows_per_request)
    num_parts = tl.cdiv(n, TILE)
    o_dim = tl.arange(0, BLOCK_D)
    o_window = tl.arange(0, BLOCK_W)
    total = tl.zeros((BLOCK_D,), tl.float32)
    largest = tl.full((BLOCK_W,), float("-inf"), tl.float32)
    denominator = tl.zeros((BLOCK_W,), tl.float32)
    for first in range(0, num_parts, COMBINE_TILES):
        o_part = first + tl.arange(0, COMBINE_TILES)
        m_part = (o_part < num_parts)[:, None]
        parts = (i_row * num_tiles + o_part)[:, None]
        sums = tl.load(
            p_tile_sums + parts * HEAD_SIZE + o_dim[None, :],
            mask=m_part & (o_dim < HEAD_SIZE)[None, :],
            other=0.0,
        )
        total += tl.sum(sums, axis=0)
        p_window = parts * BLOCK_W + o_window[None, :]
        m_window = m_part & (o_window < WINDOW)[None, :]
        maxima = tl.load(p_tile_maxima + p_window, mask=m_window, other=float("-inf"))
        sums_of_weights = tl.load(p_tile_denominators + p_window, mask=m_window, other=0.0)
        # Padded windows have no maximum; zero stands in for it, so that no infinities cancel.
        new = tl.maximum(largest, tl.max(maxima, axis=0))
        safe = tl.where(o_window < WINDOW, new, 0.0)
        shares = sums_of_weights * tl.exp(maxima - safe[None, :])
        denominator = denominator * tl.exp(largest - safe) + tl.sum(shares, axis=0)
        largest = new
    tl.store(p_totals + i_row * HEAD_SIZE + o_dim, total, mask=o_dim < HEAD_SIZE)
    tl.store(p_maxima + i_row * BLOCK_W + o_window, largest)
    tl.store(p_denominators + i_row * BLOCK_W + o_window, denominator)


@triton.jit(do_not_specialize=VARYING)
def search_kernel(
    p_keys,
    layer_stride,
    head_stride,
    block_stride,
    kernel_block_stride,
    token_stride,
    dim_stride,
    p_queries,
    query_slot_stride,
    query_layer_stride,
    query_ring_stride,
    query_head_stride,
    p_block_table,
    table_stride,
    p_settled_lens,
    p_slots,
    p_window_ends,
    p_inverse_norms,
    p_totals,
    p_maxima,
    p_denominators,
    p_attention,
    p_column_sums,
    p_shielded,
    num_layers,
    max_len,
    num_tiles,
    ring_len,
    scale,
    threshold,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_W: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KERNEL_BLOCK_SIZE: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    """Mean attention, column sum and newest similar key of each token of a tile."""
    i_tile = tl.program_id(0) % num_tiles
    i_row = tl.program_id(0) // num_tiles
    i_request = i_row // (num_layers * NUM_HEADS)
    i_layer = i_row // NUM_HEADS % num_layers
    i_head = i_row % NUM_HEADS
    n = tl.load(p_settled_lens + i_request)
    if i_tile * TILE >= n:
        return
    p_head = p_keys + i_layer.to(tl.int64) * layer_stride + i_head.to(tl.int64) * head_stride
    p_row = p_block_table + i_request.to(tl.int64) * table_stride
    o_token = i_tile * TILE + tl.arange(0, TILE)
    m_token = o_token < n
    keys = load_tile(
        p_head,
        p_row,
        o_token,
        m_token,
        block_stride,
        kernel_block_stride,
        token_stride,
        dim_stride,
        HEAD_SIZE,
        BLOCK_D,
        BLOCK_SIZE,
        KERNEL_BLOCK_SIZE,
    )
    o_row = i_row.to(tl.int64) * max_len

    m_candidate = o_token < n - WINDOW
    slot = tl.load(p_slots + i_request).to(tl.int64)
    logits, _ = _window_logits(
        p_queries
        + slot * query_slot_stride
        + i_layer.to(tl.int64) * query_layer_stride
        + (i_head * GROUP).to(tl.int64) * query_head_stride,
        query_ring_stride,
        query_head_stride,
        tl.load(p_window_ends + i_request),
        ring_len,
        keys,
        m_candidate,
        scale,
        GROUP,
        WINDOW,
        BLOCK_W,
        HEAD_SIZE,
        BLOCK_D,
        IN_FLOAT32,
    )
    o_window = tl.arange(0, BLOCK_W)
    m_window = o_window < WINDOW
    p_window = i_row.to(tl.int64) * BLOCK_W + o_window
    largest = tl.load(p_maxima + p_window, mask=m_window, other=0.0)
    denominators = tl.load(p_denominators + p_window, mask=m_window, other=1.0)
    shares = tl.exp(logits - largest[:, None]) / denominators[:, None]
    attention = tl.sum(tl.where(m_window[:, None], shares, 0.0), axis=0) / WINDOW
    tl.store(p_attention + o_row + o_token, attention, mask=m_candidate)

    o_dim = tl.arange(0, BLOCK_D)
    wide = keys.to(tl.float32)
    norms = tl.sqrt(tl.sum(wide * wide, axis=1))
    inverse_norms = 1.0 / (norms + NORM_EPSILON)
    total = tl.load(
        p_totals + i_row.to(tl.int64) * HEAD_SIZE + o_dim, mask=o_dim < HEAD_SIZE, other=0.0
    )
    own = norms * inverse_norms
    sums = tl.sum(wide * total[None, :], axis=1) * inverse_norms - own * own
    tl.store(p_column_sums + o_row + o_token, sums, mask=m_token)

    # The cosine with the oldest key, which is shielded where no key is similar, whatever it is.
    p_oldest = p_head + tl.load(p_row).to(tl.int64) * block_stride
    oldest = tl.load(p_oldest + o_dim * dim_stride, mask=o_dim < HEAD_SIZE, other=0.0)
    to_oldest = tl.sum(wide * oldest.to(tl.float32)[None, :], axis=1)
    to_oldest = to_oldest * inverse_norms * tl.load(p_inverse_norms + o_row)

    newest = tl.full((TILE,), -1, tl.int32)
    cosine = tl.zeros((TILE,), tl.float32)
    stop = n
    while stop > 0:
        # Tiles end at the newest key, so that the first one is full wherever the length allows.
        start = tl.maximum(stop - TILE, 0)
        o_column = start + tl.arange(0, TILE)
        m_column = o_column < stop
        columns = load_tile(
            p_head,
            p_row,
            o_column,
            m_column,
            block_stride,
            kernel_block_stride,
            token_stride,
            dim_stride,
            HEAD_SIZE,
            BLOCK_D,
            BLOCK_SIZE,
            KERNEL_BLOCK_SIZE,
        )
        column_norms = tl.load(p_inverse_norms + o_row + o_column, mask=m_column, other=0.0)
        products = product(keys, tl.trans(columns), IN_FLOAT32)
        cosines = products * inverse_norms[:, None] * column_norms[None, :]
        is_hit = (cosines > threshold) & m_column[None, :]
        is_hit = is_hit & (o_column[None, :] != o_token[:, None])
        hits = tl.where(is_hit, o_column[None, :], -1)
        hit = tl.max(hits, axis=1)
        at_hit = tl.where(is_hit & (hits == hit[:, None]), cosines, 0.0)
        is_first = (newest < 0) & (hit >= 0)
        cosine = tl.where(is_first, tl.sum(at_hit, axis=1), cosine)
        newest = tl.where(is_first, hit, newest)
        num_open = tl.sum((m_token & (newest < 0)).to(tl.int32), axis=0)
        stop = tl.where(num_open > 0, start, 0)

    cosine = tl.where(newest < 0, to_oldest, cosine)
    newest = tl.maximum(newest, 0)
    # Token 0 without a similar key points to itself; its own cosine was never in the sum.
    tl.atomic_add(
        p_shielded + o_row + newest,
        (cosine * FIXED_POINT).to(tl.int64),
        mask=m_token & (newest != o_token),
        sem="relaxed",
    )


@triton.jit(do_not_specialize=VARYING)
def finish_kernel(
    p_settled_lens,
    p_attention,
    p_column_sums,
    p_shielded,
    p_scores,
    p_non_finite,
    rows_per_request,
    max_len,
    max_candidates,
    lam,
    one_minus_lam,
    WINDOW: tl.constexpr,
    POOL: tl.constexpr,
):
    """Scores of one head, -inf behind its candidates, and whether all are finite."""
    i_row = tl.program_id(0).to(tl.int64)
    i_request = i_row // rows_per_request
    n = tl.load(p_settled_lens + i_request)
    m = n - WINDOW
    o_row = i_row * max_len
    largest = float("-inf")
    denominator = 0.0
    for first in range(0, n, FINISH_TILE):
        o_token = first + tl.arange(0, FINISH_TILE)
        m_token = o_token < n
        sums = tl.load(p_column_sums + o_row + o_token, mask=m_token, other=0.0)
        shielded = tl.load(p_shielded + o_row + o_token, mask=m_token, other=0)
        logits = (sums - shielded.to(tl.float32) / FIXED_POINT) / n
        logits = tl.where(m_token, logits, float("-inf"))
        new = tl.maximum(largest, tl.max(logits, axis=0))
        weights = tl.sum(tl.exp(logits - new), axis=0)
        denominator = denominator * tl.exp(largest - new) + weights
        largest = new
    num_bad = 0
    for first in range(0, max_candidates, FINISH_TILE):
        o_token = first + tl.arange(0, FINISH_TILE)
        m_token = o_token < m
        sums = tl.load(p_column_sums + o_row + o_token, mask=m_token, other=0.0)
        shielded = tl.load(p_shielded + o_row + o_token, mask=m_token, other=0)
        logits = (sums - shielded.to(tl.float32) / FIXED_POINT) / n
        redundancy = tl.exp(logits - largest) / denominator
        importance = tl.full((FINISH_TILE,), float("-inf"), tl.float32)
        for shift in tl.static_range(-(POOL // 2), POOL // 2 + 1):
            o_near = o_token + shift
            m_near = (o_near >= 0) & (o_near < m)
            near = tl.load(p_attention + o_row + o_near, mask=m_near, other=float("-inf"))
            importance = tl.maximum(importance, near)
        scores = lam * importance - one_minus_lam * redundancy
        is_finite = tl.abs(scores) < float("inf")
        num_bad += tl.sum((m_token & (is_finite == 0)).to(tl.int32), axis=0)
        tl.store(
            p_scores + i_row * max_candidates + o_token,
            tl.where(m_token, scores, float("-inf")),
            mask=o_token < max_candidates,
        )
    head = (i_row % rows_per_request).to(tl.int32)
    tl.atomic_min(p_non_finite + i_request, head, mask=num_bad > 0, sem="relaxed")
