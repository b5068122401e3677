"""What an evaluation asks of all sides alike, and the jobs that are left of it.

Knows no process and no vLLM. Next: session.py, which carries the jobs out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from rkv_vllm.bench.sides import STOCK
from rkv_vllm.eval.question import Problem
from rkv_vllm.eval.sides import EvalSide, MethodChoice
from rkv_vllm.eval.store import FORCED, RUN, Line, ResultStore

# Files in the folder of a job.
JOB, RESULTS, PROGRESS = "job.json", "results.jsonl", "progress"
# One task of a job: requests of one side, one set of problems and one kind.
Task = dict[str, Any]


class Asked(NamedTuple):
    """A problem as the model gets it: token ids of the prompt."""

    problem: Problem
    prompt_ids: list[int]


@dataclass(frozen=True)
class EvalPlan:
    """One evaluation.

    Attributes:
        model: folder or hub id.
        asked: the problems of all sets.
        sides: stock first.
        max_tokens: of an output.
        samples: outputs for each problem.
        seed: of the first sample; the next one has the next.
        sampling: `temperature` and `top_p`.
        rounds: parts of the problems; the sides take turns in each.
        at_once: whether an engine serves all its sides as one batch, and not one by one.
        is_free: whether compressed sides write texts of their own.
        is_forced: whether stock's texts are forced through all sides.
        engine_flags: of all engines.
        common: options of all compressed engines, as the JSON object has them.
        max_num_seqs: requests that an engine runs at once, as its flags say.
    """

    model: str
    asked: tuple[Asked, ...]
    sides: tuple[EvalSide, ...]
    max_tokens: int
    samples: int
    seed: int
    sampling: dict[str, float]
    rounds: int
    at_once: bool
    is_free: bool
    is_forced: bool
    engine_flags: tuple[str, ...]
    common: dict[str, Any]
    max_num_seqs: int = 256

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest request."""
        return max(len(each.prompt_ids) for each in self.asked) + self.max_tokens

    @property
    def sets(self) -> list[str]:
        """Names of the problem sets, in their order."""
        return list(dict.fromkeys(each.problem.set for each in self.asked))

    def kinds_of(self, side: EvalSide) -> tuple[str, ...]:
        """What is wanted of a side: stock's own texts are what all others are compared with."""
        is_free = self.is_free or side.budget is None
        return (RUN,) * is_free + (FORCED,) * self.is_forced

    @property
    def num_results(self) -> int:
        """Requests of all sides together."""
        kinds = sum(len(self.kinds_of(side)) for side in self.sides)
        return kinds * len(self.asked) * self.samples

    def in_round(self, number: int) -> list[Asked]:
        """The problems of a round, which counts from 0: an equal part of each set."""
        found = []
        for name in self.sets:
            own = [each for each in self.asked if each.problem.set == name]
            begin, end = (len(own) * i // self.rounds for i in (number, number + 1))
            found += own[begin:end]
        return found

    def engines_of_round(
        self, number: int, is_stock_first: bool = False
    ) -> list[tuple[MethodChoice, list[EvalSide]]]:
        """Methods with their sides, in the order of a round: it turns round each time.

        Args:
            number: of the round, from 0.
            is_stock_first: stock stays in front, as it does where its texts are forced.
        """
        step = -1 if number % 2 else 1
        sides = self.sides[::step]
        if self.is_forced or is_stock_first:
            sides = tuple(sorted(sides, key=lambda side: side.budget is not None))
        engines: dict[MethodChoice, list[EvalSide]] = {}
        for side in sides:
            engines.setdefault(side.choice, []).append(side)
        return list(engines.items())


def passes_path(folder: Path, set_name: str, problem: str, sample: int) -> Path:
    """Where stock's forced pass over its output lies."""
    name = blake2b(repr((set_name, problem, sample)).encode(), digest_size=12).hexdigest()
    return folder / f"{name}.npz"


def open_tasks(
    plan: EvalPlan, number: int, sides: Sequence[EvalSide], store: ResultStore
) -> list[Task]:
    """Returns what an engine has to do in a round for results that are not there yet.

    Args:
        plan: the evaluation.
        number: of the round, from 0.
        sides: of one engine, in their order.
        store: the results so far; stock's forced passes lie in its folder.
    """
    tasks = []
    for side in sides:
        for kind in plan.kinds_of(side):
            for name in plan.sets:
                asked = [each for each in plan.in_round(number) if each.problem.set == name]
                requests = list(_open_requests(plan, kind, side, asked, store))
                if requests:
                    names = {"kind": kind, "side": side.name, "set": name, "round": number + 1}
                    tasks.append({**names, "requests": requests})
    return tasks


def _open_requests(
    plan: EvalPlan, kind: str, side: EvalSide, asked: Sequence[Asked], store: ResultStore
) -> Iterator[dict[str, Any]]:
    is_stock = side.budget is None
    for problem, prompt_ids in asked:
        for sample in range(plan.samples):
            place = problem.set, problem.id, sample
            passes = passes_path(store.folder, *place)
            done = store.get(kind, side.name, *place)
            if done and not (kind == FORCED and is_stock and not passes.exists()):
                continue
            said = store.get(RUN, STOCK, *place)
            yield {
                "problem": problem.id,
                "sample": sample,
                "seed": plan.seed + sample,
                "prompt": prompt_ids,
                "max_tokens": plan.max_tokens,
                "extra": side.request_options(len(prompt_ids)),
                "forced": _forced(said) if kind == FORCED else None,
                "passes": str(passes),
                "is_stock": is_stock,
            }


def _forced(said: Line | None) -> list[int] | None:
    return None if said is None else said["token_ids"]
