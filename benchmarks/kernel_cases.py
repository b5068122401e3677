"""Inputs of the kernel benchmark: caches as vLLM lays them out, and keys of three kinds."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from rkv_vllm.bench.prompts import TASKS
from rkv_vllm.kernels.batch import Eviction, EvictionBatch
from rkv_vllm.kernels.paged import Packing, PagedStates
from rkv_vllm.methods import Heads, ModelFacts

WINDOW = 8
RING_LEN = WINDOW + 2

# Random keys have no similar pair. Clustered ones share half of their energy with their cluster,
# so that about one pair in sixteen is similar; it is the kind that is timed.
KINDS = ("random", "clustered")
_NUM_CLUSTERS = 16
# In the chat format of SmolLM2; its answer makes the real keys.
_PROMPT = f"<|im_start|>user\nExercise 1. {TASKS[0]}<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Shape:
    """One compaction to be timed; lengths in tokens.

    Attributes:
        num_tokens: n, settled tokens of each request.
        budget: tokens kept.
        head_size: dimensions of a key.
        num_layers: layers compacted at once.
        num_requests: requests compacted at once.
        num_heads: KV heads of a layer.
        group: query heads per KV head.
        window: newest tokens, whose queries judge.
    """

    num_tokens: int
    budget: int
    head_size: int
    num_layers: int
    num_requests: int = 1
    num_heads: int = 8
    group: int = 4
    window: int = WINDOW

    @property
    def total_heads(self) -> int:
        """Heads of all layers and requests."""
        return self.num_requests * self.num_layers * self.num_heads

    def bytes_moved(self, dtype: torch.dtype) -> int:
        """Bytes that a compaction cannot avoid: read all keys, read and write what survives."""
        of_one_head = self.num_tokens + 2 * 2 * self.budget
        return self.total_heads * of_one_head * self.head_size * dtype.itemsize


@dataclass(frozen=True)
class Workload:
    """A paged cache, the evictions to carry out in it, and the same states dense.

    Attributes:
        shape: see there.
        keys: the cache's keys.
        values: the cache's values.
        batch: one eviction per request; survivors go to fresh blocks, so that a run can be
            repeated and every survivor is moved.
        queries: [seats, num_layers, window + 2, query heads, head_size].
    """

    shape: Shape
    keys: PagedStates
    values: PagedStates
    batch: EvictionBatch
    queries: Tensor

    @property
    def heads(self) -> Heads:
        """All layers, as a method sees them."""
        return Heads(slice(0, self.shape.num_layers), self.keys, self.values, self.queries)

    @cached_property
    def model(self) -> ModelFacts:
        """A model of these layers, without a soft cap."""
        shape, per_layer = self.shape, {"device": self.keys.device, "dtype": torch.float32}
        return ModelFacts(
            layers=tuple(map(str, range(shape.num_layers))),
            first_kv_head=0,
            num_kv_heads=shape.num_heads,
            num_query_heads=shape.num_heads * shape.group,
            head_size=shape.head_size,
            scale=torch.full((shape.num_layers,), shape.head_size**-0.5, **per_layer),
            soft_cap=torch.zeros(shape.num_layers, **per_layer),
        )

    @cached_property
    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values [all heads, n, head_size]."""
        found = []
        for states in (self.keys, self.values):
            rows = [
                states.read(row, self.shape.num_tokens).flatten(0, 1)
                for row in self.batch.old_block_table
            ]
            found.append(torch.cat(rows))
        return found[0], found[1]

    @cached_property
    def dense_queries(self) -> Tensor:
        """[all query heads, WINDOW, head_size]."""
        windows = [
            self.batch.window_queries(i, self.queries) for i in range(self.batch.num_requests)
        ]
        return torch.cat(windows)


