"""From the options of `rkv-vllm eval` to a plan: refuses what cannot be measured.

Runs before any process starts. Next: `rkv_vllm/eval/plan.py`.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rkv_vllm.bench.prompts import load_tokenizer
from rkv_vllm.bench.sides import STOCK, split_engine_flags
from rkv_vllm.cli.checkpoint import Decoder, check_dtype, find_config, read_config, read_decoder
from rkv_vllm.cli.errors import REFUSED, CommandError
from rkv_vllm.eval.plan import Asked, EvalPlan
from rkv_vllm.eval.problems import load_problems
from rkv_vllm.eval.question import Problem, prompt_of
from rkv_vllm.eval.server import Endpoint, ServerError
from rkv_vllm.eval.sides import (
    PROTECTIONS,
    EvalSide,
    MethodChoice,
    check_one_server,
    make_eval_sides,
    read_methods,
)
from rkv_vllm.eval.store import ResultStore
from rkv_vllm.eval.verifier import require_math_verify
from rkv_vllm.fit.refusals import check_model
from rkv_vllm.methods import ModelShape
from rkv_vllm.options import ServerOptions

_NO_SERVER = "leave it out: eval runs the engine itself; to ask a server, use --base-url"
# Flags of vLLM that would contradict what eval decides, with the way out.
_TAKEN = {
    "--model": "name the model before the options",
    "--config": "leave it out: pass the flags of that file one by one",
    "--dtype": "pass --dtype before `--`",
    "--seed": "pass --seed before `--`",
    "--max-model-len": "leave it out: it is the longest prompt plus --max-tokens",
    "--logprobs-mode": "leave it out: --forced compares the odds of the model itself",
    "--kv-compression": "pass --methods before `--`",
    "--kv-budget": "pass --budgets before `--`",
    "--kv-protect": "pass --protect before `--`",
    "--kv-buffer": "pass --buffer before `--`",
    "--kv-window": "pass --window before `--`",
    "--kv-max-request-tokens": "leave it out: sides are told apart by their requests' options",
    "--hf-token": "leave it out: nothing is downloaded, and the command is printed",
    **dict.fromkeys(("--host", "--port", "--uds", "--api-key", "--ssl-keyfile"), _NO_SERVER),
}
# The side of a server that is measured as it is.
_AS_IT_IS = "as it is"


@dataclass(frozen=True)
class EvalOptions:
    """The options of the command, by their names."""

    model: str
    engine_flags: Sequence[str]
    problems: Sequence[str]
    limit: int | None
    methods: str
    budgets: str
    protect: str
    buffer: int
    window: int
    max_tokens: int
    temperature: float
    top_p: float
    samples: int
    seed: int
    forced: bool
    free_running: bool
    rounds: int
    at_once: bool
    dtype: str
    base_url: str | None
    stock_url: str | None

    def check(self) -> None:
        """Refuse what needs neither the model nor a file to be seen as wrong."""
        if not 0 <= self.temperature <= 2:
            raise CommandError(
                f"--temperature: got {self.temperature}, wanted a number from 0 to 2; change it"
            )
        if not 0 < self.top_p <= 1:
            raise CommandError(
                f"--top-p: got {self.top_p}, wanted more than 0 and at most 1; change it"
            )
        if self.samples > 1 and self.temperature == 0:
            raise CommandError(
                f"--samples: got {self.samples} at --temperature 0, wanted 1, because all would be "
                "the same text; raise --temperature, as in --temperature 0.6 --top-p 0.95"
            )
        if not (self.forced or self.free_running):
            raise CommandError(
                "--no-free-running: got it without --forced, wanted something to measure; add "
                "--forced"
            )
        check_dtype(self.dtype)
        self._check_servers()

    def _check_servers(self) -> None:
        if self.base_url is None:
            if self.stock_url is not None:
                raise CommandError(
                    "--stock-url: got it without --base-url, wanted a server to compare with it; "
                    "add --base-url"
                )
            return
        if self.forced:
            raise CommandError(
                "--forced: got it with --base-url, wanted engines of this command, because a "
                "server does not let its clients force tokens; leave out one of the two"
            )
        if self.engine_flags:
            raise CommandError(
                f"ENGINE_FLAGS: got {' '.join(self.engine_flags)} with --base-url, wanted none; "
                "start the server with them"
            )

    @property
    def sampling(self) -> dict[str, float]:
        """As vLLM and servers take it."""
        return {"temperature": self.temperature, "top_p": self.top_p}


def make_plan(options: EvalOptions) -> tuple[EvalPlan, dict[str, Endpoint]]:
    """Returns what is to be measured, and the servers by name of side: none for own engines.

    Raises:
        CommandError: it cannot be measured.
        ValueError: the same, from the options or the problems themselves.
    """
    options.check()
    flags, compression = split_engine_flags(options.engine_flags, "eval", _TAKEN)
    common = {**compression, "buffer": options.buffer, "window": options.window}
    is_as_it_is = options.stock_url is not None
    sides = _as_they_are() if is_as_it_is else _sides(options, common)
    problems = _problems(options)
    if options.base_url is None:
        config = find_config(options.model)
        asked = _ask(config.parent, problems)
    else:
        # The server puts them into its template.
        asked = tuple(Asked(problem, []) for problem in problems)
    plan = EvalPlan(
        model=options.model,
        asked=asked,
        sides=tuple(sides),
        max_tokens=options.max_tokens,
        samples=options.samples,
        seed=options.seed,
        sampling=options.sampling,
        rounds=options.rounds,
        at_once=options.at_once,
        is_free=options.free_running,
        is_forced=options.forced,
        engine_flags=(),
        common=common,
    )
    if options.base_url is not None:
        return plan, _find_servers(options, plan)
    decoder = read_decoder(read_config(config))
    _check_context(plan, decoder.max_positions)
    _check_methods(plan, decoder)
    own = [f"--model={options.model}", f"--dtype={options.dtype}", f"--seed={options.seed}"]
    own += [f"--max-model-len={plan.max_model_len}"]
    max_num_seqs = _max_num_seqs(flags)
    # vLLM's default depends on the device, and each request needs a seat.
    own += [f"--max-num-seqs={max_num_seqs}"]
    return replace(plan, engine_flags=(*own, *flags), max_num_seqs=max_num_seqs), {}


def _sides(options: EvalOptions, common: dict[str, Any]) -> list[EvalSide]:
    choices = read_methods(options.methods)
    if not choices:
        raise CommandError("--methods: got none, wanted at least one; write it like --methods rkv")
    if options.base_url is not None:
        check_one_server(choices)
    protections = [part.strip() for part in options.protect.split(",")]
    for part in protections:
        if part not in PROTECTIONS:
            raise CommandError(
                f"--protect: got {part!r}, wanted some of {', '.join(PROTECTIONS)}; change it"
            )
    budgets = _numbers("--budgets", options.budgets)
    return make_eval_sides(choices, budgets, _once("--protect", protections), common)


def _max_num_seqs(flags: Sequence[str]) -> int:
    """What the flags of the engine say, or our default."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--max-num-seqs", type=int, default=EvalPlan.max_num_seqs)
    try:
        return parser.parse_known_args(flags)[0].max_num_seqs
    except argparse.ArgumentError as error:
        raise CommandError(
            f"ENGINE_FLAGS: got {error}, wanted a number of requests; correct it"
        ) from error


