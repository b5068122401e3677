"""How many requests a GPU holds at once: stock vLLM, its fp8 cache, R-KV, and R-KV on that cache.

What vLLM does at start, as arithmetic, per GPU and in bytes:

    cache           = gpu_memory * gpu_memory_utilization - weights / tensor_parallel - reserved
    cache (R-KV)    = cache - query ring
    query ring      = seats * owners * (window + in_flight) * query heads * head_size * element
    bytes per token = 2 * layers * KV heads * head_size * element        (fp8: one byte per element)
    blocks          = cache // (block_size * bytes per token) - 1        (vLLM keeps one empty)

Heads are those of one rank: `heads / tensor_parallel`, at least one KV head. Owners are the layers
with a cache of their own: all, but for R-KV with `--kv-share-layers`. A request holds
`ceil(tokens / block_size)` blocks, its tokens are those of `footprint.py`, and so

    at once (peak)  = blocks / (blocks that a request still grows into, averaged over its life)
    at once (mean)  = blocks / (blocks that a request holds, averaged over its life)

both rounded down. By the first number nobody ever needs to be preempted; R-KV's admission keeps to
it. Stock vLLM admits beyond it and preempts when requests grow together; the second number is what
it holds when their ages are evenly spread. So R-KV is compared by its first number, with both of
the others.

Not in it: prefix caching (shared blocks count for each request), draft models, pipeline
parallelism, padding of blocks by some backends, the limit `--max-num-seqs`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rkv_vllm.cli.checkpoint import Decoder
from rkv_vllm.cli.errors import REFUSED, CommandError
from rkv_vllm.cli.footprint import Life, num_blocks, rkv_life, stock_life
from rkv_vllm.cli.sizes import format_size
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
class Pool:
    """The cache of one way to serve.

    Attributes:
        name: key in the JSON document.
        label: heading of its column.
        bytes_per_token: of one GPU's cache.
        cache_bytes: of one GPU.
        block_size: tokens of a block.
        life: of one request of given prompt and output length.
        longest: most tokens that a request of that prompt length ever holds, whatever its output;
            None where it may hold all its text.
    """

    name: str
    label: str
    bytes_per_token: int
    cache_bytes: int
    block_size: int
    life: Callable[[int, int], Life]
    longest: Callable[[int], int] | None = None

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool as vLLM counts and logs them, the empty one included."""
        return self.cache_bytes // (self.block_size * self.bytes_per_token)

    @property
    def usable_blocks(self) -> int:
        """Blocks that requests can hold."""
        return max(0, self.num_blocks - 1)

    def longest_output(self, prompt_len: int) -> int:
        """Tokens of output of one whole request, as a start and a recompute demand it."""
        room = self.usable_blocks * self.block_size
        if self.longest is not None and self.longest(prompt_len) <= room:
            return MOST_TOKENS - prompt_len
        return room - prompt_len + 1

    def at_once_by_peak(self, prompt_len: int, output_len: int) -> int:
        """Requests of which each has room for the longest that it still becomes."""
        return self._at_once(prompt_len, self.life(prompt_len, output_len).reserved)

    def at_once_by_mean(self, prompt_len: int, output_len: int) -> int:
        """Requests of evenly spread ages, each with what it holds."""
        return self._at_once(prompt_len, self.life(prompt_len, output_len).held)

    def _at_once(self, prompt_len: int, lengths: np.ndarray) -> int:
        if len(lengths) > self.longest_output(prompt_len):
            return 0
        block_steps = int(num_blocks(lengths, self.block_size).sum())
        return self.usable_blocks * len(lengths) // block_steps


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
        block_size: tokens per block.
        config: the options of R-KV.
        num_readers: layers that read another layer's cache with them.

    Raises:
        CommandError: heads that the ranks cannot share, or no room for a cache.
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
    num_owners = decoder.num_layers - num_readers
    query = num_owners * (decoder.num_heads // ranks) * decoder.head_size * element
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

    elements, owned = decoder.num_layers * per_layer, num_owners * per_layer
    plain, reduced = machine.cache_bytes(), machine.cache_bytes(ring)
    capacity = Capacity(
        stock=Pool("stock", "stock", elements * element, plain, block_size, stock_life),
        fp8=Pool("stock_fp8", "stock, fp8", elements * FP8_BYTES, plain, block_size, stock_life),
        rkv=Pool("rkv", "R-KV", owned * element, reduced, block_size, rkv, longest),
        # Queries are recorded in the model's dtype, whatever the cache's.
        rkv_fp8=Pool("rkv_fp8", "R-KV, fp8", owned * FP8_BYTES, reduced, block_size, rkv, longest),
        ring_bytes=ring,
    )
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
