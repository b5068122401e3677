"""What a benchmark asks of every side alike: prompts, lengths, priorities, the pool of blocks.

Knows no process and no vLLM. Next: sides.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rkv_vllm.options import ServerOptions, prefix_len
from rkv_vllm.policy import EveryBuffer, Terms

PROBE_LEN = 32


@dataclass(frozen=True)
class Scenario:
    """Defaults of the options that make a workload; lengths in tokens.

    Attributes:
        num_prompts: requests.
        output_lens: forced output tokens; requests take them in turn.
        pool_tokens: tokens that the pool of blocks holds.
        budgets: `--kv-budget` of each compressed side.
        buffer: `--kv-buffer` of the compressed sides.
        prompt_lens: what the own prompts are filled up to, in turn; 0 leaves a task as it is.
        priorities: of the requests, in turn, as vLLM has them: the lower, the earlier. Empty: first
            come, first served.
        block_size: tokens per block.
        dtype: of weights and cache.
        compression: further options of the compressed sides, by name, as in JSON.
    """

    num_prompts: int
    output_lens: tuple[int, ...]
    pool_tokens: int
    budgets: tuple[int, ...]
    buffer: int
    prompt_lens: tuple[int, ...] = (0,)
    priorities: tuple[int, ...] = ()
    block_size: int = 32
    # A CPU without bf16 instructions is bound by computing in bf16 and by memory in float32.
    dtype: str = "float32"
    compression: Mapping[str, Any] = field(default_factory=dict)


# For SmolLM2-135M on two to four cores.
SCENARIOS = {
    # The pool holds two whole requests, or eight that keep 128 tokens each.
    "starved": Scenario(
        num_prompts=16, output_lens=(768,), pool_tokens=1792, budgets=(128,), buffer=64
    ),
    # Memory never lacks, so compression can only cost.
    "ample": Scenario(
        num_prompts=8, output_lens=(512,), pool_tokens=8192, budgets=(128,), buffer=64
    ),
    # Many prompts at once, short answers: the pool holds ten requests, or sixteen.
    "burst": Scenario(
        num_prompts=48, output_lens=(128,), pool_tokens=2048, budgets=(64,), buffer=32
    ),
    # Prompts are most of the cache; they shrink with the first compaction.
    "long-prompt": Scenario(
        num_prompts=6,
        output_lens=(256,),
        prompt_lens=(1024,),
        pool_tokens=4096,
        budgets=(512,),
        buffer=64,
    ),
    # Three lengths of prompts, four of answers, so that each meets each.
    "mixed": Scenario(
        num_prompts=24,
        output_lens=(64, 128, 256, 512),
        prompt_lens=(0, 128, 384),
        pool_tokens=2048,
        budgets=(128,),
        buffer=64,
    ),
    # No request fits into the pool. Stock gets the smallest that it starts in.
    "beyond-pool": Scenario(
        num_prompts=4,
        output_lens=(256,),
        prompt_lens=(2048,),
        pool_tokens=1024,
        budgets=(256,),
        buffer=64,
        compression={"compress_prompt": True, "prompt_chunk": 256},
    ),
    # The pool holds three whole requests; every other one may overtake.
    "priorities": Scenario(
        num_prompts=12,
        output_lens=(256,),
        pool_tokens=1024,
        budgets=(96,),
        buffer=32,
        priorities=(1, 0),
    ),
}


@dataclass(frozen=True)
class Workload:
    """One benchmark's requests and engine; lengths in tokens.

    Attributes:
        model: folder or hub id.
        prompts: texts, chat template included.
        prompt_lens: of each prompt.
        probe_lens: of each of `prompts.PROBES`.
        output_lens: forced output of each request.
        buffer: `--kv-buffer` of the compressed sides.
        pool_tokens: what the pool holds; 0 leaves its size to vLLM.
        block_size: tokens per block.
        bytes_per_token: of the whole model's KV cache.
        element_bytes: of one element of it.
        dtype: of weights and cache.
        seed: of the engines.
        request_rate: requests per second that arrive at a server, infinite for all at once.
        max_concurrency: requests that the client of a server has open, None for all.
        priorities: of each request, or empty.
        compression: further options of the compressed sides, by name, as in JSON.
    """

    model: str
    prompts: tuple[str, ...]
    prompt_lens: tuple[int, ...]
    probe_lens: tuple[int, ...]
    output_lens: tuple[int, ...]
    buffer: int
    pool_tokens: int
    block_size: int
    bytes_per_token: int
    element_bytes: int
    dtype: str
    seed: int
    request_rate: float
    max_concurrency: int | None
    priorities: tuple[int, ...] = ()
    compression: Mapping[str, Any] = field(default_factory=dict)

    @property
    def probe_len(self) -> int:
        """Output of a probe: at most the buffer, so that no probe is ever due."""
        return min(PROBE_LEN, self.buffer)

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest request."""
        longest_probe = max(self.probe_lens) + self.probe_len
        return max(*self.total_lens, longest_probe)

    @property
    def total_lens(self) -> tuple[int, ...]:
        """Prompt and output of each request."""
        return tuple(map(sum, zip(self.prompt_lens, self.output_lens, strict=True)))

    @property
    def pool_blocks(self) -> int:
        """Blocks that requests can hold; vLLM keeps one more."""
        return self.pool_tokens // self.block_size

    @property
    def whole_blocks(self) -> int:
        """Blocks of the longest request: the smallest pool that serves it without compression."""
        return self.blocks_of(self.max_model_len)

    def blocks_of(self, num_tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-num_tokens // self.block_size)

    def engine_flags(self, pool_tokens: int | None = None) -> list[str]:
        """Flags of `vllm serve` that a side gets, whoever it is.

        Args:
            pool_tokens: of a side with a pool of its own.
        """
        flags = [
            f"--dtype={self.dtype}",
            f"--seed={self.seed}",
            f"--max-model-len={self.max_model_len}",
            f"--block-size={self.block_size}",
        ]
        if self.priorities:
            flags += ["--scheduling-policy=priority"]
        if self.pool_tokens:
            blocks = (pool_tokens or self.pool_tokens) // self.block_size + 1
            # The bytes spare a CPU the search for free memory; the blocks are exact with any
            # number of ranks and any dtype of the cache.
            bytes_of_pool = blocks * self.block_size * self.bytes_per_token
            flags += [f"--kv-cache-memory-bytes={bytes_of_pool}"]
            flags += [f"--num-gpu-blocks-override={blocks}"]
        return flags

    def check(self, budgets: tuple[int, ...]) -> None:
        """Refuse what would measure nothing or never start.

        Raises:
            ValueError: the pool cannot hold one request though prompts are not compressed, or a
                budget under which nothing is compacted.
        """
        if not self.prompt_chunk and 0 < self.pool_blocks < self.whole_blocks:
            raise ValueError(
                f"--pool-tokens: got {self.pool_tokens}, wanted at least "
                f"{self.whole_blocks * self.block_size}: the pool must hold one whole request, "
                f"prompt and output, in blocks of {self.block_size}; raise it, lower --output-len, "
                "or pass `-- --kv-compress-prompt`"
            )
        longest = max(self.prompt_lens)
        for budget in budgets:
            if self.expected_compactions(budget)[0] == 0:
                raise ValueError(
                    f"--budget, --buffer: got {budget} and {self.buffer} for prompts of at most "
                    f"{longest} and outputs of at most {max(self.output_lens)} tokens, wanted "
                    f"less: no request outgrows max(budget, prompt) + buffer = "
                    f"{max(budget, longest) + self.buffer} tokens and --kv-protect, so nothing "
                    "would ever be compacted; raise --output-len or lower them"
                )

    @property
    def prompt_chunk(self) -> int:
        """Tokens between two compactions of a prompt on the compressed sides; 0: there are none."""
        chunk = self.compression.get("prompt_chunk", ServerOptions.prompt_chunk)
        return chunk if self.compression.get("compress_prompt") else 0

    def terms(self, budget: int, prompt_len: int) -> Terms:
        """What holds for a request of a compressed side."""
        protect = self.compression.get("protect", ServerOptions.protect)
        return Terms(budget, self.buffer, prefix_len(protect, prompt_len))

    def expected_compactions(self, budget: int, drafts: int = 0) -> tuple[int, int]:
        """Fewest and most compactions of a run in which none waits and none is preempted.

        They differ where asynchronous scheduling, which a platform may have, learns of the last
        due token one step too late, and where `drafts` settle together. Of a side that compacts
        under pressure alone: expected.py.
        """
        fewest, most = 0, 0
        for prompt_len, output_len in zip(self.prompt_lens, self.output_lens, strict=True):
            terms = self.terms(budget, prompt_len)
            of_prompt, evicted = prompt_compactions(prompt_len, terms, self.prompt_chunk)
            # From there on it is as if its prompt had been so much shorter.
            left = prompt_len - evicted, output_len, terms
            fewest += of_prompt + num_compactions(*left, 2 * (1 + drafts), late=drafts)
            most += of_prompt + num_compactions(*left, in_flight=1)
        return fewest, most


def prompt_compactions(prefill_len: int, terms: Terms, chunk: int) -> tuple[int, int]:
    """Compactions of one prompt between its chunks, and the tokens that they evict from it.

    Args:
        prefill_len: tokens computed before the first one is decoded.
        terms: budget, buffer and prefix.
        chunk: its multiples are where a prompt is compacted; 0 for nowhere.

    Source: SPEC section 6.
    """
    kept = terms.prefix_len + terms.budget
    if not chunk or prefill_len <= kept + chunk:
        return 0, 0
    # The last chunk is not followed by one.
    ends = [end for end in range(chunk, prefill_len, chunk) if end > kept]
    return len(ends), ends[-1] - kept


def num_compactions(
    prompt_len: int, output_len: int, terms: Terms, in_flight: int, late: int = 0
) -> int:
    """Compactions of one request that is never preempted and never waits; lengths in tokens.

    Args:
        prompt_len: at least 1.
        output_len: at least 1; its last token is never computed.
        terms: budget, buffer and prefix.
        in_flight: tokens computed but not settled: 1, with asynchronous scheduling 2.
        late: tokens by which each compaction comes after it is due.
    """
    policy = EveryBuffer(window=0)
    due, count = policy.first_due_at(terms, prompt_len) + late, 0
    while due <= prompt_len + output_len - 1 - in_flight:
        due, count = policy.next_due_at(terms, due) + late, count + 1
    return count