def new_workload(shape: Shape, kind: str, dtype: torch.dtype, device: torch.device) -> Workload:
    """Fill a cache with keys of one kind; its blocks are shuffled."""
    generator = torch.Generator(device).manual_seed(0)
    # What vLLM takes by default.
    block_size = 16 if device.type == "cuda" else 32
    old, new = (math.ceil(n / block_size) for n in (shape.num_tokens, shape.budget))
    num_blocks = shape.num_requests * (old + new) + 1
    keys, values = _new_cache(shape, num_blocks, block_size, dtype, device)
    order = (1 + torch.randperm(num_blocks - 1)).tolist()
    evictions = []
    for seat in range(shape.num_requests):
        row, order = order[:old], order[old:]
        fresh, order = order[:new], order[new:]
        n = shape.num_tokens
        evictions.append(
            Eviction(row, fresh, n, n, shape.budget, seat=seat, window_end=n + 3 * seat)
        )
        row_ids = torch.tensor(row, device=device)
        size = (shape.num_layers, shape.num_heads, n, shape.head_size)
        keys.write(row_ids, new_keys(kind, size, generator).to(dtype))
        values.write(row_ids, torch.randn(size, generator=generator, device=device).to(dtype))
    query_heads = shape.num_heads * shape.group
    pool = (shape.num_requests, shape.num_layers, shape.window + 2, query_heads, shape.head_size)
    queries = torch.randn(pool, generator=generator, device=device).to(dtype)
    batch = EvictionBatch.of(evictions, shape.window, device)
    return Workload(shape, keys, values, batch, queries)


def new_keys(kind: str, size: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    """Float32 keys [layers, heads, n, head_size] of one of `KINDS`."""
    device = generator.device
    own = torch.randn(size, generator=generator, device=device)
    if kind == "random":
        return own
    layers, heads, n, head_size = size
    centre_size = (layers, heads, _NUM_CLUSTERS, head_size)
    centres = torch.randn(centre_size, generator=generator, device=device)
    # Tokens near each other tend to belong together.
    runs = torch.randint(_NUM_CLUSTERS, (n // 8 + 1,), generator=generator, device=device)
    cluster = runs.repeat_interleave(8)[:n]
    common = torch.randn((layers, heads, 1, head_size), generator=generator, device=device)
    return 0.9 * own + 0.8 * centres[:, :, cluster] + common


def _new_cache(
    shape: Shape, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[PagedStates, PagedStates]:
    """On a GPU [B, N, H, 2D], on a CPU the packing of CPU_ATTN for vector units."""
    d = shape.head_size
    if device.type == "cuda":
        size = (shape.num_layers, num_blocks, block_size, shape.num_heads, 2 * d)
        cells = torch.zeros(size, dtype=dtype, device=device).transpose(2, 3)
        return (
            PagedStates(cells[..., :d], None, block_size),
            PagedStates(cells[..., d:], None, block_size),
        )
    size = (shape.num_layers, num_blocks, shape.num_heads, 2, block_size * d)
    cache = torch.zeros(size, dtype=dtype)
    return (
        PagedStates(cache[:, :, :, 0], Packing((d, block_size), (1, 0)), block_size),
        PagedStates(cache[:, :, :, 1], Packing((block_size, d), (0, 1)), block_size),
    )


def real_keys(model_dir: Path, num_tokens: int) -> Tensor:
    """Keys [layers, heads, n, head_size] of a model's cache after greedy generation.

    Args:
        model_dir: folder of the checkpoint.
        num_tokens: length of prompt and generated text together.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    # float32: CPUs without bf16 instructions generate twice as fast.
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    prompt = tokenizer(_PROMPT, return_tensors="pt", add_special_tokens=False)
    with torch.inference_mode():
        generated = model.generate(
            **prompt,
            max_length=num_tokens + 1,
            min_length=num_tokens + 1,
            do_sample=False,
            return_dict_in_generate=True,
        )
    cache = generated.past_key_values
    return torch.stack([layer.keys[0] for layer in cache.layers])
