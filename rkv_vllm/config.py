"""The options of KV cache compression: names, defaults, meaning, limits.

One frozen dataclass travels as plain JSON in `vllm_config.additional_config["kv_compression"]` to
every process. Knows neither vLLM nor argparse; the command line is built from `OPTIONS` in
`flags.py`, the place where vLLM meets these options is `patches/create_engine_config.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

CONFIG_KEY = "kv_compression"


@dataclass(frozen=True)
class Option:
    """One option as users see it.

    Attributes:
        name: field of `KVCompressionConfig` and key of the JSON object.
        flag: spelling on the command line.
        metavar: placeholder of the value in `--help`.
        type: `str`, `int` or `float`; an `int` is taken for a `float`, a `bool` for neither.
        wanted: the values that are accepted, in words, with the unit.
        accepts: tells an accepted value from another one of the right type; False for NaN.
        meaning: one sentence for `--help`.
    """

    name: str
    flag: str
    metavar: str
    type: type
    wanted: str
    accepts: Callable[[Any], bool]
    meaning: str

    @property
    def dest(self) -> str:
        """The flag's name as argparse and requests spell it: "kv_budget"."""
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def default(self) -> str | int | float:
        """The value that holds when the option is left out."""
        return getattr(KVCompressionConfig, self.name)

    def check(self, value: object) -> str | int | float:
        """Returns the value in its canonical type.

        Raises:
            ValueError: wrong type, or a value that the option does not accept.
        """
        if self.type is float and type(value) is int:
            value = float(value)
        if type(value) is not self.type or not self.accepts(value):
            raise ValueError(
                f"{self.flag} ({self.name}): got {value!r}, wanted {self.wanted}; "
                f"change it or leave it out for the default {self.default!r}"
            )
        return value


class MethodOption(Option):
    """The option that names a class: one that is registered, or any that can be imported."""

    def check(self, value: object) -> str:
        """Returns the name of the method; imports its module.

        Raises:
            ValueError: not a string, or it names no method.
        """
        # Deferred: the package of the methods imports torch.
        from rkv_vllm.methods import get_method

        name = super().check(value)
        try:
            get_method(name)
        except ValueError as error:
            raise ValueError(f"{self.flag} ({self.name}): {error}") from error
        return name


OPTIONS = (
    MethodOption(
        "method",
        "--kv-compression",
        "METHOD",
        str,
        "the name of an installed method or of a class, as package.module.Class",
        lambda name: True,
        "Switches compression on and names the method that chooses the tokens to keep; `rkv` is "
        "R-KV. The other --kv-... options of this group need it.",
    ),
    Option(
        "budget",
        "--kv-budget",
        "TOKENS",
        int,
        "a whole number of tokens, at least 1",
        lambda tokens: tokens >= 1,
        "Tokens that a request keeps in its cache after a compaction, window included, per layer "
        "and KV head.",
    ),
    Option(
        "buffer",
        "--kv-buffer",
        "TOKENS",
        int,
        "a whole number of tokens, at least 1",
        lambda tokens: tokens >= 1,
        "Tokens that pile up above the budget before the next compaction; at least the window.",
    ),
    Option(
        "window",
        "--kv-window",
        "TOKENS",
        int,
        "a whole number of tokens, at least 1",
        lambda tokens: tokens >= 1,
        "Newest tokens, always kept; their queries judge the older ones. Less than the budget.",
    ),
    Option(
        "lam",
        "--kv-lambda",
        "WEIGHT",
        float,
        "a number from 0 to 1",
        lambda weight: 0 <= weight <= 1,
        "Weight of importance against redundancy, no unit: 1 looks at attention only, 0 at "
        "similarity only.",
    ),
    Option(
        "pool",
        "--kv-pool",
        "TOKENS",
        int,
        "an odd number of tokens, at least 1",
        lambda tokens: tokens >= 1 and tokens % 2 == 1,
        "Width of the max-pooling over importance, in tokens; odd, 1 switches it off.",
    ),
    Option(
        "threshold",
        "--kv-threshold",
        "COSINE",
        float,
        "a cosine from -1 to 1",
        lambda cosine: -1 <= cosine <= 1,
        "Cosine between two keys above which the tokens count as similar, no unit. Write a "
        "negative one with `=`.",
    ),
    Option(
        "observation_slots",
        "--kv-observation-slots",
        "REQUESTS",
        int,
        "a whole number of requests, at least 1",
        lambda requests: requests >= 1,
        "Requests whose queries are recorded at the same time; it caps the compactions per step "
        "and the memory of the recordings.",
    ),
    Option(
        "max_request_tokens",
        "--kv-max-request-tokens",
        "TOKENS",
        int,
        "a whole number of tokens, 0 for no limit",
        lambda tokens: tokens >= 0,
        "Most tokens, budget plus buffer, that a request may set for itself by kv_budget and "
        "kv_buffer (`vllm_xargs`); with a limit no request can switch compression off.",
    ),
    Option(
        "min_request_buffer",
        "--kv-min-request-buffer",
        "TOKENS",
        int,
        "a whole number of tokens, at least 1",
        lambda tokens: tokens >= 1,
        "Smallest kv_buffer that a request may set for itself: the smaller the buffer, the more "
        "often its cache is compacted. The window is the least in any case.",
    ),
)
OPTIONS_BY_NAME = {option.name: option for option in OPTIONS}


