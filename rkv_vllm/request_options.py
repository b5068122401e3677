"""What one request may set for itself: lengths, protection, its method's options, or nothing of it.

Clients send these keys as `vllm_xargs` of an OpenAI request, offline callers as
`SamplingParams(extra_args=...)`. The front end reads them to refuse bad values
(`frontend/request_check.py`), the scheduler to act on them (`scheduling/scheduler.py`). Knows
neither vLLM nor HTTP.
"""

import difflib
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any, NamedTuple

from rkv_vllm.option_field import (
    Option,
    OptionError,
    change_method_options,
    describe,
    options_of,
)
from rkv_vllm.options import (
    FORMER_NAMES,
    OPTIONS,
    ServerOptions,
    find_method,
    flagged_method_options,
    prefix_len,
)

SWITCH_KEY = "kv_compression"
OPTION_KEY = "kv_option"
REPORT_KEY = "kv_report"
OFF = "off"

# Keys are spelled like the flags: "kv_budget" is the request's --kv-budget.
_LENGTHS = {f"kv_{name}": each for name, each in OPTIONS.items() if each.per_request}
_REQUEST_KEYS = (SWITCH_KEY, *_LENGTHS, OPTION_KEY, REPORT_KEY)
# Two letters of "kv_budget" exchanged are 0.89; vLLM's "kv_transfer_params" is at most 0.5.
_ALIKE = 0.8


class RequestOptionError(OptionError):
    """A request asks for something that it cannot have; `key` is that of `extra_args` at fault."""


class RequestOptions(NamedTuple):
    """What holds for one request; lengths in tokens.

    Attributes:
        budget: tokens behind the protected ones that a compaction keeps, window included.
        buffer: decoded tokens between two compactions.
        protect: "none", "prompt" or a number of first tokens.
        method_options: of the method's options class; None for the server's.
        compress_prompt: whether a long prompt is compacted between its chunks.
    """

    budget: int
    buffer: int
    protect: str | int = "none"
    method_options: Any | None = None
    compress_prompt: bool = False

    def prefix_len(self, num_prompt_tokens: int) -> int:
        """Returns the number of protected tokens at the front of the request's cache."""
        return prefix_len(self.protect, num_prompt_tokens)


def read_request_options(
    extra_args: Mapping[str, Any] | None, server: ServerOptions, num_prompt_tokens: int = 0
) -> RequestOptions | None:
    """Combine what a request asks for with what the server was started with.

    Args:
        extra_args: of the request's sampling parameters; keys of other extensions are ignored.
        server: the server's options.
        num_prompt_tokens: of the request; 0 where they are not known yet, so that a protected
            prompt is not held against the server's limit.

    Returns:
        What holds for the request, None if its cache is to be kept whole.

    Raises:
        RequestOptionError: a value of the wrong type, outside the server's limits, a key that only
            the server can set, or one that is nearly one of ours.
    """
    if not extra_args:
        return RequestOptions(
            server.budget, server.buffer, server.protect, compress_prompt=server.compress_prompt
        )
    _refuse_server_keys(extra_args)
    _refuse_misspelled_keys(extra_args)
    _check_report(extra_args)
    if SWITCH_KEY in extra_args and _is_off(extra_args, server):
        return None
    options = RequestOptions(
        **{each.name: _read_length(key, extra_args, server) for key, each in _LENGTHS.items()},
        method_options=_read_method_options(extra_args, server),
    )
    _check_limits(options, extra_args, server, num_prompt_tokens)
    return options


def wants_report(extra_args: Mapping[str, Any] | None) -> bool:
    """Whether a request asks what compression did to it (`scheduling/request_reports.py`)."""
    return bool(extra_args) and _as_truth(extra_args.get(REPORT_KEY)) is True


