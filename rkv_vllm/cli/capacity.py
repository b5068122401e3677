"""How many requests a GPU holds at once: stock vLLM, its fp8 cache, R-KV.

What vLLM does at start, as arithmetic, per GPU and in bytes:

    cache           = gpu_memory * gpu_memory_utilization - weights / tensor_parallel - reserved
    cache (R-KV)    = cache - observation pool
    observation     = slots * layers * (window + in_flight) * query heads * head_size * element
    bytes per token = 2 * layers * KV heads * head_size * element        (fp8: one byte per element)
    blocks          = cache // (block_size * bytes per token) - 1        (vLLM keeps one empty)

Heads are those of one rank: `heads / tensor_parallel`, at least one KV head. A request holds
`ceil(tokens / block_size)` blocks, its tokens are those of `footprint.py`, and so

    at once (peak)  = blocks / (blocks that a request still grows into, averaged over its life)
    at once (mean)  = blocks / (blocks that a request holds, averaged over its life)

both rounded down. By the first number nobody ever needs to be preempted; R-KV's admission keeps to
it. Without R-KV it is `blocks / blocks of a request at its end`. Stock vLLM admits beyond it and
preempts when requests grow together; the second number is what it holds when their ages are evenly
spread. So R-KV is compared by its first number, with both numbers of the others.

Not in it: prefix caching (shared blocks count for each request), prefills in chunks, draft models,
pipeline parallelism, padding of blocks by some backends, the limit `--max-num-seqs`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from rkv_vllm.cli.checkpoint import Decoder
from rkv_vllm.cli.errors import REFUSED, CommandError
from rkv_vllm.cli.footprint import Life, rkv_life, stock_life
from rkv_vllm.cli.sizes import format_size
from rkv_vllm.config import KVCompressionConfig

# Batches under way with asynchronous scheduling, vLLM's default on GPUs, without pipeline stages.
IN_FLIGHT = 2
FP8_BYTES = 1


class Workload(NamedTuple):
    """The requests: tokens of the prompt, tokens of the output."""

    prompt_len: int
    output_len: int


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

    def cache_bytes(self, observation: int = 0) -> int:
        """Bytes of one GPU's cache; never below 0.

        vLLM takes a given size of the cache as it is: the observation pool comes on top of it.
        """
        if self.kv_cache_memory is not None:
            return self.kv_cache_memory
        used = self.weights // self.tensor_parallel + self.reserved + observation
        return max(0, int(self.gpu_memory * self.utilization) - used)


@dataclass(frozen=True)
class Side:
    """One way to serve.

    Attributes:
        name: key in the JSON document.
        label: heading of its column.
        bytes_per_token: of one GPU's cache.
        cache_bytes: of one GPU.
        block_size: tokens of a block.
        life: lengths of one request of given prompt and output length.
    """

    name: str
    label: str
    bytes_per_token: int
    cache_bytes: int
    block_size: int
    life: Callable[[int, int], Life]

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool as vLLM counts and logs them, the empty one included."""
        return self.cache_bytes // (self.block_size * self.bytes_per_token)

    @property
    def usable_blocks(self) -> int:
        """Blocks that requests can hold."""
        return max(0, self.num_blocks - 1)

    def holds_whole(self, workload: Workload) -> bool:
        """Whether the pool holds one uncompressed request, as a start and a recompute demand."""
        longest = stock_life(*workload).peak_len
        return _ceil_div(longest, self.block_size) <= self.usable_blocks

    def at_once_by_peak(self, workload: Workload) -> int:
        """Requests of which each has room for the longest that it still becomes."""
        return self._at_once(workload, self.life(*workload).reserved_block_steps(self.block_size))

    def at_once_by_mean(self, workload: Workload) -> int:
        """Requests of evenly spread ages, each with what it holds."""
        return self._at_once(workload, self.life(*workload).block_steps(self.block_size))

    def _at_once(self, workload: Workload, block_steps: int) -> int:
        if not self.holds_whole(workload):
            return 0
        return self.usable_blocks * workload.output_len // block_steps