@dataclass(frozen=True)
class KVCompressionConfig:
    """What to keep of a request's KV cache, and when; checked when it is made.

    Attributes:
        method: the method that chooses what to keep: a registered name or package.module.Class.
        budget: tokens kept per request after a compaction, window included.
        buffer: tokens that pile up between two compactions.
        window: newest tokens, always kept, whose queries judge the others.
        lam: weight of importance against redundancy, 0 to 1.
        pool: width of the max-pooling over importance in tokens, odd.
        threshold: cosine above which two keys count as similar, -1 to 1.
        observation_slots: requests whose queries are recorded at the same time.
        max_request_tokens: most tokens, budget plus buffer, that a request may set for itself; 0
            for no limit.
        min_request_buffer: smallest buffer that a request may set for itself.

    Raises:
        ValueError: a value of the wrong type or out of range, or values that contradict each other.

    Source: R-KV (arXiv:2505.24133), sections 3 and 4; the defaults are those of its released code.
    """

    method: str = "rkv"
    budget: int = 1024
    buffer: int = 128
    window: int = 8
    lam: float = 0.1
    pool: int = 7
    threshold: float = 0.5
    observation_slots: int = 64
    max_request_tokens: int = 0
    min_request_buffer: int = 1

    def __post_init__(self) -> None:
        """Checks every field, then the fields against each other."""
        for name, option in OPTIONS_BY_NAME.items():
            object.__setattr__(self, name, option.check(getattr(self, name)))
        if self.budget <= self.window:
            raise ValueError(
                f"--kv-budget (budget): got {self.budget}, wanted more tokens than --kv-window "
                f"(window) = {self.window}; raise the budget or lower the window"
            )
        if self.buffer < self.window:
            raise ValueError(
                f"--kv-buffer (buffer): got {self.buffer}, wanted at least as many tokens as "
                f"--kv-window (window) = {self.window}; raise the buffer or lower the window"
            )
        self._check_request_limits()

    def _check_request_limits(self) -> None:
        """What requests get by default must be what they may ask for."""
        default = self.budget + self.buffer
        if 0 < self.max_request_tokens < default:
            raise ValueError(
                f"--kv-max-request-tokens (max_request_tokens): got {self.max_request_tokens}, "
                f"wanted at least --kv-budget + --kv-buffer = {default}, or 0 for no limit; raise "
                "it or lower those"
            )
        if self.min_request_buffer > self.buffer:
            raise ValueError(
                f"--kv-min-request-buffer (min_request_buffer): got {self.min_request_buffer}, "
                f"wanted at most --kv-buffer (buffer) = {self.buffer}; lower it or raise the buffer"
            )

    def to_dict(self) -> dict[str, str | int | float]:
        """Returns all options as plain JSON; equal configs give equal dicts."""
        return asdict(self)

    @classmethod
    def from_dict(cls, options: Mapping[str, object]) -> "KVCompressionConfig":
        """Builds the config from what stands under "kv_compression" in `additional_config`.

        Args:
            options: option names to values; "method" is required, the others have defaults.

        Raises:
            ValueError: not an object, an unknown key, no "method", or a value that is refused.
        """
        check_options(options)
        if "method" not in options:
            given = ", ".join(OPTIONS_BY_NAME[name].flag for name in options) or "an empty object"
            raise ValueError(
                f"{CONFIG_KEY}: got {given} but no method, wanted a method with its options; add "
                '--kv-compression rkv (in JSON: "method": "rkv") to switch compression on'
            )
        return cls(**options)


def check_options(options: object) -> dict[str, str | int | float]:
    """Checks each option by itself and returns them in their canonical types.

    The options may be incomplete: on a command line they arrive one by one.

    Args:
        options: what stands under "kv_compression".

    Raises:
        ValueError: not an object, an unknown key, or a value that is refused.
    """
    if not isinstance(options, Mapping):
        raise ValueError(
            f"{CONFIG_KEY}: got {options!r}, wanted an object of options such as "
            '{"method": "rkv", "budget": 1024}; leave it out to switch compression off'
        )
    if unknown := [key for key in options if key not in OPTIONS_BY_NAME]:
        raise ValueError(
            f"{CONFIG_KEY}: got unknown option {unknown[0]!r}, wanted some of "
            f"{', '.join(OPTIONS_BY_NAME)}; correct its name or remove it"
        )
    return {name: OPTIONS_BY_NAME[name].check(value) for name, value in options.items()}
