"""The sides of a benchmark: stock vLLM and one budget each, their flags, and who runs when.

Knows the flags of vLLM by name only. Next: offline.py and served.py, which run one side once.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from rkv_vllm.flags import FLAGS_KEY, OPTION_FLAG, add_flags
from rkv_vllm.options import CONFIG_KEY, METHOD_KEY, OPTIONS, ServerOptions

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
    own = {flag for flag in parser._option_string_actions if flag.startswith("--kv-")}
    # Goes to every side as it is.
    del parser._option_string_actions["--additional-config"]
    for name, cure in taken.items():
        parser.add_argument(name, action=_Refuse, nargs="?", help=cure)
    # vLLM takes underscores for dashes; what follows "=" or "." is a value or a key.
    spelled = [_with_dashes(flag) if flag.startswith("--") else flag for flag in flags]
    for flag, _, third in zip(spelled, spelled[1:], spelled[2:], strict=False):
        if flag in own - {OPTION_FLAG} and not third.startswith("-"):
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


def make_sides(budgets: Sequence[int], buffer: int, compression: dict[str, Any]) -> list[Side]:
    """Returns the stock side and one for each budget, in the order of the tables."""
    sides = [Side(None, ())]
    for budget in budgets:
        own = {"method": ServerOptions.method, "budget": budget, "buffer": buffer, **compression}
        pairs = own.pop(METHOD_KEY, {})
        flags = [f"{OPTIONS[name].flag}={value}" for name, value in own.items()]
        flags += [OPTION_FLAG, *(f"{name}={pairs[name]}" for name in pairs)] if pairs else []
        sides.append(Side(budget, tuple(flags)))
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
