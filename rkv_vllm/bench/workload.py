"""What a benchmark asks of every side alike: prompts, lengths, the pool of blocks.

Knows no process and no vLLM. Next: sides.py.
"""

from dataclasses import dataclass

from rkv_vllm.options import prefix_len
from rkv_vllm.policy import EveryBuffer, Terms

PROBE_LEN = 32


@dataclass(frozen=True)
class Scenario:
    """Defaults of the options that make a workload; lengths in tokens.

    Attributes:
        num_prompts: requests.
        output_len: forced output tokens per request.
        pool_tokens: tokens that the pool of blocks holds.
        budgets: `--kv-budget` of each compressed side.
        buffer: `--kv-buffer` of the compressed sides.
        block_size: tokens per block.
        dtype: of weights and cache.
        protect: `--kv-protect` of the compressed sides.
    """

    num_prompts: int
    output_len: int
    pool_tokens: int
    budgets: tuple[int, ...]
    buffer: int
    block_size: int = 32
    # A CPU without bf16 instructions is bound by computing in bf16 and by memory in float32.
    dtype: str = "float32"
    protect: str | int = "none"


# For SmolLM2-135M on two to four cores. Starved: the pool holds two whole requests, or eight that
# keep 128 tokens each. Ample: memory never lacks, so compression can only cost.
SCENARIOS = {
    "starved": Scenario(
        num_prompts=16, output_len=768, pool_tokens=1792, budgets=(128,), buffer=64
    ),
    "ample": Scenario(num_prompts=8, output_len=512, pool_tokens=8192, budgets=(128,), buffer=64),
}


@dataclass(frozen=True)
class Workload:
    """One benchmark's requests and engine; lengths in tokens.

    Attributes:
        model: folder or hub id.
        prompts: texts, chat template included.
        prompt_lens: of each prompt.
        probe_lens: of each of `prompts.PROBES`.
        output_len: forced output of every request.
        buffer: `--kv-buffer` of the compressed sides.
        protect: `--kv-protect` of the compressed sides.
        pool_tokens: what the pool holds; 0 leaves its size to vLLM.
        block_size: tokens per block.
        bytes_per_token: of the whole model's KV cache.
        dtype: of weights and cache.
        seed: of the engines.
        request_rate: requests per second that arrive at a server, infinite for all at once.
        max_concurrency: requests that the client of a server has open, None for all.
    """

    model: str
    prompts: tuple[str, ...]
    prompt_lens: tuple[int, ...]
    probe_lens: tuple[int, ...]
    output_len: int
    buffer: int
    pool_tokens: int
    block_size: int
    bytes_per_token: int
    dtype: str
    seed: int
    request_rate: float
    max_concurrency: int | None
    protect: str | int = "none"

    @property
    def probe_len(self) -> int:
        """Output of a probe: at most the buffer, so that no probe is ever due."""
        return min(PROBE_LEN, self.buffer)

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest request."""
        longest_probe = max(self.probe_lens) + self.probe_len
        return max(max(self.prompt_lens) + self.output_len, longest_probe)

    @property
    def pool_blocks(self) -> int:
        """Blocks that requests can hold; vLLM keeps one more."""
        return self.pool_tokens // self.block_size

    def engine_flags(self) -> list[str]:
        """Flags of `vllm serve` that every side gets."""
        flags = [
            f"--dtype={self.dtype}",
            f"--seed={self.seed}",
            f"--max-model-len={self.max_model_len}",
            f"--block-size={self.block_size}",
        ]
        if self.pool_tokens:
            blocks = self.pool_blocks + 1
            # The bytes spare a CPU the search for free memory; the blocks are exact with any
            # number of ranks.
            bytes_of_pool = blocks * self.block_size * self.bytes_per_token
            flags += [f"--kv-cache-memory-bytes={bytes_of_pool}"]
            flags += [f"--num-gpu-blocks-override={blocks}"]
        return flags

    def check(self, budgets: tuple[int, ...]) -> None:
        """Refuse what would measure nothing or never start.

        Raises:
            ValueError: the pool cannot hold one request, or a budget under which nothing is
                compacted.
        """
        needed = -(-self.max_model_len // self.block_size) * self.block_size
        if self.pool_tokens and self.pool_blocks * self.block_size < needed:
            raise ValueError(
                f"--pool-tokens: got {self.pool_tokens}, wanted at least {needed}: the pool must "
                f"hold one whole request, prompt and output, in blocks of {self.block_size}; raise "
                "it or lower --output-len"
            )
        longest = max(self.prompt_lens)
        for budget in budgets:
            if self.expected_compactions(budget)[0] == 0:
                raise ValueError(
                    f"--budget, --buffer: got {budget} and {self.buffer} for prompts of at most "
                    f"{longest} and outputs of {self.output_len} tokens, wanted less: no request "
                    f"outgrows max(budget, prompt) + buffer = {max(budget, longest) + self.buffer}"
                    " tokens and --kv-protect, so nothing would ever be compacted; raise "
                    "--output-len or lower them"
                )

    def expected_compactions(self, budget: int) -> tuple[int, int]:
        """Fewest and most compactions of a run in which none waits and none is preempted.

        They differ where asynchronous scheduling, which a platform may have, learns of the last
        due token one step too late.
        """
        fewest, most = (
            sum(
                num_compactions(
                    prompt_len,
                    self.output_len,
                    Terms(budget, self.buffer, prefix_len(self.protect, prompt_len)),
                    in_flight,
                )
                for prompt_len in self.prompt_lens
            )
            for in_flight in (2, 1)
        )
        return fewest, most


def num_compactions(prompt_len: int, output_len: int, terms: Terms, in_flight: int) -> int:
    """Compactions of one request that is never preempted and never waits; lengths in tokens.

    Args:
        prompt_len: at least 1.
        output_len: at least 1; its last token is never computed.
        terms: budget, buffer and prefix.
        in_flight: tokens computed but not settled: 1, with asynchronous scheduling 2.
    """
    policy = EveryBuffer(window=0)
    due, count = policy.first_due_at(terms, prompt_len), 0
    while due <= prompt_len + output_len - 1 - in_flight:
        due, count = policy.next_due_at(terms, due), count + 1
    return count
