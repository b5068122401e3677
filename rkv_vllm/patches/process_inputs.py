"""Replaces `InputProcessor.process_inputs`: a bad request option never reaches the engine.

Requests to `LLM` and to vLLM's Python servers pass here; only behind the original is the length of
every prompt known.
"""

import functools
from typing import TYPE_CHECKING, Any

from rkv_vllm.fit.overrides import check_overrides, overrides
from rkv_vllm.frontend.request_check import check_request, prompt_len

if TYPE_CHECKING:
    from vllm import PoolingParams, SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.input_processor import InputProcessor


@overrides("vllm.v1.engine.input_processor:InputProcessor.process_inputs")
@functools.cache
def apply() -> None:
    """Puts the replacement in place; a second call does nothing."""
    from vllm.v1.engine.input_processor import InputProcessor

    # It may have been imported only now.
    check_overrides()
    original = InputProcessor.process_inputs

    @functools.wraps(original)
    def process_inputs(
        self: "InputProcessor",
        request_id: str,
        prompt: Any,
        params: "SamplingParams | PoolingParams",
        *args: Any,
        resumable: bool = False,
        **kwargs: Any,
    ) -> "EngineCoreRequest":
        request = original(self, request_id, prompt, params, *args, resumable=resumable, **kwargs)
        num_tokens = prompt_len(request.prompt_token_ids, request.prompt_embeds)
        check_request(params, self.vllm_config, num_tokens, resumable)
        return request

    InputProcessor.process_inputs = process_inputs
