"""How many requests a GPU holds at once: stock vLLM, its fp8 cache, R-KV, and R-KV on that cache.

What vLLM does at start, as arithmetic, per GPU and in bytes:

    cache           = gpu_memory * gpu_memory_utilization - weights / tensor_parallel - reserved
    cache (R-KV)    = cache - query ring
    query ring      = seats * owners * (window + in_flight) * query heads * head_size * element
    bytes per token = 2 * layers * KV heads * head_size * element        (fp8: one byte per element)
    blocks          = cache // (block_size * bytes per token) - 1        (vLLM keeps one empty)

Heads are those of one rank: `heads / tensor_parallel`, at least one KV head. Owners are the layers
with a cache of their own: all, but for R-KV with `--kv-share-layers`. `layers` are those of full
attention. Where there are others, vLLM cuts all kinds into groups of as many layers (the smallest
kind's number; the largest's where that is less than 1.5 times as much), and a block holds one
group's tokens: then bytes per token are those of all groups of full attention together, padding
included, and blocks = cache // (block_size * bytes per token / such groups) - 1. Where layers keep
a state, a block has to hold one: block_size becomes the next multiple of it that does.

A request holds `ceil(tokens / block_size)` blocks in each group of full attention, its tokens are
those of `footprint.py`. In a group with a window it holds at most
`ceil((window - 1 + in_flight) / block_size) + 1`, in one with a state 2 (Mamba2: 3), as vLLM
reckons with prefix caching. And so

    at once (peak)  = blocks / (blocks that a request still grows into, averaged over its life)
    at once (mean)  = blocks / (blocks that a request holds, averaged over its life)

both rounded down. By the first number nobody ever needs to be preempted; R-KV's admission keeps to
it. Stock vLLM admits beyond it and preempts when requests grow together; the second number is what
it holds when their ages are evenly spread. So R-KV is compared by its first number, with both of
the others.

Not in it: prefix caching (shared blocks count for each request), draft models, pipeline
parallelism, padding of blocks by some backends, windowed layers with heads of their own, the tokens
of a prompt's chunk in a window, the limit `--max-num-seqs`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from rkv_vllm.cli.checkpoint import Decoder
from rkv_vllm.cli.errors import REFUSED, CommandError
from rkv_vllm.cli.footprint import Life, num_blocks, rkv_life, stock_life
from rkv_vllm.cli.layers import KeptLayers, Layers
from rkv_vllm.cli.sizes import format_size
from rkv_vllm.fit.state_blocks import check_budget
from rkv_vllm.options import MOST_TOKENS, ServerOptions, prefix_len
from rkv_vllm.policy import Terms, longest_cache

# Batches under way with asynchronous scheduling, vLLM's default on GPUs, without pipeline stages.
IN_FLIGHT = 2
FP8_BYTES = 1


@dataclass(frozen=True)
class Machine:
    """What one GPU gives to the cache.

    Attributes:
        gpu_memory: bytes of one GPU.
        utilization: share of it that vLLM may use.
        kv_cache_memory: bytes of the cache where they are given; then nothing else is counted.
        reserved: bytes for activations, CUDA graphs and libraries, which vLLM measures at start.
        weights: bytes of the whole model.
        tensor_parallel: GPUs that share the model.
    """

    gpu_memory: int
    utilization: float
    kv_cache_memory: int | None
    reserved: int
    weights: int
    tensor_parallel: int

    def cache_bytes(self, ring: int = 0) -> int:
        """Bytes of one GPU's cache, never below 0; a given size is taken as it is."""
        if self.kv_cache_memory is not None:
            return self.kv_cache_memory
        used = self.weights // self.tensor_parallel + self.reserved + ring
        return max(0, int(self.gpu_memory * self.utilization) - used)


