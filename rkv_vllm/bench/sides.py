"""The sides of a benchmark: stock vLLM, further baselines, and one for each budget and policy.

Says which flags set them apart and who runs when. Knows the flags of vLLM by name only. Next:
offline.py and served.py, which run one side once.
"""

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NoReturn

from rkv_vllm.bench.workload import Workload
from rkv_vllm.fit.refused_models import FP8_CACHES
from rkv_vllm.flags import FLAGS_KEY, OPTION_FLAG, add_flags
from rkv_vllm.options import CONFIG_KEY, METHOD_KEY, OPTIONS, ServerOptions

# The side that the others are compared with.
STOCK = "stock"
FP8 = "fp8"
_CACHE_FLAG = "--kv-cache-dtype"
AUTO = "auto"
# Bytes of one element of caches that hold nothing but elements.
_CACHE_BYTES = {"float16": 2, "bfloat16": 2, **dict.fromkeys(FP8_CACHES, 1)}
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
    "--kv-when": "pass --when before `--`",
    "--scheduling-policy": "pass --priority before `--`",
    "--disable-log-stats": "leave it out: the counts come from /metrics",
    "--hf-token": "leave it out: nothing is downloaded, and the command is printed",
    "--ignore-eos": "leave it out: all outputs have --output-len tokens",
    **dict.fromkeys(("--host", "--port", "--uds", "--api-key", "--ssl-keyfile"), _OWN_SERVER),
}


@dataclass(frozen=True)
class Side:
    """One way to serve the workload.

    Attributes:
        budget: `--kv-budget`; None for stock vLLM.
        flags: of this side alone.
        label: what sets it apart from others of its kind, as tables say it; may be empty.
        when: `--kv-when`; None for stock vLLM.
        pool_tokens: what its own pool holds; None for the workload's.
        is_exact: whether its text is stock's as long as nothing is compacted.
        may_refuse: whether the others go on, and it is reported with vLLM's reason, when it does
            not start.
    """

    budget: int | None
    flags: tuple[str, ...]
    label: str = ""
    when: str | None = None
    pool_tokens: int | None = None
    is_exact: bool = True
    may_refuse: bool = False

    @property
    def name(self) -> str:
        """How tables and JSON call it."""
        kind = STOCK if self.budget is None else f"budget {self.budget}"
        return f"{kind}, {self.label}" if self.label else kind


@dataclass(frozen=True)
class Run:
    """One run of one side: `mode` is "offline" or "served", `repeat` counts from 1."""

    mode: str
    side: Side
    repeat: int


class _Refuse(argparse.Action):
    """The action of a flag that the command decides about; its help is the way out."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        raise ValueError(
            f"{self.option_strings[0]}: got it among the flags for vLLM, wanted none that "
            f"{parser.prog} decides about; {self.help}"
        )


class _Parser(argparse.ArgumentParser):
    """Takes what begins like a flag for that flag, as vLLM does."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message if "; " in message else f"ENGINE_FLAGS: {message}")


def split_engine_flags(
    flags: Sequence[str], command: str = "bench", taken: Mapping[str, str] = _TAKEN
) -> tuple[list[str], dict[str, Any]]:
    """Splits what follows `--` into flags of every side and options of the compressed sides.

    Args:
        flags: as for `vllm serve`; `--kv-window` and its like only make sense with compression.
        command: that takes them.
        taken: flags that the command itself decides about, with the way out.

    Returns:
        The flags of every side, and the options of the compressed sides as in JSON.

    Raises:
        ValueError: a flag that the command itself decides about, also abbreviated, or a value that
            an option of compression does not take.
    """
    parser = _Parser(command, add_help=False, conflict_handler="resolve")
    parser.add_argument("--additional-config")
    add_flags(parser)
    with_value = {
        flag
        for flag, action in parser._option_string_actions.items()
        if flag.startswith("--kv-") and action.nargs is None
    }
    # Goes to every side as it is.
    del parser._option_string_actions["--additional-config"]
    for name, cure in taken.items():
        parser.add_argument(name, action=_Refuse, nargs="?", help=cure)
    # vLLM takes underscores for dashes; what follows "=" or "." is a value or a key.
    spelled = [_with_dashes(flag) if flag.startswith("--") else flag for flag in flags]
    for flag, _, third in zip(spelled, spelled[1:], spelled[2:], strict=False):
        if flag in with_value and not third.startswith("-"):
            raise ValueError(f"ENGINE_FLAGS: got {third!r} after {flag}, wanted a flag; remove it")
    found, common = parser.parse_known_args(spelled, argparse.Namespace(additional_config={}))
    for i, flag in enumerate(common):
        if flag.startswith("--additional") and CONFIG_KEY in "".join(common[i : i + 2]):
            raise ValueError(
                f"--additional-config: got {CONFIG_KEY!r} in it, wanted the stock side without "
                f"compression; see rkv-vllm {command} --help for the compressed sides"
            )
    return common, vars(found).get(FLAGS_KEY, {})


