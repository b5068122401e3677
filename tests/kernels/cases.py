"""Caches, batches and comparisons that the tests of all kernels share. Imports no vLLM."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rkv_vllm.kernels.eviction import Eviction, EvictionBatch
from rkv_vllm.kernels.paged import Packing, PagedStates

BLOCK_SIZE = 32
LAYERS, HEADS = 2, 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# A token may be exchanged for another when its float32 score lies this near to the cut.
CUT_TOLERANCE = 1e-5
# Between two ways to add float32 numbers up; far above rounding, far below a wrong formula.
SCORE_TOLERANCE = {"rtol": 1e-4, "atol": 1e-7}

# How a CPU backend packs a block, and how GPU backends order the same cells:
# "heads first" [B, H, N, 2D], "tokens first" [B, N, H, 2D], and blocks of half the size.
PACKED = ["vec keys", "vec values", "amx keys", "amx values"]
PLAIN = ["heads first", "tokens first", "small blocks"]


def packing_of(layout: str, head_size: int) -> Packing:
    if layout == "vec keys":
        return Packing((head_size, BLOCK_SIZE), (1, 0))
    if layout == "vec values":
        return Packing((BLOCK_SIZE, head_size), (0, 1))
    if layout == "amx keys":
        return Packing((BLOCK_SIZE // 16, head_size // 2, 16, 2), (0, 2, 1, 3))
    return Packing((head_size // 16, BLOCK_SIZE // 2, 16, 2), (1, 3, 0, 2))


def new_states(
    layout: str,
    num_blocks: int,
    head_size: int,
    dtype: torch.dtype,
    num_layers: int = LAYERS,
    num_heads: int = HEADS,
) -> PagedStates:
    """Half of a cache full of NaN; the other half of each block belongs to somebody else."""
    shape = (num_layers, num_blocks, num_heads)
    if layout in PACKED:
        cache = torch.full((*shape, 2, BLOCK_SIZE * head_size), math.nan, dtype=dtype)
        return PagedStates(cache[:, :, :, 1], packing_of(layout, head_size), BLOCK_SIZE)
    if layout == "tokens first":
        cache = torch.full(
            (num_layers, num_blocks, BLOCK_SIZE, num_heads, 2 * head_size), math.nan, dtype=dtype
        ).transpose(2, 3)
    else:
        ratio = 2 if layout == "small blocks" else 1
        cache = torch.full(
            (num_layers, num_blocks * ratio, num_heads, BLOCK_SIZE // ratio, 2 * head_size),
            math.nan,
            dtype=dtype,
        )
    return PagedStates(cache[..., head_size:], None, BLOCK_SIZE)


@dataclass
class Case:
    """A cache, the requests in it, their dense keys [L, H, total_len, d] and recorded queries."""

    states: PagedStates
    batch: EvictionBatch
    dense: list[Tensor]
    queries: Tensor
    spare: list[int]

    def kept_and_tail(self, keep: Tensor, request: int) -> Tensor:
        """What a compaction has to leave, taken from the dense keys."""
        eviction, dense = self.batch.evictions[request], self.dense[request]
        index = keep[request, :, : eviction.budget].long().view(*dense.shape[:2], -1, 1)
        kept = dense.gather(2, index.expand(-1, -1, -1, dense.shape[3]))
        return torch.cat([kept, dense[:, :, eviction.settled_len :]], dim=2)


def new_case(
    lengths: list[tuple[int, int, int]],
    *,
    layout: str = "heads first",
    head_size: int = 64,
    dtype: torch.dtype = torch.float32,
    group: int = 1,
    window: int = 8,
    similar: float = 1.2,
    fresh: str = "in place",
    num_layers: int = LAYERS,
    num_heads: int = HEADS,
    seed: int = 0,
) -> Case:
    """Random keys of several requests in shuffled blocks.

    Args:
        lengths: (settled_len, total_len, budget) per request.
        layout: one of PACKED or PLAIN.
        head_size: dimensions of a key.
        dtype: of keys and queries.
        group: query heads per KV head.
        window: newest tokens whose queries judge.
        similar: how much all keys of a head have in common.
        fresh: "in place", "all fresh" or "first fresh": which new blocks are private copies.
        num_layers: layers of the cache.
        num_heads: KV heads of a layer.
        seed: of everything random.
    """
    generator = torch.Generator().manual_seed(seed)
    needed = sum(math.ceil(total / BLOCK_SIZE) for _, total, _ in lengths)
    num_blocks = 2 * needed + 3
    free = torch.randperm(num_blocks, generator=generator).tolist()
    states = new_states(layout, num_blocks, head_size, dtype, num_layers, num_heads)
    evictions, dense = [], []
    for slot, (settled, total, budget) in enumerate(lengths):
        row = [free.pop() for _ in range(math.ceil(total / BLOCK_SIZE))]
        new = row[: math.ceil((budget + total - settled) / BLOCK_SIZE)]
        num_fresh = {"in place": 0, "first fresh": 1, "all fresh": len(new)}[fresh]
        new[:num_fresh] = [free.pop() for _ in range(num_fresh)]
        shape = (num_layers, num_heads, total, head_size)
        common = torch.randn((num_layers, num_heads, 1, head_size), generator=generator)
        keys = (torch.randn(shape, generator=generator) + similar * common).to(dtype)
        states.write(torch.tensor(row), keys)
        dense.append(keys)
        # Logical positions are ahead of physical ones after earlier evictions.
        evictions.append(Eviction(row, new, settled, total, budget, slot, settled + 3 * slot))
    ring_len = window + 3
    shape = (len(lengths) + 1, num_layers, ring_len, num_heads * group, head_size)
    queries = torch.randn(shape, generator=generator).to(dtype)
    return Case(states, EvictionBatch.of(evictions, window, "cpu"), dense, queries, free)


def random_keep(batch: EvictionBatch, num_heads: int, seed: int = 2) -> Tensor:
    """Any ascending choice for every head of every request, as `select` would hand it on."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.full((batch.num_requests, num_heads, batch.max_budget), -1, dtype=torch.int32)
    for i, eviction in enumerate(batch.evictions):
        for head in range(num_heads):
            chosen = torch.randperm(eviction.settled_len, generator=generator)[: eviction.budget]
            keep[i, head, : eviction.budget] = chosen.sort().values
    return keep