def _as_they_are() -> list[EvalSide]:
    """Two servers, of which the options are not known."""
    return [EvalSide(MethodChoice(None)), EvalSide(MethodChoice(_AS_IT_IS))]


def _numbers(name: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise CommandError(
            f"{name}: got {text!r}, wanted whole numbers of tokens; write it like {name} 128,256"
        )
    return _once(name, [int(part) for part in parts])


def _once(name: str, values: list[Any]) -> list[Any]:
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise CommandError(f"{name}: got {twice[0]} twice, wanted it once; remove one of them")
    return values


def _problems(options: EvalOptions) -> list[Problem]:
    names = _once("--problems", [*options.problems])
    sets = [load_problems(name, limit=options.limit, seed=options.seed) for name in names]
    found = [problem for each in sets for problem in each]
    if any(problem.grader == "math" for problem in found):
        require_math_verify()
    if len({problem.set for problem in found}) < len(names):
        raise CommandError(
            "--problems: got two files of the same name, wanted another name for each; rename one"
        )
    return found


def _ask(folder: Path, problems: Sequence[Problem]) -> tuple[Asked, ...]:
    """The problems in the model's chat template, as token ids: the same for all sides.

    Args:
        folder: of the checkpoint.
        problems: all of them.

    Raises:
        ValueError: there is no tokenizer.
    """
    tokenizer = load_tokenizer(folder)

    def encode(text: str) -> list[int]:
        if not tokenizer.chat_template:
            return list(tokenizer(text).input_ids)
        message = {"role": "user", "content": text}
        text = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        # The template writes the special tokens itself.
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    return tuple(Asked(problem, encode(prompt_of(problem))) for problem in problems)


def _check_context(plan: EvalPlan, context: int | None) -> None:
    """Refuse requests longer than the model; vLLM would, after it has been imported."""
    if context is not None and plan.max_model_len > context:
        raise CommandError(
            f"--max-tokens: got {plan.max_tokens} for prompts of up to "
            f"{plan.max_model_len - plan.max_tokens} tokens, wanted both together within the "
            f"model's context of {context}; lower it"
        )


def _check_methods(plan: EvalPlan, decoder: Decoder) -> None:
    """Refuse files of another model now: stock comes first, and may take an hour."""
    shape = ModelShape(
        name=plan.model,
        num_layers=decoder.num_layers,
        num_query_heads=decoder.num_heads,
        num_kv_heads=decoder.num_kv_heads,
        head_size=decoder.head_size,
    )
    for side in plan.sides:
        if side.budget is not None:
            options = side.choice.options(plan.common, side.budget)
            check_model(shape, ServerOptions.from_dict(options))


def _find_servers(options: EvalOptions, plan: EvalPlan) -> dict[str, Endpoint]:
    """The server of each side, which answers and compresses."""
    try:
        compressing = Endpoint.find("--base-url", options.base_url, options.model)
        compressing.require_compression()
        found = {side.name: compressing for side in plan.sides}
        if options.stock_url is not None:
            found[STOCK] = Endpoint.find("--stock-url", options.stock_url, options.model)
    except ServerError as error:
        raise CommandError(str(error), REFUSED) from error
    return found


def card_options(plan: EvalPlan, options: EvalOptions) -> dict[str, Any]:
    """What the results of a file have in common: those of other values are not comparable.

    Which problems, sides and samples there are may grow from one start to the next.
    """
    servers = {"base_url": options.base_url, "stock_url": options.stock_url}
    return {
        "model": options.model,
        **{name: url for name, url in servers.items() if url is not None},
        "dtype": options.dtype,
        "max_tokens": options.max_tokens,
        "seed": options.seed,
        **options.sampling,
        **{name: plan.common[name] for name in sorted(plan.common)},
        "engine_flags": list(options.engine_flags),
    }


def open_store(path: Path, card: dict[str, Any]) -> ResultStore:
    """The file of results, new or from an earlier start.

    Raises:
        CommandError: it cannot be read or written.
        ValueError: it holds something else.
    """
    try:
        return ResultStore(path, card)
    except OSError as error:
        raise CommandError(
            f"--out: got {error}, wanted a file that can be written; change the path"
        ) from error