def _with_dashes(flag: str) -> str:
    end = min((i for i in (flag.find("="), flag.find(".")) if i >= 0), default=len(flag))
    return flag[:end].replace("_", "-") + flag[end:]


def make_compressed_sides(
    workload: Workload,
    budgets: Sequence[int],
    whens: Sequence[str],
    compression: Mapping[str, Any],
    caches: Sequence[str] = (AUTO,),
) -> list[Side]:
    """Returns one side for each budget, policy and cache, in the order of the tables.

    Args:
        workload: what is asked.
        budgets: `--kv-budget` of each.
        whens: `--kv-when` of each; none for the server's default alone.
        compression: options that they share, as in JSON.
        caches: `--kv-cache-dtype` of each; those of fp8 have as many blocks as the same bytes hold.
    """
    sides = []
    for budget, when, cache in product(budgets, whens or (ServerOptions.when,), caches):
        own = {"method": ServerOptions.method, "budget": budget, **compression}
        own |= {"when": when} if whens else {}
        pairs = own.pop(METHOD_KEY, {})
        flags = [_flag(name, value) for name, value in own.items() if value is not False]
        if pairs:
            flags += [OPTION_FLAG, *(f"{name}={pairs[name]}" for name in pairs)]
        labels = [when] if whens else []
        tokens = None
        if cache != AUTO:
            flags.append(f"{_CACHE_FLAG}={cache}")
            labels.append(cache)
            tokens = _tokens_of_cache(workload, cache)
        sides.append(
            Side(
                budget,
                tuple(flags),
                label=", ".join(labels),
                when=when,
                pool_tokens=tokens,
                is_exact=cache == AUTO,
                may_refuse=cache != AUTO,
            )
        )
    return sides


def _flag(name: str, value: Any) -> str:
    """One option as its flag; what is on or off has no value."""
    return OPTIONS[name].flag if value is True else f"{OPTIONS[name].flag}={value}"


def make_stock_sides(workload: Workload, baselines: Sequence[str]) -> list[Side]:
    """Returns stock vLLM as it is, and once more with the flags of each further baseline.

    Args:
        workload: what is asked.
        baselines: flags as texts; "fp8" for those of an fp8 cache.

    Raises:
        ValueError: flags that bench decides about, or none of stock vLLM.
    """
    if len(set(baselines)) < len(baselines):
        raise ValueError(
            f"--baseline: got {', '.join(map(repr, baselines))}, wanted a side for each; name none "
            "more than once"
        )
    pool = None
    sides = []
    if workload.pool_tokens and workload.pool_blocks < workload.whole_blocks:
        # It refuses to start in that pool, and gets the smallest that serves every request.
        pool = workload.whole_blocks * workload.block_size
        sides.append(Side(None, (), "same pool", may_refuse=True))
    for text in baselines:
        flags = _baseline_flags(text)
        cache = _cache_dtype(flags)
        tokens = pool if cache == AUTO else _tokens_of_cache(workload, cache)
        sides.append(Side(None, flags, text, None, tokens, is_exact=cache == AUTO, may_refuse=True))
    return [Side(None, (), pool_tokens=pool), *sides]


def _baseline_flags(text: str) -> tuple[str, ...]:
    """The flags of one `--baseline`."""
    try:
        flags, compression = split_engine_flags(
            [f"{_CACHE_FLAG}={FP8}"] if text == FP8 else shlex.split(text)
        )
    except ValueError as error:
        raise ValueError(f"--baseline: got {text!r}: {error}") from error
    if compression or not text.startswith(("-", FP8)):
        raise ValueError(
            f"--baseline: got {text!r}, wanted flags of stock vLLM in quotes, or {FP8}; options of "
            "compression follow `--`"
        )
    return tuple(flags)


def _cache_dtype(flags: Sequence[str]) -> str:
    parser = _Parser("--baseline", add_help=False)
    parser.add_argument(_CACHE_FLAG, default=AUTO)
    return parser.parse_known_args(flags)[0].kv_cache_dtype


def _tokens_of_cache(workload: Workload, dtype: str) -> int | None:
    """Tokens that a cache of another dtype holds in as many bytes as the workload's pool."""
    if dtype not in _CACHE_BYTES:
        raise ValueError(
            f"--baseline: got {_CACHE_FLAG} {dtype}, wanted {', '.join(_CACHE_BYTES)}: of others "
            "bench does not know how many blocks the same bytes hold; take one of these"
        )
    return workload.pool_tokens * workload.element_bytes // _CACHE_BYTES[dtype] or None


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
