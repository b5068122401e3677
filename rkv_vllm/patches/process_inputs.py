"""Replaces `InputProcessor.process_inputs`: a bad request option never reaches the engine.

Requests to `LLM` and to vLLM's Python servers pass here. What one may set: `request_options.py`.
"""

import functools
from typing import TYPE_CHECKING, Any

from rkv_vllm.config import CONFIG_KEY, KVCompressionConfig
from rkv_vllm.fit.overrides import overrides
from rkv_vllm.request_options import RequestOptionError, read_request_options

if TYPE_CHECKING:
    from vllm import PoolingParams, SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.input_processor import InputProcessor


@overrides("vllm.v1.engine.input_processor:InputProcessor.process_inputs")
@functools.cache
def apply() -> None:
    """Puts the replacement in place; a second call does nothing."""
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor.process_inputs

    @functools.wraps(original)
    def process_inputs(
        self: "InputProcessor",
        request_id: str,
        prompt: Any,
        params: "SamplingParams | PoolingParams",
        *args: Any,
        **kwargs: Any,
    ) -> "EngineCoreRequest":
        check_request_options(params, self.vllm_config)
        return original(self, request_id, prompt, params, *args, **kwargs)

    InputProcessor.process_inputs = process_inputs


def check_request_options(
    params: "SamplingParams | PoolingParams", vllm_config: "VllmConfig"
) -> None:
    """Refuse what a request asks of compression and cannot have.

    Args:
        params: of the request.
        vllm_config: of its engine; without compression there is nothing to ask for, and the keys
            mean nothing, as in a vLLM without this package.

    Raises:
        VLLMValidationError: names the key; servers answer with HTTP status 400.
    """
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    if not isinstance(params, SamplingParams) or not params.extra_args:
        return
    additional = vllm_config.additional_config
    if not isinstance(additional, dict) or CONFIG_KEY not in additional:
        return
    try:
        read_request_options(params.extra_args, _config(**additional[CONFIG_KEY]))
    except RequestOptionError as error:
        raise VLLMValidationError(str(error), parameter=error.key, value=error.got) from error


@functools.cache
def _config(**options: str | int | float) -> KVCompressionConfig:
    """The server's options; checking the method among them takes milliseconds."""
    return KVCompressionConfig.from_dict(options)