@dataclass(frozen=True)
class Groups:
    """How vLLM cuts the layers into groups of as many, whose blocks have one size.

    Attributes:
        num_layers: of each, the last one of a kind padded.
        num_full: groups of full attention.
        kept: the other kinds, each with the number of its groups.
    """

    num_layers: int
    num_full: int
    kept: tuple[tuple[int, KeptLayers], ...]

    @classmethod
    def of(cls, layers: Layers) -> "Groups":
        """Source: `_get_kv_cache_groups_uniform_page_size` in vLLM's kv_cache_utils.py."""
        counts = [layers.num_full, *(each.count for each in layers.kept)]
        fewest, most = min(counts), max(counts)
        size = most if most < 1.5 * fewest else fewest
        kept = tuple((-(-each.count // size), each) for each in layers.kept)
        return cls(size, -(-layers.num_full // size), kept)

    def kept_blocks(self, lengths: np.ndarray, block_size: int) -> np.ndarray:
        """Blocks that a request of these lengths holds in groups that are not compacted.

        Args:
            lengths: of its text.
            block_size: tokens of a block.
        """
        held = np.zeros_like(lengths)
        for number, each in self.kept:
            if each.state is not None:
                held += number * each.state.num_blocks
            else:
                seen = num_blocks(each.window - 1 + IN_FLIGHT, block_size) + 1
                held += number * np.minimum(num_blocks(lengths, block_size), seen)
        return held


@dataclass(frozen=True)
class Pool:
    """The cache of one way to serve.

    Attributes:
        name: key in the JSON document.
        label: heading of its column.
        bytes_per_token: of one GPU's cache, in all layers of full attention.
        cache_bytes: of one GPU.
        block_size: tokens of a block.
        groups: whose blocks a request holds.
        life: of one request of given prompt and output length.
        longest: most tokens that a request of that prompt length ever holds, whatever its output;
            None where it may hold all its text.
    """

    name: str
    label: str
    bytes_per_token: int
    cache_bytes: int
    block_size: int
    groups: Groups
    life: Callable[[int, int], Life]
    longest: Callable[[int], int] | None = None

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool as vLLM counts and logs them, the empty one included."""
        return self.cache_bytes // self.block_bytes

    @property
    def block_bytes(self) -> int:
        """Of one block, which holds tokens of one group's layers."""
        return self.block_size * self.bytes_per_token // self.groups.num_full

    @property
    def num_tokens(self) -> int:
        """Tokens that the pool holds in all its groups, as if none were bounded."""
        num_groups = self.groups.num_full + sum(number for number, _ in self.groups.kept)
        return self.num_blocks // num_groups * self.block_size

    @property
    def usable_blocks(self) -> int:
        """Blocks that requests can hold."""
        return max(0, self.num_blocks - 1)

    def longest_output(self, prompt_len: int) -> int:
        """Tokens of output of one whole request, as a start and a recompute demand it."""
        most = np.array([MOST_TOKENS])
        beside = int(self.groups.kept_blocks(most, self.block_size)[0])
        room = max(0, self.usable_blocks - beside) // self.groups.num_full * self.block_size
        if self.longest is not None and self.longest(prompt_len) <= room:
            return MOST_TOKENS - prompt_len
        return room - prompt_len + 1

    def at_once_by_peak(self, prompt_len: int, output_len: int) -> int:
        """Requests of which each has room for the longest that it still becomes."""
        text = np.full(output_len, prompt_len + output_len - 1)
        return self._at_once(prompt_len, self.life(prompt_len, output_len).reserved, text)

    def at_once_by_mean(self, prompt_len: int, output_len: int) -> int:
        """Requests of evenly spread ages, each with what it holds."""
        text = stock_life(prompt_len, output_len).held
        return self._at_once(prompt_len, self.life(prompt_len, output_len).held, text)

    def _at_once(self, prompt_len: int, lengths: np.ndarray, text: np.ndarray) -> int:
        if len(lengths) > self.longest_output(prompt_len):
            return 0
        block_steps = int(self.blocks(lengths, text).sum())
        return self.usable_blocks * len(lengths) // block_steps

    def blocks(self, lengths: np.ndarray, text: np.ndarray) -> np.ndarray:
        """Blocks of a request in all groups.

        Args:
            lengths: tokens in the cache of a layer of full attention.
            text: tokens of its text.
        """
        full = self.groups.num_full * num_blocks(lengths, self.block_size)
        return full + self.groups.kept_blocks(text, self.block_size)


@dataclass(frozen=True)
class Capacity:
    """The four ways to serve one model on one machine; `ring_bytes` of R-KV's query ring."""

    stock: Pool
    fp8: Pool
    rkv: Pool
    rkv_fp8: Pool
    ring_bytes: int

    @property
    def pools(self) -> tuple[Pool, Pool, Pool, Pool]:
        """In the order of the table."""
        return self.stock, self.fp8, self.rkv, self.rkv_fp8


def make_capacity(
    decoder: Decoder,
    machine: Machine,
    dtype: str,
    block_size: int,
    config: ServerOptions,
    num_readers: int = 0,
) -> Capacity:
    """Divides the memory.

    Args:
        decoder: the model.
        machine: the GPU.
        dtype: of weights and cache, one of `options.DTYPES`.
        block_size: tokens per block, where no state asks for more.
        config: the options of R-KV.
        num_readers: layers that read another layer's cache with them.

    Raises:
        CommandError: heads that the ranks cannot share, a budget below the block of a state, or no
            room for a cache.
    """
    ranks, kv_heads = machine.tensor_parallel, decoder.num_kv_heads
    if decoder.num_heads % ranks or (kv_heads % ranks and ranks % kv_heads):
        raise CommandError(
            f"--tensor-parallel-size: got {ranks}, wanted a number that divides the "
            f"{decoder.num_heads} query heads and shares out the {kv_heads} KV heads evenly; "
            "choose another one"
        )
    element = decoder.dtype_bytes(dtype)
    per_layer = 2 * max(1, kv_heads // ranks) * decoder.head_size
    layers = decoder.layers
    owners = replace(layers, num_full=layers.num_full - num_readers)
    state_bytes = 0 if layers.state is None else layers.state.num_bytes(element) // ranks
    query = owners.num_full * (decoder.num_heads // ranks) * decoder.head_size * element
    # A step computes one chunk of a prompt, or so.
    seats = config.seats + config.prompt_seats(config.prompt_chunk)
    ring = seats * (config.window + IN_FLIGHT) * query

    def terms(prompt_len: int) -> Terms:
        chunk = config.prompt_chunk if config.compress_prompt else 0
        prefix = prefix_len(config.protect, prompt_len)
        return Terms(config.budget, config.buffer, prefix, chunk)

    def rkv(prompt_len: int, output_len: int) -> Life:
        return rkv_life(prompt_len, output_len, terms(prompt_len), IN_FLIGHT)

    def longest(prompt_len: int) -> int:
        return longest_cache(terms(prompt_len), MOST_TOKENS, IN_FLIGHT)

    def pool(
        name: str, label: str, layers: Layers, cache: int, element: int, *lengths: Callable
    ) -> Pool:
        groups, layer = Groups.of(layers), per_layer * element
        # A block is at least as large as a state.
        size = block_size * max(1, -(-state_bytes // (block_size * layer)))
        per_token = groups.num_full * groups.num_layers * layer
        return Pool(name, label, per_token, cache, size, groups, *lengths)

    plain, reduced = machine.cache_bytes(), machine.cache_bytes(ring)
    capacity = Capacity(
        stock=pool("stock", "stock", layers, plain, element, stock_life),
        fp8=pool("stock_fp8", "stock, fp8", layers, plain, FP8_BYTES, stock_life),
        rkv=pool("rkv", "R-KV", owners, reduced, element, rkv, longest),
        # Queries are recorded in the model's dtype, whatever the cache's.
        rkv_fp8=pool("rkv_fp8", "R-KV, fp8", owners, reduced, FP8_BYTES, rkv, longest),
        ring_bytes=ring,
    )
    if capacity.rkv.block_size > block_size:
        try:
            check_budget(config, capacity.rkv.block_size, IN_FLIGHT)
        except ValueError as error:
            raise CommandError(str(error), REFUSED) from error
    if capacity.rkv.usable_blocks == 0:
        raise _no_room(machine, ring if plain else 0)
    return capacity


def _no_room(machine: Machine, ring: int) -> CommandError:
    if machine.kv_cache_memory is not None:
        return CommandError(
            f"--kv-cache-memory-bytes: got {format_size(machine.kv_cache_memory)}, wanted room for "
            "two blocks at least; raise it",
            REFUSED,
        )
    weights = machine.weights // machine.tensor_parallel
    cure = "raise --gpu-memory or --tensor-parallel-size, or choose a smaller model"
    if ring:
        cure = "lower --seats or raise --gpu-memory"
    return CommandError(
        f"--gpu-memory: got {format_size(machine.gpu_memory)}, of which "
        f"{format_size(machine.gpu_memory * machine.utilization)} may be used, wanted more than "
        f"{format_size(weights + machine.reserved + ring)} per GPU ({format_size(weights)} of "
        f"weights, {format_size(machine.reserved)} reserved, {format_size(ring)} of query ring); "
        f"{cure}",
        REFUSED,
    )
