"""The options of KV cache compression: the server's and each method's, checked, as plain JSON.

An option is a dataclass field (`option_field.py`) whose metadata is the only table: flags, help,
JSON, the checks of requests and the rows of docs/options.md are made from it. The options travel in
`vllm_config.additional_config["kv_compression"]` to every process. Knows neither vLLM nor argparse.
Next: flags.py, request_options.py, patches/create_engine_config.py.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from rkv_vllm.option_field import Option, OptionError, change_method_options, option, options_of

CONFIG_KEY = "kv_compression"
# Where the JSON object holds the options of the method itself.
METHOD_KEY = "options"
# Lengths beyond it do not fit into the kernels' integers, and no context is that long.
MOST_TOKENS = 2**31 - 1
# A kernel holds the queries of a whole window at once, and every seat records as many.
MOST_WINDOW = 128
FORMER_NAMES = {"observation_slots": "seats"}

_TOKENS = f"a whole number of tokens, 1 to {MOST_TOKENS}"


def find_method(name: object) -> type:
    """Returns the class of a method; imports its module.

    Raises:
        ValueError: it names no method.
    """
    # Deferred: the package of the methods imports torch.
    from rkv_vllm.methods import get_method

    method = OPTIONS["method"]
    try:
        return get_method(method.check(name))
    except OptionError:
        raise
    except ValueError as error:
        raise ValueError(f"{method.label}: {error}") from error


@cache
def flagged_method_options() -> dict[str, Option]:
    """Returns the options of R-KV, which have flags and may stand beside the server's options."""
    own = options_of(find_method(ServerOptions.method).Options)
    return {name: each for name, each in own.items() if each.flag}


