"""Caches, batches and comparisons that the tests of all kernels share. Imports no vLLM."""

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rkv_vllm.kernels.batch import Eviction, EvictionBatch
from rkv_vllm.kernels.ops import Ops, cpu_ops, naive_ops
from rkv_vllm.kernels.paged import FLOATS_OF_A_BYTE, Packing, PagedStates, Quantisation
from rkv_vllm.methods import Heads, ModelFacts
from rkv_vllm.methods.rkv import RKV

BLOCK_SIZE = 32
LAYERS, HEADS = 2, 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# In both floats of a byte.
NAN_OF_A_BYTE = 0x7F

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
    shape, quantisation, nan = (num_layers, num_blocks, num_heads), None, math.nan
    if dtype in FLOATS_OF_A_BYTE:
        scale = torch.rand(num_layers, num_heads, generator=torch.Generator().manual_seed(7)) + 0.1
        quantisation, dtype, nan = Quantisation(dtype, scale), torch.uint8, NAN_OF_A_BYTE
    if layout in PACKED:
        cache = torch.full((*shape, 2, BLOCK_SIZE * head_size), nan, dtype=dtype)
        packing = packing_of(layout, head_size)
        return PagedStates(cache[:, :, :, 1], packing, BLOCK_SIZE, quantisation)
    if layout == "tokens first":
        cache = torch.full(
            (num_layers, num_blocks, BLOCK_SIZE, num_heads, 2 * head_size), nan, dtype=dtype
        ).transpose(2, 3)
    else:
        ratio = 2 if layout == "small blocks" else 1
        cache = torch.full(
            (num_layers, num_blocks * ratio, num_heads, BLOCK_SIZE // ratio, 2 * head_size),
            nan,
            dtype=dtype,
        )
    return PagedStates(cache[..., head_size:], None, BLOCK_SIZE, quantisation)


def stored(states: PagedStates, numbers: Tensor) -> Tensor:
    """Numbers [layers, heads, tokens, d] as the cache stores them, rounded to nearest."""
    if states.quantisation is None:
        return numbers.to(states.dtype)
    scale = states.quantisation.scale[:, :, None, None]
    return (numbers / scale).to(states.dtype).view(torch.uint8)


# Of any cache: only `scratch_bytes_per_token` looks at it.
SMALL_STATES = PagedStates(torch.zeros(1, 1, 1, 32, 64), None, BLOCK_SIZE)
NAIVE, CPU = naive_ops(SMALL_STATES), cpu_ops()


@dataclass
class Case:
    """A cache, the requests in it, their dense keys [L, H, total_len, d] and recorded queries.

    The keys are what the cache says after rounding.
    """

    states: PagedStates
    batch: EvictionBatch
    dense: list[Tensor]
    queries: Tensor
    spare: list[int]

    @property
    def scale(self) -> Tensor:
        """Of each layer, 1 / sqrt(head size)."""
        shape = (self.states.num_layers,)
        return torch.full(shape, self.states.head_size**-0.5, device=self.states.device)

    @property
    def no_cap(self) -> Tensor:
        """Of each layer."""
        return torch.zeros(self.states.num_layers, device=self.states.device)

    def kept_and_tail(self, keep: Tensor, request: int) -> Tensor:
        """Prefix, survivors and tail as a compaction has to leave them, from the dense keys."""
        eviction, dense = self.batch.evictions[request], self.dense[request]
        index = keep[request, :, : eviction.budget].long().view(*dense.shape[:2], -1, 1)
        kept = dense.gather(2, index.expand(-1, -1, -1, dense.shape[3]))
        prefix = dense[:, :, : eviction.prefix_len]
        return torch.cat([prefix, kept, dense[:, :, eviction.settled_len :]], dim=2)


def rkv_scores(
    case: Case,
    ops: Ops,
    *,
    lam: float = 0.1,
    pool: int = 7,
    threshold: float = 0.5,
    center: bool = False,
    defensive: bool = False,
    scale: Tensor | None = None,
    soft_cap: Tensor | None = None,
) -> Tensor:
    """R-KV's scores of a case, by the method itself."""
    facts = ModelFacts(
        layers=tuple(map(str, range(case.states.num_layers))),
        first_kv_head=0,
        num_kv_heads=case.states.num_heads,
        num_query_heads=case.queries.shape[3],
        head_size=case.states.head_size,
        scale=case.scale if scale is None else scale,
        soft_cap=case.no_cap if soft_cap is None else soft_cap,
    )
    method = RKV(RKV.Options(lam, pool, threshold, center, defensive), facts, ops)
    layers = slice(0, case.states.num_layers)
    return method.score(Heads(layers, case.states, case.states, case.queries), case.batch)


def new_case(
    lengths: Sequence[tuple[int, int, int] | tuple[int, int, int, int]],
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
        lengths: (settled_len, total_len, budget) per request, and prefix_len where there is one.
        layout: one of PACKED or PLAIN.
        head_size: dimensions of a key.
        dtype: of keys and queries; beside keys of a byte queries are bfloat16.
        group: query heads per KV head.
        window: newest tokens whose queries judge.
        similar: how much all keys of a head have in common.
        fresh: "in place", "all fresh" or "first fresh": which new blocks are private copies.
        num_layers: layers of the cache.
        num_heads: KV heads of a layer.
        seed: of everything random.
    """
    generator = torch.Generator().manual_seed(seed)
    needed = sum(math.ceil(total / BLOCK_SIZE) for _, total, *_ in lengths)
    num_blocks = 2 * needed + 3
    free = torch.randperm(num_blocks, generator=generator).tolist()
    states = new_states(layout, num_blocks, head_size, dtype, num_layers, num_heads)
    evictions, dense = [], []
    for seat, (settled, total, budget, *prefix) in enumerate(lengths):
        prefix_len = prefix[0] if prefix else 0
        row = [free.pop() for _ in range(math.ceil(total / BLOCK_SIZE))]
        new = row[: math.ceil((prefix_len + budget + total - settled) / BLOCK_SIZE)]
        num_full = prefix_len // BLOCK_SIZE
        num_fresh = {"in place": 0, "first fresh": 1, "all fresh": len(new) - num_full}[fresh]
        new[num_full : num_full + num_fresh] = [free.pop() for _ in range(num_fresh)]
        shape = (num_layers, num_heads, total, head_size)
        common = torch.randn((num_layers, num_heads, 1, head_size), generator=generator)
        keys = torch.randn(shape, generator=generator) + similar * common
        states.write(torch.tensor(row), stored(states, keys))
        dense.append(states.numbers(torch.tensor(row), total))
        # Logical positions are ahead of physical ones after earlier evictions.
        window_end = settled + 3 * seat
        evictions.append(Eviction(row, new, settled, total, budget, prefix_len, seat, window_end))
    ring_len = window + 3
    shape = (len(lengths) + 1, num_layers, ring_len, num_heads * group, head_size)
    queries = torch.randn(shape, generator=generator)
    queries = queries.to(torch.bfloat16 if states.quantisation is not None else dtype)
    return Case(states, EvictionBatch.of(evictions, window, "cpu"), dense, queries, free)


def random_keep(batch: EvictionBatch, num_heads: int, seed: int = 2) -> Tensor:
    """Any ascending choice for every head of every request, as `select` would hand it on."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.full((batch.num_requests, num_heads, batch.max_budget), -1, dtype=torch.int32)
    for i, eviction in enumerate(batch.evictions):
        for head in range(num_heads):
            chosen = torch.randperm(eviction.num_judged, generator=generator)[: eviction.budget]
            keep[i, head, : eviction.budget] = eviction.prefix_len + chosen.sort().values
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
    if kind == "one mean":
        # Centred, it is what rounding leaves of it.
        keys = 100.0 * keys + torch.linspace(1, 2, head_size)
        keys[10] = torch.cat([keys[:10], keys[11:]]).mean(dim=0)
    if kind == "all similar":
        keys += 1.0
    if kind == "two clusters":
        # Of one the newest key is a member, the other is old; between them nothing is similar.
        keys[[*range(3, 15), n - 1], ::2] += 1.0
        keys[15:30, 1::2] += 1.0
        # Without a cosine to itself, unlike all others.
        keys[40:44] = 0.0
    return keys


ADVERSARIAL = ["identical", "zero", "orthogonal", "one far", "one mean", "all similar"]
ADVERSARIAL += ["two clusters"]


def assert_same_scores(got: Tensor, expected: Tensor, batch: EvictionBatch) -> None:
    """Near where there are candidates, -inf in both behind them."""
    for i in range(batch.num_requests):
        m = batch.num_candidates(i)
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
        m, count = batch.num_candidates(i), eviction.budget - batch.window
        kept, scores = keep[i, :, :count].long() - eviction.prefix_len, reference[i, :, :m]
        assert (kept.diff(dim=1) > 0).all()
        assert kept.numel() == 0 or (int(kept.min()) >= 0 and int(kept.max()) < m)
        end = eviction.settled_len
        window = torch.arange(end - batch.window, end, dtype=torch.int32)
        assert torch.equal(keep[i, :, count : eviction.budget], window.expand(len(kept), -1))
        assert keep[i, :, eviction.budget :].eq(-1).all()
        cut = scores.topk(count, dim=1).values[:, -1:]
        slack = CUT_TOLERANCE * cut.abs()
        is_kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, kept, True)
        assert not (is_kept & (scores < cut - slack)).any()
        assert not (~is_kept & (scores > cut + slack)).any()


class TorchCalls(TorchDispatchMode):
    """Which torch operations run, and how much of what they make lives at a time at most."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.num_bytes = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known:
            self._count(result.nbytes)
            weakref.finalize(result, self._count, -result.nbytes)
        return result

    def _count(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self.peak = max(self.peak, self.num_bytes)
