"""The sides of a benchmark: stock vLLM and one budget each, their flags, and who runs when.

Knows the flags of vLLM by name only. Next: offline.py and served.py, which run one side once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rkv_vllm.config import CONFIG_KEY, OPTIONS, KVCompressionConfig

STOCK = "stock"
_OWN_SERVER = "leave it out: bench starts its own server on a free port"
# Flags of vLLM that would contradict what bench decides for all sides, with the way out.
_TAKEN = {
    "--model": "name the model before the options",
    "--config": "leave it out: pass the flags of that file one by one",
    "--dtype": "pass --dtype before `--`",
    "--seed": "pass --seed before `--`",
    "--block-size": "pass --block-size before `--`",
    "--max-model-len": "leave it out: it is the longest prompt plus --output-len",
    "--kv-cache-memory-bytes": "pass --pool-tokens before `--`",
    "--num-gpu-blocks-override": "pass --pool-tokens before `--`",
    "--kv-budget": "pass --budget before `--`",
    "--kv-buffer": "pass --buffer before `--`",
    "--disable-log-stats": "leave it out: the counts come from /metrics",
    "--hf-token": "leave it out: nothing is downloaded, and the command is printed",
    "--ignore-eos": "leave it out: all outputs have --output-len tokens",
    **dict.fromkeys(("--host", "--port", "--uds", "--api-key", "--ssl-keyfile"), _OWN_SERVER),
}
_COMPRESSION_FLAGS = {option.flag for option in OPTIONS}
_CONFIG_FLAG = "--additional-config"


@dataclass(frozen=True)
class Side:
    """One way to serve the workload.

    Attributes:
        budget: `--kv-budget`; None for stock vLLM.
        flags: of this side alone.
    """

    budget: int | None
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        """How tables and JSON call it."""
        return STOCK if self.budget is None else f"budget {self.budget}"


@dataclass(frozen=True)
class Run:
    """One run of one side: `mode` is "offline" or "served", `repeat` counts from 1."""

    mode: str
    side: Side
    repeat: int


def split_engine_flags(flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits what follows `--` into flags of every side and flags of the compressed sides.

    Args:
        flags: as for `vllm serve`; `--kv-window` and its like only make sense with compression.

    Raises:
        ValueError: a flag that bench itself decides about, or that may be one, abbreviated.
    """
    common: list[str] = []
    compressed: list[str] = []
    target, name = common, ""
    for flag in flags:
        # Anything else is the value of the flag before it.
        if flag.startswith("-"):
            name = _name_of(flag)
            _refuse_taken(name)
            target = compressed if name in _COMPRESSION_FLAGS else common
        if name == _CONFIG_FLAG and CONFIG_KEY in flag:
            raise ValueError(
                f"{_CONFIG_FLAG}: got {CONFIG_KEY!r} in it, wanted the stock side without "
                "compression; pass --budget, --buffer or the --kv-... flags"
            )
        target.append(flag)
    return common, compressed


def _name_of(flag: str) -> str:
    """A flag as vLLM documents it, without its value and without keys (`--flag.key=value`)."""
    return flag.partition("=")[0].partition(".")[0].replace("_", "-")


def _refuse_taken(name: str) -> None:
    if name in _TAKEN:
        raise ValueError(
            f"{name}: got it among the flags for vLLM, wanted none that bench decides about; "
            f"{_TAKEN[name]}"
        )
    if not name.startswith("--") or name in _COMPRESSION_FLAGS:
        return
    # vLLM takes what begins like a flag for that flag.
    for full in (*_TAKEN, *sorted(_COMPRESSION_FLAGS), _CONFIG_FLAG):
        if full != name and full.startswith(name):
            raise ValueError(
                f"{name}: got it among the flags for vLLM, wanted their names in full, and {full} "
                "begins like it; write it out"
            )


def compression_options(flags: Sequence[str]) -> dict[str, str | int | float]:
    """Returns the options behind flags of the compressed sides, by their names in the config.

    Args:
        flags: each with its value, `--flag value` or `--flag=value`.

    Raises:
        ValueError: a flag without a value or with two, or a value of another type.
    """
    options = {}
    rest = list(flags)
    option = None
    while rest:
        name, is_joined, value = rest.pop(0).partition("=")
        if option is not None and not name.startswith("-"):
            raise ValueError(
                f"ENGINE_FLAGS: got {name!r} after {option.flag}, wanted a flag; remove it"
            )
        option = next(each for each in OPTIONS if each.flag == _name_of(name))
        if not is_joined:
            value = rest.pop(0) if rest else ""
        try:
            options[option.name] = option.check(option.parse(value))
        except ValueError as error:
            raise ValueError(
                f"{option.flag}: got {value!r}, wanted {option.takes}; correct it"
            ) from error
    return options


def make_sides(budgets: Sequence[int], buffer: int, compressed_flags: Sequence[str]) -> list[Side]:
    """Returns the stock side and one for each budget, in the order of the tables."""
    sides = [Side(None, ())]
    for budget in budgets:
        method = f"--kv-compression={KVCompressionConfig.method}"
        own = (method, f"--kv-budget={budget}", f"--kv-buffer={buffer}")
        # The last one of equal flags holds.
        sides.append(Side(budget, (*own, *compressed_flags)))
    return sides


def make_schedule(modes: Sequence[str], sides: Sequence[Side], repeats: int) -> list[Run]:
    """Returns the runs in their order: sides take turns, and the order turns round each time.

    The compressed sides begin, so that what compression refuses is refused before anything was
    measured.
    """
    return [
        Run(mode, side, repeat)
        for mode in modes
        for repeat in range(1, repeats + 1)
        for side in (sides if repeat % 2 == 0 else reversed(sides))
    ]