def refuse_in_beam_search(extra_args: Mapping[str, Any]) -> None:
    """Raise for a key of ours, which vLLM's beam search would drop.

    Args:
        extra_args: of the request.

    Raises:
        RequestOptionError: names the first such key.
    """
    for key in _REQUEST_KEYS:
        if key in extra_args:
            raise RequestOptionError(
                key,
                extra_args[key],
                "no value with use_beam_search: vLLM makes new requests of one token each for "
                "every step, of which none is ever compacted",
                "leave it out or remove use_beam_search",
            )


def keeps_prompt(sampling_params: Any) -> bool:
    """Whether a request needs its prompt's cache whole: logprobs of the prompt are those of it.

    Args:
        sampling_params: vLLM's, of the request.
    """
    return sampling_params.prompt_logprobs is not None


@cache
def _server_keys() -> dict[str, Option]:
    """Keys spelled like flags that no request can set; silence would let it believe it had."""
    former = {f"kv_{old}": OPTIONS[new] for old, new in FORMER_NAMES.items()}
    flagged = {**OPTIONS, **flagged_method_options()}.values()
    keys = {each.flag.removeprefix("--").replace("-", "_"): each for each in flagged}
    return {key: each for key, each in (keys | former).items() if key not in _REQUEST_KEYS}


def _refuse_server_keys(extra_args: Mapping[str, Any]) -> None:
    for key, each in _server_keys().items():
        if key in extra_args:
            wanted = f"no value: {each.flag} holds for the whole server"
            cure = f"leave it out; a request can set {', '.join(_REQUEST_KEYS)}"
            if each.per_request:
                wanted = "no value under this key"
                cure = f'write "{OPTION_KEY}": "{each.name}=..."'
            raise RequestOptionError(key, extra_args[key], wanted, cure)


def _refuse_misspelled_keys(extra_args: Mapping[str, Any]) -> None:
    """Raise for a key that is meant for us and would change nothing."""
    for key in extra_args.keys() - set(_REQUEST_KEYS):
        meant = _meant_by(key, any(name in extra_args for name in _REQUEST_KEYS))
        if meant is not None:
            wanted = f"one of {', '.join(_REQUEST_KEYS)}"
            raise RequestOptionError(key, extra_args[key], wanted, f"write {meant!r}")


@lru_cache(maxsize=256)
def _meant_by(key: str, is_beside_ours: bool) -> str | None:
    """The request key that somebody meant, None for a key of others."""
    spelled = key.lower().replace("-", "_")
    if not spelled.startswith("kv_"):
        # "budget" alone may be anybody's.
        spelled = f"kv_{spelled}"
        return spelled if is_beside_ours and spelled in _REQUEST_KEYS else None
    return next(iter(difflib.get_close_matches(spelled, _REQUEST_KEYS, 1, _ALIKE)), None)


def _check_report(extra_args: Mapping[str, Any]) -> None:
    value = extra_args.get(REPORT_KEY, False)
    if type(_as_truth(value)) is not bool:
        cure = "change it or leave it out for no report"
        raise RequestOptionError(REPORT_KEY, value, "true or false", cure)


def _is_off(extra_args: Mapping[str, Any], server: ServerOptions) -> bool:
    method = extra_args[SWITCH_KEY]
    if method not in (OFF, server.method):
        raise RequestOptionError(
            SWITCH_KEY,
            method,
            f"{OFF!r} or this server's method {server.method!r}",
            "change it or leave it out for the server's method",
        )
    if method != OFF:
        return False
    if server.max_request_tokens:
        raise RequestOptionError(
            SWITCH_KEY,
            method,
            f"compression, because this server lets no request keep more than "
            f"--kv-max-request-tokens {server.max_request_tokens}",
            "leave it out or set kv_budget and kv_buffer within the limit",
        )
    for key in (*_LENGTHS, OPTION_KEY):
        if key in extra_args:
            raise RequestOptionError(
                key,
                extra_args[key],
                f"no value, because {SWITCH_KEY} is {OFF!r}",
                "leave out one of the two",
            )
    return True


