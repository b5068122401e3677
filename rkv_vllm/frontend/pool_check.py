"""Refuses requests that the pool can never hold, once `--max-model-len` may exceed it.

With `--kv-compress-prompt` vLLM starts although the pool holds no uncompressed request of that
length. A request that keeps its prompt whole, or more than the server's default, has to fit by
itself, or it would wait for ever. Knows lengths only. Next: policy.py for the bound.
"""

from typing import TYPE_CHECKING, NamedTuple

from rkv_vllm.limits import Limits
from rkv_vllm.options import ServerOptions, prefix_len
from rkv_vllm.policy import Terms, longest_cache
from rkv_vllm.request_options import (
    OFF,
    SWITCH_KEY,
    RequestOptionError,
    RequestOptions,
    keeps_prompt,
)

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig


class Engine(NamedTuple):
    """What a front end knows of an engine that has started.

    Attributes:
        limits: of the engine.
        block_size: tokens of a block.
        num_blocks: that one request can hold in the compressed layers; None before the start.
    """

    limits: Limits
    block_size: int
    num_blocks: int | None

    @classmethod
    def of(cls, vllm_config: "VllmConfig", server: ServerOptions) -> "Engine":
        """Reads the configuration, which vLLM completes when the engine has started."""
        limits = Limits.of(vllm_config)
        engine = cls(limits, vllm_config.cache_config.block_size, None)
        at_once = vllm_config.cache_config.kv_cache_max_concurrency
        if at_once is None:
            return engine
        # Of requests as the spec reports them, in one engine of several; one block stays empty.
        options = RequestOptions(server.budget, server.buffer, server.protect, compress_prompt=True)
        max_model_len = limits.max_model_len
        default = engine.blocks_of(options, server, max_model_len, max_model_len)
        in_pool = round(at_once * default) - 1
        return engine._replace(num_blocks=max(default, in_pool))

    def blocks_of(
        self,
        options: RequestOptions | None,
        server: ServerOptions,
        prompt_len: int,
        final_len: int,
    ) -> int:
        """Most blocks that a request ever holds.

        Args:
            options: what holds for it; None if its cache is kept whole.
            server: the server's options.
            prompt_len: tokens of its prompt.
            final_len: tokens that it cannot exceed.
        """
        longest = self.limits.final_slots(final_len)
        if options is not None:
            terms = Terms(
                options.budget,
                options.buffer,
                prefix_len(options.protect, prompt_len),
                server.prompt_chunk if options.compress_prompt else 0,
            )
            slack = server.slack(self.block_size, self.limits.max_advance)
            longest = longest_cache(terms, longest, self.limits.in_flight, slack)
        return -(-longest // self.block_size)


def check_pool(
    params: "SamplingParams",
    options: RequestOptions | None,
    server: ServerOptions,
    engine: Engine,
    num_prompt_tokens: int,
    resumable: bool = False,
) -> None:
    """Raise if the pool could never hold a request.

    Args:
        params: of the request.
        options: what holds for it; None if its cache is kept whole.
        server: the server's options.
        engine: where it is to run.
        num_prompt_tokens: of the request, 0 where they are not known yet.
        resumable: whether further inputs may follow, which add up.

    Raises:
        RequestOptionError: names what makes it so large, and the ways out.
    """
    if engine.num_blocks is None:
        return
    if options is not None and keeps_prompt(params):
        options = options._replace(compress_prompt=False)
    # Without a limit of its own it may use what is left.
    max_model_len = engine.limits.max_model_len
    max_tokens = max_model_len if params.max_tokens is None else params.max_tokens
    final_len = min(num_prompt_tokens + max_tokens, max_model_len)
    if resumable:
        options, final_len = None, max_model_len
    needed = engine.blocks_of(options, server, num_prompt_tokens, final_len)
    if needed <= engine.num_blocks:
        return
    key, got = _culprit(params, options)
    raise RequestOptionError(
        key,
        got,
        f"a request that the cache can hold: with it, prompt and max_tokens of together "
        f"{final_len} tokens take up to {needed} blocks, and the pool has {engine.num_blocks}",
        "leave it out, lower max_tokens or shorten the prompt",
    )


def _culprit(params: "SamplingParams", options: RequestOptions | None) -> tuple[str, object]:
    """The key that keeps the request from being compressed as others are, and its value."""
    extra_args = params.extra_args or {}
    if options is None:
        return (SWITCH_KEY, OFF) if SWITCH_KEY in extra_args else ("resumable", True)
    if keeps_prompt(params):
        return "prompt_logprobs", params.prompt_logprobs
    keys = ("kv_compress_prompt", "kv_protect", "kv_budget", "kv_buffer")
    key = next((key for key in keys if key in extra_args), "max_tokens")
    return key, extra_args.get(key, params.max_tokens)
