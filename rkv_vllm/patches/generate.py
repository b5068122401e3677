"""Replaces `AsyncLLM.generate`: a bad request option is refused before an answer has begun.

The original is an async generator, so whatever it refuses comes to light when a server asks it for
the first token: too late for a status code if the client wants the answer streamed. (A streamed
answer of the Responses API is too late here as well, and breaks off.)
"""

import functools
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from rkv_vllm.fit.overrides import check_overrides, overrides
from rkv_vllm.frontend.request_check import check_request, prompt_len

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM


@overrides("vllm.v1.engine.async_llm:AsyncLLM.generate")
@functools.cache
def apply() -> None:
    """Puts the replacement in place; a second call does nothing."""
    from vllm.v1.engine.async_llm import AsyncLLM

    # It may have been imported only now.
    check_overrides()
    original = AsyncLLM.generate

    @functools.wraps(original)
    def generate(
        self: "AsyncLLM", prompt: Any, sampling_params: "SamplingParams", *args: Any, **kwargs: Any
    ) -> "AsyncGenerator[RequestOutput, None]":
        # vLLM's servers hand in rendered prompts. Others are tokenised in `process_inputs`.
        rendered = prompt if isinstance(prompt, dict) else {}
        num_tokens = prompt_len(rendered.get("prompt_token_ids"), rendered.get("prompt_embeds"))
        check_request(sampling_params, self.vllm_config, num_tokens)
        return original(self, prompt, sampling_params, *args, **kwargs)

    AsyncLLM.generate = generate