@dataclass(frozen=True, init=False)
class ServerOptions:
    """What to keep of a request's KV cache, and when; checked when it is made.

    Takes what the JSON object takes: the fields, `options` with those of the method, and those of
    them that have flags.

    Attributes:
        method_options: object of the method's options class.

    Raises:
        ValueError: a value of the wrong type or out of range, or values that contradict each other.

    Source: R-KV (arXiv:2505.24133), sections 3 and 4; the defaults are those of its released code.
    """

    method: str = option(
        "rkv",
        "Switches compression on and names the method that chooses the tokens to keep; `rkv` is "
        "R-KV. The other --kv-... options of this group need it.",
        flag="--kv-compression",
        metavar="METHOD",
        wanted="the name of an installed method or of a class, as package.module.Class",
    )
    budget: int = option(
        1024,
        "Tokens that a request keeps in its cache after a compaction, window included, per layer "
        "and KV head.",
        flag="--kv-budget",
        metavar="TOKENS",
        wanted=_TOKENS,
        accepts=lambda tokens: 1 <= tokens <= MOST_TOKENS,
        per_request=True,
    )
    buffer: int = option(
        128,
        "Tokens that pile up above the budget before the next compaction; at least the window.",
        flag="--kv-buffer",
        metavar="TOKENS",
        wanted=_TOKENS,
        accepts=lambda tokens: 1 <= tokens <= MOST_TOKENS,
        per_request=True,
    )
    when: str = option(
        "always",
        "When to compact: `always`, whenever --kv-buffer tokens have piled up, or only under "
        "`pressure`, when the pool of blocks runs short: nothing is evicted while there is room.",
        flag="--kv-when",
        metavar="always|pressure",
        wanted="'always' or 'pressure'",
        accepts=lambda when: when in ("always", "pressure"),
    )
    window: int = option(
        8,
        "Newest tokens, always kept; their queries judge the older ones. Less than the budget.",
        flag="--kv-window",
        metavar="TOKENS",
        wanted=f"a whole number of tokens, 1 to {MOST_WINDOW}",
        accepts=lambda tokens: 1 <= tokens <= MOST_WINDOW,
    )
    protect: str | int = option(
        "none",
        "First tokens of a request that no compaction touches: `none`, its `prompt`, or so many. "
        "The budget counts the tokens behind them.",
        flag="--kv-protect",
        metavar="none|prompt|TOKENS",
        wanted="'none', 'prompt' or a whole number of tokens",
        accepts=lambda what: (
            0 <= what <= MOST_TOKENS if type(what) is int else what in ("none", "prompt")
        ),
        per_request=True,
    )
    layer_budgets: str = option(
        "method",
        "How the budget is spread over the layers, whose mean it is: as the `method` says (evenly, "
        "for all built-in ones), as a `pyramid` with more for lower layers, or by a FILE.json that "
        "`rkv-vllm calibrate MODEL --layer-budgets FILE.json` writes.",
        flag="--kv-layer-budgets",
        metavar="method|pyramid|FILE.json",
        wanted="'method', 'pyramid' or the path of a JSON file",
        accepts=lambda setting: setting != "",
    )
    share_layers: str = option(
        "none",
        "Layers that read the cache of an earlier layer in place of one of their own, so that the "
        "pool holds more tokens: a FILE.json that `rkv-vllm calibrate MODEL --share-layers "
        "FILE.json` writes. Whatever the budget, the text changes.",
        flag="--kv-share-layers",
        metavar="none|FILE.json",
        wanted="'none' or the path of a JSON file",
        accepts=lambda setting: setting != "",
    )
    compress_prompt: bool = option(
        False,
        "Compacts the cache of a long prompt between its chunks, so that neither prompts nor "
        "--max-model-len are limited by the pool. Without it a prompt is cached whole.",
        flag="--kv-compress-prompt",
        per_request=True,
    )
    prompt_chunk: int = option(
        2048,
        "With --kv-compress-prompt: tokens computed between two compactions of a prompt. The "
        "answer depends on it.",
        flag="--kv-prompt-chunk",
        metavar="TOKENS",
        wanted=_TOKENS,
        accepts=lambda tokens: 1 <= tokens <= MOST_TOKENS,
    )
    seats: int = option(
        64,
        "Requests whose queries are recorded at the same time; it caps the compactions per step "
        "and the memory of the recordings.",
        flag="--kv-seats",
        metavar="REQUESTS",
        wanted="a whole number of requests, at least 1",
        accepts=lambda requests: requests >= 1,
    )
    swap_space: float = option(
        0.0,
        "GiB of host memory, over all ranks of an engine, into which compacted requests are copied "
        "when they are preempted, so that they go on where they stopped; 0 lets them compute their "
        "whole text again.",
        flag="--kv-swap-space",
        metavar="GiB",
        wanted="a finite number of GiB, at least 0",
        accepts=lambda gib: gib >= 0,
    )
    experimental_mla: bool = option(
        False,
        "Compresses models of multi-head latent attention (DeepSeek-V2, V3, R1, Kimi), on a CPU. "
        "What that costs in accuracy has not been measured on any real model.",
        flag="--kv-experimental-mla",
    )
    max_request_tokens: int = option(
        0,
        "Most tokens, protected ones plus budget plus buffer, that a request may set for itself by "
        "kv_protect, kv_budget and kv_buffer (`vllm_xargs`); with a limit no request can switch "
        "compression off.",
        flag="--kv-max-request-tokens",
        metavar="TOKENS",
        wanted="a whole number of tokens, 0 for no limit",
        accepts=lambda tokens: tokens >= 0,
    )
    min_request_buffer: int = option(
        1,
        "Smallest kv_buffer that a request may set for itself: the smaller the buffer, the more "
        "often its cache is compacted. The window is the least in any case.",
        flag="--kv-min-request-buffer",
        metavar="TOKENS",
        wanted="a whole number of tokens, at least 1",
        accepts=lambda tokens: tokens >= 1,
    )
    method_options: Any = field(default=None, metadata={"nested": True})

    def __init__(self, *, method_options: Any = None, **given: Any) -> None:
        given = check_options(given)
        for name, each in OPTIONS.items():
            object.__setattr__(self, name, given.get(name, each.default))
        cls = find_method(self.method).Options
        if method_options is None:
            method_options = cls()
        elif type(method_options) is not cls:
            raise OptionError(
                "method_options",
                method_options,
                f"{cls.__module__}.{cls.__qualname__}, which the method {self.method!r} takes",
                "leave it out or pass options={...}",
            )
        changes = given.get(METHOD_KEY, {})
        method_options = change_method_options(self.method, method_options, changes)
        object.__setattr__(self, "method_options", method_options)
        self._check_fit()

    def _check_fit(self) -> None:
        """Checks the options against each other."""
        if self.budget <= self.window:
            self._refuse(
                "budget",
                f"more tokens than --kv-window (window) = {self.window}",
                "raise the budget or lower the window",
            )
        if self.buffer < self.window:
            self._refuse(
                "buffer",
                f"at least as many tokens as --kv-window (window) = {self.window}",
                "raise the buffer or lower the window",
            )
        if self.prompt_chunk < self.window:
            self._refuse(
                "prompt_chunk",
                f"at least as many tokens as --kv-window (window) = {self.window}",
                "raise the chunk or lower the window",
            )
        # What requests get by default must be what they may ask for.
        if 0 < self.max_request_tokens < self.least_room:
            self._refuse(
                "max_request_tokens",
                f"at least --kv-protect + --kv-budget + --kv-buffer = {self.least_room}, or 0 for "
                "no limit",
                "raise it or lower those",
            )
        if self.min_request_buffer > self.buffer:
            self._refuse(
                "min_request_buffer",
                f"at most --kv-buffer (buffer) = {self.buffer}",
                "lower it or raise the buffer",
            )

    @property
    def least_room(self) -> int:
        """Tokens that a request holds when it is compacted first, at least."""
        return prefix_len(self.protect, 0) + self.budget + self.buffer

    def prompt_seats(self, max_step_tokens: int) -> int:
        """Returns how many prompts can be compacted after one step, beside `seats` requests.

        Args:
            max_step_tokens: that a step computes at most.
        """
        return max(1, max_step_tokens // self.prompt_chunk) if self.compress_prompt else 0

    def slack(self, block_size: int, max_advance: int = 1) -> int:
        """Tokens above prefix and budget at which a request can be compacted under pressure.

        A whole block has to pile up, and a window to be recorded, with a step before and after.

        Args:
            block_size: tokens of a block.
            max_advance: most tokens by which one step takes a decoding request on.
        """
        return block_size + self.window + 2 * max_advance if self.when == "pressure" else 0

    def check_room(self, max_model_len: int) -> None:
        """Checks that protected tokens leave room for compactions.

        Args:
            max_model_len: the most tokens that a request can have.

        Raises:
            OptionError: they do not.
        """
        if prefix_len(self.protect, 0) > 0 and self.least_room >= max_model_len:
            self._refuse(
                "protect",
                f"--kv-protect + --kv-budget {self.budget} + --kv-buffer {self.buffer} below "
                f"--max-model-len {max_model_len}",
                "lower it or the budget: no request would ever be compacted",
            )

    def check_swap_space(self, memory: int, num_engines: int) -> None:
        """Checks that the swap space fits into a machine.

        Args:
            memory: bytes of the machine.
            num_engines: data-parallel engines on it, of which each has a swap space of its own.

        Raises:
            OptionError: it does not.
        """
        if self.swap_space * num_engines * 2**30 >= memory:
            self._refuse(
                "swap_space",
                f"less than the {memory / 2**30:.1f} GiB of this machine's memory"
                + f" for {num_engines} engines together" * (num_engines > 1),
                "lower it, or leave it out to switch swapping off",
            )

    def _refuse(self, name: str, wanted: str, cure: str) -> None:
        raise OptionError(OPTIONS[name].label, getattr(self, name), wanted, cure)

    def to_dict(self) -> dict[str, Any]:
        """Returns all options as plain JSON; equal options give equal dicts."""
        own = {METHOD_KEY: asdict(self.method_options)}
        return {name: getattr(self, name) for name in OPTIONS} | own

    @classmethod
    def from_dict(cls, options: Mapping[str, object]) -> "ServerOptions":
        """Builds the options from what stands under "kv_compression" in `additional_config`.

        Args:
            options: option names to values; "method" is required, the others have defaults.

        Raises:
            ValueError: not an object, an unknown key, no "method", or a value that is refused.
        """
        given = check_options(options)
        if "method" not in given:
            names = {**OPTIONS, **flagged_method_options()}
            flags = ", ".join(names[name].flag for name in options if name in names)
            raise ValueError(
                f"{CONFIG_KEY}: got {flags or dict(options)} but no method, wanted a method with "
                'its options; add --kv-compression rkv (in JSON: "method": "rkv") to switch '
                "compression on"
            )
        return cls(**given)


OPTIONS = options_of(ServerOptions)


def prefix_len(protect: str | int, num_prompt_tokens: int) -> int:
    """Returns the number of protected tokens at the front of a request's cache.

    Args:
        protect: value of the option.
        num_prompt_tokens: of the request.
    """
    return {"none": 0, "prompt": num_prompt_tokens}.get(protect, protect)


def check_options(options: object) -> dict[str, Any]:
    """Checks each option by itself and returns them in their canonical names and types.

    The options may be incomplete: on a command line they arrive one by one. What the method says to
    its own is found out when it is known (`ServerOptions`).

    Args:
        options: what stands under "kv_compression".

    Raises:
        ValueError: not an object, an unknown key, a key given twice, or a value that is refused.
    """
    _require_object(CONFIG_KEY, options, '{"method": "rkv", "budget": 1024}')
    checked: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for key, value in options.items():
        name = FORMER_NAMES.get(key, key)
        if name == METHOD_KEY:
            _require_object(f"{CONFIG_KEY}.{METHOD_KEY}", value, '{"strength": 3}')
            _add(own, value)
        elif name in OPTIONS:
            _add(checked, {name: OPTIONS[name].check(value)})
            if name == "method":
                find_method(value)
        elif name in flagged_method_options():
            _add(own, {name: flagged_method_options()[name].check(value)})
        else:
            raise ValueError(
                f"{CONFIG_KEY}: got unknown option {key!r}, wanted some of {', '.join(OPTIONS)}, "
                f"or {METHOD_KEY} with the method's own; correct its name or remove it"
            )
    return {**checked, METHOD_KEY: own} if own else checked


def merge(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns checked options with all of the method's own; of equal names the last one holds."""
    merged: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for part in parts:
        merged.update(part)
        own.update(part.get(METHOD_KEY, {}))
    return {**merged, METHOD_KEY: own} if own else merged


def read_pairs(key: str, texts: Iterable[str]) -> dict[str, dict[str, str]]:
    """Reads options of a method that are written as name=value.

    Args:
        key: where they stand, as the user spells it.
        texts: one for each option.

    Raises:
        OptionError: a text of another form.
    """
    own = {}
    for text in texts:
        name, is_pair, value = text.partition("=")
        if not is_pair or not name:
            raise OptionError(key, text, "name=value", "write it without blanks")
        own[name] = value
    return {METHOD_KEY: own}


def _require_object(key: str, value: object, example: str) -> None:
    if not isinstance(value, Mapping):
        wanted = f"an object of options such as {example}"
        raise OptionError(key, value, wanted, "change it or leave it out")


def _add(options: dict[str, Any], more: Mapping[str, Any]) -> None:
    for name, value in more.items():
        if name in options:
            raise ValueError(
                f"{CONFIG_KEY}: got {name!r} twice, wanted it once; remove one of the two"
            )
        options[name] = value
