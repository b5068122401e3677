"""The sides of an evaluation: stock vLLM, and every method x protection x budget beside it.

A budget on the command line is memory: the tokens that a request keeps, a protected prompt counted
in, so that sides of one budget cost the same. One engine serves all budgets and protections of a
method, which requests set for themselves. Knows the flags of vLLM by name only. Next: session.py.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rkv_vllm.bench.sides import STOCK
from rkv_vllm.flags import OPTION_FLAG
from rkv_vllm.options import METHOD_KEY, OPTIONS, ServerOptions
from rkv_vllm.request_options import OPTION_KEY, SWITCH_KEY

PROTECTIONS = ("none", "prompt")
# Of a budget: more of a prompt is never protected, so that something is left to choose.
_MOST_PROTECTED = 3 / 4
# Of the server's options: what the sides themselves set.
_OF_SIDES = ("method", "budget", "protect")
_METHOD = re.compile(r"\s*([^\[\],]+?)\s*(?:\[([^\[\]]*)\])?\s*(?:,|$)")


@dataclass(frozen=True)
class MethodChoice:
    """A method with its options, as `rkv[center=true]` names it: one engine.

    Attributes:
        name: of the method; None for stock vLLM.
        own: options in brackets, in their order: of the server (`window`, `buffer` and the like)
            or of the method.
    """

    name: str | None
    own: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.own)
        return (self.name or STOCK) + (f"[{options}]" if options else "")

    def options(self, common: dict[str, Any], budget: int) -> dict[str, Any]:
        """Options of the engine, as the JSON object has them.

        Args:
            common: of all methods; what stands in brackets wins.
            budget: of requests that bring none.
        """
        pairs = {**common.get(METHOD_KEY, {})}
        of_server = {**common}
        for name, value in self.own:
            if name in OPTIONS:
                of_server[name] = OPTIONS[name].parse(value)
            else:
                pairs[name] = value
        return {**of_server, "method": self.name, "budget": budget, METHOD_KEY: pairs}

    def flags(self, common: dict[str, Any], budget: int) -> list[str]:
        """Flags of the engine; none for stock vLLM. See `options`."""
        if self.name is None:
            return []
        options = self.options(common, budget)
        pairs = options.pop(METHOD_KEY)
        flags = [f"{OPTIONS[name].flag}={value}" for name, value in options.items()]
        return flags + (
            [OPTION_FLAG, *(f"{name}={value}" for name, value in pairs.items())] if pairs else []
        )


@dataclass(frozen=True)
class EvalSide:
    """One way to serve the problems.

    Attributes:
        choice: the method.
        budget: tokens that a request keeps, a protected prompt counted in; None for stock vLLM.
        protect: one of `PROTECTIONS`.
    """

    choice: MethodChoice
    budget: int | None = None
    protect: str = "none"

    @property
    def name(self) -> str:
        """How tables and results call it, such as "rkv[center=true] 128 +prompt"."""
        if self.budget is None:
            return str(self.choice)
        return f"{self.choice} {self.budget}" + (" +prompt" if self.protect == "prompt" else "")

    def request_options(self, prompt_len: int) -> dict[str, Any]:
        """What a request of this side asks of an engine that serves its method.

        Args:
            prompt_len: tokens of the request's prompt.
        """
        if self.budget is None:
            return {}
        prefix = 0
        if self.protect == "prompt":
            prefix = min(prompt_len, most_protected(self.budget))
        return {"kv_budget": self.budget - prefix, "kv_protect": prefix}

    def served_options(self, prompt_len: int, common: dict[str, Any]) -> dict[str, Any]:
        """What a request of this compressed side asks of a server that serves stock's, too.

        Args:
            prompt_len: tokens of the request's prompt.
            common: options of all methods, as the JSON object has them.
        """
        options = self.choice.options(common, self.budget)
        asked = {SWITCH_KEY: self.choice.name, **self.request_options(prompt_len)}
        asked["kv_buffer"] = options["buffer"]
        if pairs := options[METHOD_KEY]:
            asked[OPTION_KEY] = [f"{name}={value}" for name, value in pairs.items()]
        return asked


def most_protected(budget: int) -> int:
    """Tokens of a prompt that are protected at most within a budget."""
    return int(budget * _MOST_PROTECTED)


def read_methods(text: str) -> list[MethodChoice]:
    """Reads `--methods`, such as "rkv,snapkv,rkv[center=true,window=64]".

    Raises:
        ValueError: not a list of methods.
    """
    choices: list[MethodChoice] = []
    at = 0
    while at < len(text):
        match = _METHOD.match(text, at)
        if match is None:
            raise ValueError(
                f"--methods: got {text!r}, wanted names with commas between, options in brackets; "
                'write it like --methods "rkv,rkv[lam=0.2,window=16],snapkv"'
            )
        choice = MethodChoice(match[1], _read_own(match[2] or ""))
        if choice in choices:
            raise ValueError(f"--methods: got {choice} twice, wanted it once; remove one of them")
        choices.append(choice)
        at = match.end()
    return choices


def _read_own(text: str) -> tuple[tuple[str, str], ...]:
    pairs = []
    for item in filter(None, (item.strip() for item in text.split(","))):
        name, is_pair, value = (part.strip() for part in item.partition("="))
        if not (name and is_pair and value):
            raise ValueError(
                f"--methods: got {item!r} in brackets, wanted name=value; write it like "
                "rkv[center=true]"
            )
        if name in _OF_SIDES:
            raise ValueError(
                f"--methods: got {name!r} in brackets, wanted other options; use --methods, "
                "--budgets and --protect"
            )
        pairs.append((name, value))
    return tuple(pairs)


def make_eval_sides(
    choices: Sequence[MethodChoice],
    budgets: Sequence[int],
    protections: Sequence[str],
    common: dict[str, Any],
) -> list[EvalSide]:
    """Returns stock and every method x protection x budget, in the order of the tables.

    Args:
        choices: of methods.
        budgets: memory of a request in tokens.
        protections: some of `PROTECTIONS`.
        common: options of all methods, as the JSON object has them.

    Raises:
        ValueError: an unknown method or option, or a budget that leaves nothing to choose.
    """
    sides = [EvalSide(MethodChoice(None))]
    for choice in choices:
        for protect in protections:
            for budget in budgets:
                options = ServerOptions.from_dict(choice.options(common, budget))
                _check_room(EvalSide(choice, budget, protect), options.window)
                sides.append(EvalSide(choice, budget, protect))
    return sides


def check_one_server(choices: Sequence[MethodChoice]) -> None:
    """Refuse methods that no single server can have.

    Raises:
        ValueError: several of them, or an option that requests cannot set.
    """
    names = sorted({choice.name for choice in choices})
    if len(names) > 1:
        raise ValueError(
            f"--methods: got {', '.join(names)} with --base-url, wanted the one method of that "
            "server; start a server for each, or leave --base-url out"
        )
    for choice in choices:
        for name, _ in choice.own:
            if name in OPTIONS and not OPTIONS[name].per_request:
                raise ValueError(
                    f"--methods: got {name!r} in brackets with --base-url, wanted options that a "
                    f"request can set; start the server with {OPTIONS[name].flag} and leave it out"
                )


def _check_room(side: EvalSide, window: int) -> None:
    """Refuse a budget that a long prompt and the window fill."""
    protected = most_protected(side.budget) if side.protect == "prompt" else 0
    if side.budget - protected <= window:
        least = next(b for b in range(window, 5 * window + 5) if b - most_protected(b) > window)
        raise ValueError(
            f"--budgets: got {side.budget} with --protect prompt, wanted at least {least}: up to "
            f"{protected} tokens of a prompt are protected within it, and the rest must exceed "
            f"--window {window}; raise it or lower the window"
        )
