"""From the options of `rkv-vllm eval` to a plan: refuses what cannot be measured.

Runs before any process starts. Next: `rkv_vllm/eval/plan.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rkv_vllm.bench.prompts import load_tokenizer
from rkv_vllm.bench.sides import split_engine_flags
from rkv_vllm.cli.checkpoint import check_dtype, find_config, read_config, read_decoder
from rkv_vllm.cli.errors import CommandError
from rkv_vllm.eval.plan import Asked, EvalPlan
from rkv_vllm.eval.problems import Problem, load_problems, prompt_of
from rkv_vllm.eval.sides import PROTECTIONS, EvalSide, make_eval_sides, read_methods
from rkv_vllm.eval.store import ResultStore
from rkv_vllm.eval.verifier import require_math_verify

_NO_SERVER = "leave it out: eval runs the engine itself; to ask a server, use --base-url"
# Flags of vLLM that would contradict what eval decides, with the way out.
_TAKEN = {
    "--model": "name the model before the options",
    "--config": "leave it out: pass the flags of that file one by one",
    "--dtype": "pass --dtype before `--`",
    "--seed": "pass --seed before `--`",
    "--max-model-len": "leave it out: it is the longest prompt plus --max-tokens",
    "--kv-compression": "pass --methods before `--`",
    "--kv-budget": "pass --budgets before `--`",
    "--kv-protect": "pass --protect before `--`",
    "--kv-buffer": "pass --buffer before `--`",
    "--kv-window": "pass --window before `--`",
    "--kv-max-request-tokens": "leave it out: sides are told apart by their requests' options",
    "--hf-token": "leave it out: nothing is downloaded, and the command is printed",
    **dict.fromkeys(("--host", "--port", "--uds", "--api-key", "--ssl-keyfile"), _NO_SERVER),
}


@dataclass(frozen=True)
class Answering:
    """How outputs are made: the options of `eval` by these names."""

    max_tokens: int
    samples: int
    temperature: float
    top_p: float
    seed: int

    def check(self) -> None:
        """Refuse what cannot be sampled, or would give the same text twice."""
        if not 0 <= self.temperature <= 2:
            raise CommandError(
                f"--temperature: got {self.temperature}, wanted a number from 0 to 2; change it"
            )
        if not 0 < self.top_p <= 1:
            raise CommandError(
                f"--top-p: got {self.top_p}, wanted more than 0, at most 1; change it"
            )
        if self.samples > 1 and self.temperature == 0:
            raise CommandError(
                f"--samples: got {self.samples} at --temperature 0, wanted 1, because all would be "
                "the same text; raise --temperature, as in --temperature 0.6 --top-p 0.95"
            )

    @property
    def sampling(self) -> dict[str, float]:
        """As vLLM and servers take it."""
        return {"temperature": self.temperature, "top_p": self.top_p}


def read_eval_sides(
    methods: str,
    budgets: str,
    protect: str,
    lengths: dict[str, int],
    engine_flags: Sequence[str],
) -> tuple[list[str], dict[str, Any], list[EvalSide]]:
    """Reads what tells the sides apart.

    Args:
        methods: `--methods`.
        budgets: `--budgets`.
        protect: `--protect`.
        lengths: `buffer` and `window` of all methods.
        engine_flags: what follows `--`.

    Returns:
        Flags of all engines, options of the compressed ones, and the sides.

    Raises:
        CommandError: something that makes no sides.
        ValueError: the same, from the options themselves.
    """
    flags, compression = split_engine_flags(engine_flags, "eval", _TAKEN)
    common = {**compression, **lengths}
    choices = read_methods(methods)
    if not choices:
        raise CommandError("--methods: got none, wanted at least one; write it like --methods rkv")
    sides = make_eval_sides(choices, _numbers(budgets), _protections(protect), common)
    return flags, common, sides


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise CommandError(
            f"--budgets: got {text!r}, wanted whole numbers of tokens; write it like "
            "--budgets 128,256"
        )
    return _once("--budgets", [int(part) for part in parts])


def _protections(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if part not in PROTECTIONS:
            raise CommandError(
                f"--protect: got {part!r}, wanted some of {', '.join(PROTECTIONS)}; change it"
            )
    return _once("--protect", parts)


def _once(name: str, values: list[Any]) -> list[Any]:
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise CommandError(f"{name}: got {twice[0]} twice, wanted it once; remove one of them")
    return values


def read_problems(names: Sequence[str], limit: int | None, seed: int) -> list[Problem]:
    """The problems of all sets.

    Raises:
        CommandError: the same set twice.
        ValueError: a set that is not there, or a file with bad lines.
    """
    sets = [load_problems(name, limit=limit, seed=seed) for name in _once("--problems", [*names])]
    found = [problem for each in sets for problem in each]
    if any(problem.grader == "math" for problem in found):
        require_math_verify()
    if len({problem.set for problem in found}) < len(names):
        raise CommandError(
            "--problems: got two files of the same name, wanted another name for each; rename one"
        )
    return found


def ask(folder: Path, problems: Sequence[Problem]) -> tuple[Asked, ...]:
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


def find_model(model: str, dtype: str) -> tuple[Path, int | None]:
    """The folder of a model, and the tokens of its context.

    Raises:
        CommandError: no such model, or no such dtype.
    """
    check_dtype(dtype)
    config = find_config(model)
    return config.parent, read_decoder(read_config(config)).max_positions


def check_context(plan: EvalPlan, context: int | None) -> None:
    """Refuse requests longer than the model; vLLM would, after it has been imported."""
    if context is not None and plan.max_model_len > context:
        raise CommandError(
            f"--max-tokens: got {plan.max_tokens} for prompts of up to "
            f"{plan.max_model_len - plan.max_tokens} tokens, wanted both together within the "
            f"model's context of {context}; lower it"
        )


def card_options(plan: EvalPlan, dtype: str, flags: Sequence[str]) -> dict[str, Any]:
    """What the results of a file have in common: those of other values are not comparable.

    Which problems, sides and samples there are may grow from one start to the next.

    Args:
        plan: the evaluation.
        dtype: of weights and cache.
        flags: of all engines that the user gave.
    """
    return {
        "model": plan.model,
        "dtype": dtype,
        "max_tokens": plan.max_tokens,
        "seed": plan.seed,
        **plan.sampling,
        **{name: plan.common[name] for name in sorted(plan.common)},
        "engine_flags": list(flags),
    }


def check_measured(is_forced: bool, is_free: bool) -> None:
    """Refuse to measure nothing."""
    if not (is_forced or is_free):
        raise CommandError(
            "--no-free-running: got it without --forced, wanted something to measure; add --forced"
        )


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