def adversarial_keys(kind: str, n: int, head_size: int) -> Tensor:
    """Keys [n, head_size] that the search from the newest key backwards likes least or most."""
    if kind == "identical":
        return torch.ones(n, head_size)
    if kind == "zero":
        return torch.zeros(n, head_size)
    # Orthogonal keys need at least as many dimensions as tokens.
    keys = torch.eye(head_size)[:n]
    if kind == "one far":
        keys[n - 1] = 2.0 * keys[5]
    if kind == "all similar":
        keys += 1.0
    if kind == "two clusters":
        # Of one the newest key is a member, the other is old; between them nothing is similar.
        keys[[*range(3, 15), n - 1], ::2] += 1.0
        keys[15:30, 1::2] += 1.0
        # Without a cosine to itself, unlike all others.
        keys[40:44] = 0.0
    return keys


ADVERSARIAL = ["identical", "zero", "orthogonal", "one far", "all similar", "two clusters"]


def assert_same_scores(got: Tensor, expected: Tensor, batch: EvictionBatch) -> None:
    """Near where there are candidates, -inf in both behind them."""
    for i, eviction in enumerate(batch.evictions):
        m = eviction.settled_len - batch.window
        torch.testing.assert_close(got[i, :, :m], expected[i, :, :m], **SCORE_TOLERANCE)
        assert got[i, :, m:].eq(-math.inf).all()
    assert got.shape == expected.shape


def assert_equivalent_choice(keep: Tensor, reference: Tensor, batch: EvictionBatch) -> None:
    """SPEC's equality: the kept set is the reference's but for tokens at the cut.

    Args:
        keep: int32 [R, heads, largest budget].
        reference: float32 [R, heads, most candidates], scores of the reference.
        batch: the requests.
    """
    for i, eviction in enumerate(batch.evictions):
        m, count = eviction.settled_len - batch.window, eviction.budget - batch.window
        kept, scores = keep[i, :, :count].long(), reference[i, :, :m]
        assert (kept.diff(dim=1) > 0).all()
        assert kept.numel() == 0 or (int(kept.min()) >= 0 and int(kept.max()) < m)
        window = torch.arange(m, eviction.settled_len, dtype=torch.int32)
        assert torch.equal(keep[i, :, count : eviction.budget], window.expand(len(kept), -1))
        assert keep[i, :, eviction.budget :].eq(-1).all()
        cut = scores.topk(count, dim=1).values[:, -1:]
        slack = CUT_TOLERANCE * cut.abs()
        is_kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, kept, True)
        assert not (is_kept & (scores < cut - slack)).any()
        assert not (~is_kept & (scores > cut + slack)).any()
