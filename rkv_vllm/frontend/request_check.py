"""Refuses what a request asks of compression and cannot have, where its sender gets the answer.

Called by `option_check.py`, and by `patches/generate.py` and `patches/process_inputs.py`, which
know the prompt's length. What a request may set: `request_options.py`.
"""

import json
from collections.abc import Mapping, Sized
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from rkv_vllm.fit.overrides import calls
from rkv_vllm.frontend.pool_check import Engine, check_pool
from rkv_vllm.options import CONFIG_KEY, ServerOptions
from rkv_vllm.request_options import (
    RequestOptionError,
    read_request_options,
    refuse_in_beam_search,
)

if TYPE_CHECKING:
    from vllm import PoolingParams, SamplingParams
    from vllm.config import VllmConfig


@calls("vllm.exceptions:VLLMValidationError.__init__")
def check_request(
    params: "SamplingParams | PoolingParams",
    vllm_config: "VllmConfig",
    num_prompt_tokens: int = 0,
    resumable: bool = False,
) -> None:
    """Raise unless the request can have what it asks for.

    Args:
        params: of the request.
        vllm_config: of its engine; without compression there is nothing to ask for, and the keys
            mean nothing, as in a vLLM without this package.
        num_prompt_tokens: of the request, 0 where they are not known yet.
        resumable: whether further inputs may follow (streaming input).

    Raises:
        VLLMValidationError: names the key; servers answer with HTTP status 400.
    """
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    if not isinstance(params, SamplingParams):
        return
    additional = vllm_config.additional_config
    if not isinstance(additional, dict) or CONFIG_KEY not in additional:
        return
    given = additional[CONFIG_KEY]
    if not params.extra_args and not given.get("compress_prompt"):
        return
    server = _server_options(json.dumps(given))
    try:
        options = read_request_options(params.extra_args, server, num_prompt_tokens)
        if server.compress_prompt:
            engine = Engine.of(vllm_config, server)
            check_pool(params, options, server, engine, num_prompt_tokens, resumable)
    except RequestOptionError as error:
        raise VLLMValidationError(str(error), parameter=error.key, value=error.got) from error


def find_bad_option(
    extra_args: Mapping[str, Any], vllm_config: "VllmConfig", uses_beam_search: bool
) -> RequestOptionError | None:
    """Returns what is wrong with a request's options, as far as its prompt does not matter.

    Args:
        extra_args: what the request has under "vllm_xargs".
        vllm_config: of its engine.
        uses_beam_search: whether it asks for beam search.
    """
    additional = vllm_config.additional_config
    if not isinstance(additional, dict) or CONFIG_KEY not in additional:
        return None
    try:
        read_request_options(extra_args, _server_options(json.dumps(additional[CONFIG_KEY])))
        if uses_beam_search:
            refuse_in_beam_search(extra_args)
    except RequestOptionError as error:
        return error
    return None


def prompt_len(token_ids: Sized | None, embeds: Sized | None) -> int:
    """Returns the length of a prompt that is tokens or embeddings, 0 where it is neither yet."""
    known = embeds if token_ids is None else token_ids
    return 0 if known is None else len(known)


@lru_cache(maxsize=16)
def _server_options(as_json: str) -> ServerOptions:
    """The server's options; finding the method among them takes milliseconds."""
    return ServerOptions.from_dict(json.loads(as_json))