@dataclass(frozen=True)
class Capacity:
    """The three ways to serve one model on one machine."""

    stock: Side
    fp8: Side
    rkv: Side
    observation_bytes: int
    config: KVCompressionConfig

    @property
    def sides(self) -> tuple[Side, Side, Side]:
        """In the order of the table."""
        return self.stock, self.fp8, self.rkv

    def longest_output(self, prompt_len: int) -> int:
        """Tokens of output up to which R-KV's pool still holds one whole request."""
        return self.rkv.usable_blocks * self.rkv.block_size - prompt_len + 1

    def watched_requests(self) -> int:
        """Requests that the observation slots serve without a wait.

        A request holds a slot for `window + in_flight` of every `buffer` steps.
        """
        held = self.config.window + IN_FLIGHT
        return self.config.observation_slots * self.config.buffer // held

    def crossover(self, prompt_len: int, count: Callable[[Workload], int]) -> int | None:
        """Smallest output length from which R-KV, by its peak, holds more than another side.

        Args:
            prompt_len: tokens of the prompt.
            count: `at_once_by_peak` or `at_once_by_mean` of the other side.

        Returns:
            Tokens; None when it holds more at no length that the pool allows.
        """

        def holds_more(output_len: int) -> bool:
            workload = Workload(prompt_len, output_len)
            return self.rkv.at_once_by_peak(workload) > count(workload)

        # Before its first compaction a request holds as much as without R-KV, and R-KV's pool is
        # not the larger one. After it R-KV's count never falls and the other one never rises.
        top = max(prompt_len, self.config.budget) + self.config.buffer + IN_FLIGHT
        low, high = top - prompt_len + 1, self.longest_output(prompt_len)
        if low > high or not holds_more(high):
            return None
        while low < high:
            middle = (low + high) // 2
            if holds_more(middle):
                high = middle
            else:
                low = middle + 1
        return low


def make_capacity(
    decoder: Decoder, machine: Machine, dtype: str, block_size: int, config: KVCompressionConfig
) -> Capacity:
    """Divides the memory.

    Args:
        decoder: the model.
        machine: the GPU.
        dtype: of weights and cache, one of `checkpoint.DTYPES`.
        block_size: tokens per block.
        config: the options of R-KV.

    Raises:
        CommandError: heads that the ranks cannot share, or no room for a cache.
    """
    heads, kv_heads = _heads_per_rank(decoder, machine.tensor_parallel)
    element = decoder.dtype_bytes(dtype)
    elements = 2 * decoder.num_layers * kv_heads * decoder.head_size
    ring_len = config.window + IN_FLIGHT
    slot = decoder.num_layers * ring_len * heads * decoder.head_size * element
    observation = config.observation_slots * slot

    def rkv(prompt_len: int, output_len: int) -> Life:
        return rkv_life(prompt_len, output_len, config.budget, config.buffer, IN_FLIGHT)

    plain, reduced = machine.cache_bytes(), machine.cache_bytes(observation)
    capacity = Capacity(
        stock=Side("stock", "stock", elements * element, plain, block_size, stock_life),
        fp8=Side("stock_fp8", "stock, fp8", elements * FP8_BYTES, plain, block_size, stock_life),
        rkv=Side("rkv", "R-KV", elements * element, reduced, block_size, rkv),
        observation_bytes=observation,
        config=config,
    )
    if capacity.rkv.usable_blocks == 0:
        raise _no_room(machine, observation, plain == 0)
    return capacity


def _heads_per_rank(decoder: Decoder, ranks: int) -> tuple[int, int]:
    kv_heads = decoder.num_kv_heads
    if decoder.num_heads % ranks or (kv_heads % ranks and ranks % kv_heads):
        raise CommandError(
            f"--tensor-parallel-size: got {ranks}, wanted a number that divides the "
            f"{decoder.num_heads} query heads and shares out the {kv_heads} KV heads evenly; "
            "choose another one"
        )
    return decoder.num_heads // ranks, max(1, kv_heads // ranks)


def _no_room(machine: Machine, observation: int, model_alone: bool) -> CommandError:
    if machine.kv_cache_memory is not None:
        return CommandError(
            f"--kv-cache-memory-bytes: got {format_size(machine.kv_cache_memory)}, wanted room for "
            "two blocks at least; raise it",
            REFUSED,
        )
    needed = machine.weights // machine.tensor_parallel + machine.reserved
    what = f"{format_size(machine.weights // machine.tensor_parallel)} of weights and "
    what += f"{format_size(machine.reserved)} reserved"
    cure = "raise --gpu-memory or --tensor-parallel-size, or choose a smaller model"
    if not model_alone:
        needed += observation
        what += f" and {format_size(observation)} of observation slots"
        cure = "lower --observation-slots or raise --gpu-memory"
    return CommandError(
        f"--gpu-memory: got {format_size(machine.gpu_memory)}, of which "
        f"{format_size(machine.gpu_memory * machine.utilization)} may be used, wanted more than "
        f"{format_size(needed)} per GPU ({what}); {cure}",
        REFUSED,
    )


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