def _read_length(key: str, extra_args: Mapping[str, Any], server: ServerOptions) -> str | int:
    each = _LENGTHS[key]
    default = getattr(server, each.name)
    value = extra_args.get(key, default)
    if bool in each.kinds:
        value = _as_truth(value)
    try:
        return each.check(value)
    except OptionError as error:
        cure = f"change it or leave it out for the server's {default}"
        raise RequestOptionError(key, error.got, error.wanted, cure) from error


def _as_truth(value: Any) -> Any:
    """Over HTTP a truth value arrives as a number or a text."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower(), value)
    return bool(value) if value in (0, 1) else value


def _read_method_options(extra_args: Mapping[str, Any], server: ServerOptions) -> Any | None:
    """The method's options of the request; None if it sets none."""
    if OPTION_KEY not in extra_args:
        return None
    got = extra_args[OPTION_KEY]
    cls = type(server.method_options)
    listing = describe(server.method, cls)
    allowed = [name for name, each in options_of(cls).items() if each.per_request]
    changes = {}
    for item in got if isinstance(got, list) else [got]:
        name, is_pair, value = item.partition("=") if isinstance(item, str) else ("", "", "")
        if not is_pair:
            wanted = 'a text such as "name=value", or a list of them'
            raise RequestOptionError(OPTION_KEY, got, wanted, "change it", listing)
        if name not in allowed:
            wanted = f"options that a request can set: {', '.join(allowed) or 'none'}"
            cure = f"leave {name!r} out or ask for another server"
            raise RequestOptionError(OPTION_KEY, got, wanted, cure, listing)
        changes[name] = value
    try:
        own = change_method_options(server.method, server.method_options, changes)
    except OptionError as error:
        wanted = f"{error.wanted} for {error.key.removeprefix('--kv-option ')}"
        cure = "change it or leave it out for the server's"
        raise RequestOptionError(OPTION_KEY, got, wanted, cure, listing) from error
    if _needs_queries(server.method, own) > _needs_queries(server.method, server.method_options):
        wanted = "values that need no queries, because this server was started to record none"
        cure = "leave it out or ask for another server"
        raise RequestOptionError(OPTION_KEY, got, wanted, cure, listing)
    return own


@lru_cache(maxsize=64)
def _needs_queries(method: str, options: Any) -> bool:
    """Finding the method among the installed ones takes milliseconds."""
    return find_method(method).need(options).queries


def _check_limits(
    options: RequestOptions,
    extra_args: Mapping[str, Any],
    server: ServerOptions,
    num_prompt_tokens: int,
) -> None:
    """Raise unless the lengths are possible and within the limits; the server's own always are."""
    if options.compress_prompt and not server.compress_prompt:
        raise RequestOptionError(
            "kv_compress_prompt",
            True,
            "false, because this server was started without --kv-compress-prompt",
            "leave it out or ask for another server",
        )
    least_buffer = max(server.window, server.min_request_buffer)
    if options.budget <= server.window:
        raise RequestOptionError(
            "kv_budget",
            options.budget,
            f"more tokens than this server's --kv-window {server.window}",
            f"raise it or leave it out for the server's {server.budget}",
        )
    if options.buffer < least_buffer:
        raise RequestOptionError(
            "kv_buffer",
            options.buffer,
            f"at least {least_buffer} tokens on this server",
            f"raise it or leave it out for the server's {server.buffer}",
        )
    limit = server.max_request_tokens
    prefix = options.prefix_len(num_prompt_tokens)
    given = [key for key, each in _LENGTHS.items() if key in extra_args and int in each.kinds]
    if limit and given and prefix + options.budget + options.buffer > limit:
        protected = f"{prefix} protected + " if prefix else ""
        raise RequestOptionError(
            given[0],
            extra_args[given[0]],
            f"a budget plus buffer of at most {limit} tokens (--kv-max-request-tokens), "
            f"not {protected}{options.budget} + {options.buffer}",
            "lower it",
        )
