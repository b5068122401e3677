"""What one request may set for itself: its budget, its buffer, or no compression at all.

Clients send these keys as `vllm_xargs` of an OpenAI request, offline callers as
`SamplingParams(extra_args=...)`. The front end reads them to refuse bad values
(`patches/process_inputs.py`, `patches/generate.py`), the scheduler to act on them
(`scheduling/scheduler.py`). Knows neither vLLM nor HTTP.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from rkv_vllm.config import OPTIONS, KVCompressionConfig

METHOD_KEY = "kv_compression"
BUDGET_KEY = "kv_budget"
BUFFER_KEY = "kv_buffer"
OFF = "off"
# Lengths beyond it do not fit into the kernels' integers, and no context is that long.
MOST_TOKENS = 2**31 - 1

_REQUEST_KEYS = (METHOD_KEY, BUDGET_KEY, BUFFER_KEY)
# Spelled like the flags. Silence would let a client believe that it had set them.
_SERVER_KEYS = {option.dest: option.flag for option in OPTIONS if option.dest not in _REQUEST_KEYS}


class RequestOptionError(ValueError):
    """A request asks for something that it cannot have.

    Attributes:
        key: the key of `extra_args` at fault.
        got: its value.
    """

    def __init__(self, key: str, got: object, wanted: str, cure: str) -> None:
        super().__init__(f"{key}: got {got!r}, wanted {wanted}; {cure}")
        self.key = key
        self.got = got


class RequestOptions(NamedTuple):
    """Lengths that hold for one request, in tokens.

    Attributes:
        budget: tokens kept after a compaction, window included.
        buffer: decoded tokens between two compactions.
    """

    budget: int
    buffer: int

    def first_due_at(self, prefill_len: int) -> int:
        """Tokens at which a request is compacted first, if it decodes that far.

        Args:
            prefill_len: tokens that are computed before the first one is decoded.
        """
        return max(self.budget, prefill_len) + self.buffer


def read_request_options(
    extra_args: Mapping[str, Any] | None, config: KVCompressionConfig
) -> RequestOptions | None:
    """Combine what a request asks for with what the server was started with.

    Args:
        extra_args: of the request's sampling parameters; keys of other extensions are ignored.
        config: the server's options.

    Returns:
        The request's lengths, None if its cache is to be kept whole.

    Raises:
        RequestOptionError: a value of the wrong type, outside the server's limits, or a key that
            only the server can set.
    """
    if not extra_args:
        return RequestOptions(config.budget, config.buffer)
    for key, flag in _SERVER_KEYS.items():
        if key in extra_args:
            raise RequestOptionError(
                key,
                extra_args[key],
                f"no value: {flag} holds for the whole server",
                f"leave it out; a request can set {', '.join(_REQUEST_KEYS)}",
            )
    if METHOD_KEY in extra_args and _is_off(extra_args, config):
        return None
    options = RequestOptions(
        _read_tokens(extra_args, BUDGET_KEY, config.budget),
        _read_tokens(extra_args, BUFFER_KEY, config.buffer),
    )
    _check_limits(options, extra_args, config)
    return options


def _is_off(extra_args: Mapping[str, Any], config: KVCompressionConfig) -> bool:
    method = extra_args[METHOD_KEY]
    if method not in (OFF, config.method):
        raise RequestOptionError(
            METHOD_KEY,
            method,
            f"{OFF!r} or this server's method {config.method!r}",
            "change it or leave it out for the server's method",
        )
    if method != OFF:
        return False
    if config.max_request_tokens:
        raise RequestOptionError(
            METHOD_KEY,
            method,
            f"compression, because this server lets no request keep more than "
            f"--kv-max-request-tokens {config.max_request_tokens}",
            f"leave it out or set {BUDGET_KEY} and {BUFFER_KEY} within the limit",
        )
    for key in (BUDGET_KEY, BUFFER_KEY):
        if key in extra_args:
            raise RequestOptionError(
                key,
                extra_args[key],
                f"no value, because {METHOD_KEY} is {OFF!r}",
                "leave out one of the two",
            )
    return True


def _read_tokens(extra_args: Mapping[str, Any], key: str, default: int) -> int:
    tokens = extra_args.get(key, default)
    # Not isinstance: True is no number of tokens.
    if type(tokens) is not int or tokens > MOST_TOKENS:
        raise RequestOptionError(
            key,
            tokens,
            f"a whole number of tokens, at most {MOST_TOKENS}",
            f"change it or leave it out for the server's {default}",
        )
    return tokens


def _check_limits(
    options: RequestOptions, extra_args: Mapping[str, Any], config: KVCompressionConfig
) -> None:
    """Raise unless the lengths are possible and within the limits; the server's own always are."""
    least_buffer = max(config.window, config.min_request_buffer)
    if options.budget <= config.window:
        raise RequestOptionError(
            BUDGET_KEY,
            options.budget,
            f"more tokens than this server's --kv-window {config.window}",
            f"raise it or leave it out for the server's {config.budget}",
        )
    if options.buffer < least_buffer:
        raise RequestOptionError(
            BUFFER_KEY,
            options.buffer,
            f"at least {least_buffer} tokens on this server",
            f"raise it or leave it out for the server's {config.buffer}",
        )
    limit = config.max_request_tokens
    if limit and sum(options) > limit:
        key = BUDGET_KEY if BUDGET_KEY in extra_args else BUFFER_KEY
        raise RequestOptionError(
            key,
            extra_args[key],
            f"a budget plus buffer of at most {limit} tokens (--kv-max-request-tokens), "
            f"not {options.budget} + {options.buffer}",
            "lower it",
        )
