"""TriAttention: keep the keys that the model's usual queries will look at in the time to come.

Before RoPE the queries of a head lie around a fixed centre. A text tells where, once per model
(`query_statistics.py`); with it the attention that a cached key will get at a distance follows
without any recorded query. For a request whose next position is t, with q_f the mean query and b_f
the mean of its absolute at frequency f, and k_f the key before RoPE at position p:

    score = mean over D of  sum_f |q_f| |k_f| cos((t + D - p) w_f + arg(q_f conj k_f))
            + sum_f (b_f - |q_f|) |k_f|                                  D = 1, 2, 4 ... 65536

RoPE has turned the cached key by p w_f, so that p cancels, and the mean over D is linear in the
key: with r_f = mean over D of exp(i (t + D) w_f) the first line is the dot product of the cached
key with q_f r_f. No position of any token is needed, and the vector is made once per request.

Scores are brought to mean 0 and variance 1 over the candidates of a query head, which makes heads
comparable (and a constant factor on the keys, as YaRN has, vanish); of the query heads of a KV head
the largest counts.

Source: TriAttention: Efficient Long Reasoning with Trigonometric KV Compression (arXiv:2604.04921).
That positions cancel is derived here. Next: query_statistics.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.ops import Ops
from rkv_vllm.methods.base import Heads, Method, ModelFacts, ModelShape, layer_number
from rkv_vllm.methods.query_statistics import QueryStatistics, load_statistics
from rkv_vllm.model_name import is_same_model
from rkv_vllm.option_field import OptionError, option

# Distances into the future, in tokens.
_OFFSETS = tuple(2**power for power in range(17))

# Bound on the keys that are read at once, in float32 elements (16 MiB); at least one layer.
_MAX_KEY_ELEMENTS = 1 << 22

# A variance of zero says that all candidates are equal.
_LEAST_DEVIATION = 1e-12

_KEY = "--kv-option statistics"


class TriAttention(Method):
    """Judges keys by the model's mean query, from a file made by `rkv-vllm calibrate`."""

    depends_on_prefix_only = True

    @dataclass(frozen=True)
    class Options:
        """What users can set."""

        statistics: str = option(
            "",
            "File with the means of the model's queries, made by: rkv-vllm calibrate MODEL --out "
            "FILE. Every process reads it.",
            metavar="FILE",
            wanted="the path of a .safetensors file; without one the start is refused",
        )

    @classmethod
    def check_model(cls, options: Options, shape: ModelShape) -> None:
        """Refuse a file that cannot be read or was made for another model. See the base class."""
        path = options.statistics
        wanted = f"statistics of {shape.name!r}"
        cure = f"make them: rkv-vllm calibrate {shape.name} --out FILE.safetensors"
        if not path:
            raise OptionError(_KEY, path, f"a file with {wanted}", cure)
        try:
            statistics = load_statistics(path)
        except ValueError as error:
            raise OptionError(
                _KEY, path, f"a file with {wanted}, but it is {error}", cure
            ) from error
        if not is_same_model(statistics.model, shape.name):
            cause = f"but it holds those of {statistics.model!r}"
            raise OptionError(_KEY, path, f"{wanted}, {cause}", cure)
        for name in ("num_layers", "num_query_heads", "num_kv_heads", "head_size"):
            got, of_model = getattr(statistics, name), getattr(shape, name)
            if got != of_model:
                cause = f"whose {name} is {of_model}, but it holds those of one with {got}"
                raise OptionError(_KEY, path, f"{wanted}, {cause}", cure)

    def __init__(self, options: Options, model: ModelFacts, ops: Ops) -> None:
        super().__init__(options, model, ops)
        statistics = load_statistics(options.statistics)
        device = model.scale.device
        self._inv_freq = statistics.inv_freq.to(device, torch.float64)
        self._offsets = torch.tensor(_OFFSETS, dtype=torch.float64, device=device)
        # [layers, KV heads, group, head_size]
        self._mean_query = self._own(statistics, statistics.mean_query).to(device)
        magnitude = self._own(statistics, statistics.mean_magnitude).to(device)
        real, imaginary = self._mean_query.chunk(2, dim=-1)
        # [layers, KV heads, head_size / 2, group]
        self._spread = (magnitude - torch.hypot(real, imaginary)).transpose(-1, -2).contiguous()

    def _own(self, statistics: QueryStatistics, of_all: Tensor) -> Tensor:
        """What the file says of the layers and KV heads of this rank, whatever their order."""
        layers = [layer_number(name) for name in self.model.layers]
        first, count = self.model.first_kv_head, self.model.num_kv_heads
        # All query heads of a KV head, also where ranks share one: they judge it alike.
        by_kv_head = of_all[layers].unflatten(1, (statistics.num_kv_heads, -1))
        return by_kv_head[:, first : first + count]

    def score(self, heads: Heads, batch: EvictionBatch) -> Tensor:
        """Estimate the attention that each candidate will get. See the base class."""
        keys = heads.keys
        num_heads = keys.num_heads
        shape = (batch.num_requests, keys.num_layers * num_heads, batch.max_candidates)
        scores = torch.full(shape, -torch.inf, dtype=torch.float32, device=keys.device)
        mean_query, spread = self._mean_query[heads.layers], self._spread[heads.layers]
        turns = self._mean_turns(batch.window_ends)
        for i, eviction in enumerate(batch.evictions):
            num_candidates, row = batch.num_candidates(i), batch.old_block_table[i]
            if not num_candidates:
                continue
            end = eviction.prefix_len + num_candidates
            future = _turned(mean_query, turns[i]).transpose(-1, -2)
            for layers in _layer_steps(
                keys.num_layers, num_candidates * num_heads * keys.head_size
            ):
                dense = keys.layers(layers).numbers(row, end, eviction.prefix_len).float()
                per_query_head = dense @ future[layers]
                per_query_head += torch.hypot(*dense.chunk(2, dim=-1)) @ spread[layers]
                own = slice(layers.start * num_heads, layers.stop * num_heads)
                scores[i, own, :num_candidates] = _of_kv_heads(per_query_head).flatten(0, 1)
        return scores

    def _mean_turns(self, window_ends: Tensor) -> Tensor:
        """Where RoPE will have turned a query, on average over the distances.

        Args:
            window_ends: int32 [R], each request's next logical position.

        Returns:
            complex64 [R, head_size / 2]. Angles in float64: float32 is off by .01 at 100K.
        """
        angles = (window_ends.double()[:, None] + self._offsets)[..., None] * self._inv_freq
        return torch.polar(torch.ones_like(angles), angles).mean(dim=1).to(torch.complex64)


def _turned(queries: Tensor, turn: Tensor) -> Tensor:
    """The complex product of `queries [..., head_size]` with `turn [head_size / 2]`."""
    real, imaginary = queries.chunk(2, dim=-1)
    return torch.cat(
        [
            real * turn.real - imaginary * turn.imag,
            real * turn.imag + imaginary * turn.real,
        ],
        dim=-1,
    )


def _of_kv_heads(scores: Tensor) -> Tensor:
    """Of `scores [layers, KV heads, n, group]`, comparable ones, the largest of each group."""
    deviation, mean = torch.std_mean(scores, dim=2, keepdim=True, correction=0)
    return ((scores - mean) / deviation.clamp(min=_LEAST_DEVIATION)).amax(dim=-1)


def _layer_steps(num_layers: int, elements_per_layer: int) -> Iterator[slice]:
    step = max(1, _MAX_KEY_ELEMENTS // elements_per_layer)
    for first in range(0, num_layers, step):
        yield slice(first, min(first + step, num_layers))
