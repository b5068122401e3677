"""A plan and lines of results as the report gets them: no engine, made-up outcomes."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rkv_vllm.eval.problems import Problem


@dataclass(frozen=True)
class Side:
    choice: str
    budget: int | None = None
    protect: str = "none"

    @property
    def name(self) -> str:
        if self.budget is None:
            return self.choice
        return f"{self.choice} {self.budget}" + (" +prompt" if self.protect == "prompt" else "")


class Posed(NamedTuple):
    problem: Problem


STOCK = Side("stock")
RKV = Side("rkv[center=true]", 128, "prompt")
OLDEST = Side("oldest", 128)


@dataclass(frozen=True)
class Plan:
    sides: tuple[Side, ...]
    asked: tuple[Posed, ...]
    samples: int = 1
    seed: int = 0
    is_free: bool = True
    is_forced: bool = False

    @property
    def sets(self) -> list[str]:
        return list(dict.fromkeys(each.problem.set for each in self.asked))

    def kinds_of(self, side: Side) -> tuple[str, ...]:
        return ("run",) * (self.is_free or side.budget is None) + ("forced",) * self.is_forced


def new_plan(sides=(STOCK, RKV, OLDEST), num_problems: int = 40, **fields: Any) -> Plan:
    problems = [Problem("made-up", f"p{i}", "?", "1", "integer") for i in range(num_problems)]
    return Plan(tuple(sides), tuple(map(Posed, problems)), **fields)


def run_line(side: Side, problem: str, sample: int = 0, **changes: Any) -> dict[str, Any]:
    """A right answer of 400 tokens."""
    compressed = side.budget is not None
    line = {
        "kind": "run",
        "side": side.name,
        "set": "made-up",
        "problem": problem,
        "sample": sample,
        "seed": sample,
        "prompt_len": 50,
        "output_len": 400,
        "finish": "stop",
        "compactions": 3 if compressed else 0,
        "evicted": 300 if compressed else 0,
        "is_looping": False,
        "is_correct": True,
        "token_ids": [1, 2, 3],
        "text": "Answer: 1",
    }
    return {**line, **changes}


def forced_line(side: Side, problem: str, **changes: Any) -> dict[str, Any]:
    """400 tokens of stock's text, 300 of them after the first compaction."""
    compressed = side.budget is not None
    count = 300 if compressed else 0
    line = {
        "kind": "forced",
        "side": side.name,
        "set": "made-up",
        "problem": problem,
        "sample": 0,
        "num_tokens": count,
        "num_agree": count * 9 // 10,
        "kl": 0.2 * count,
        "nll": 1.1 * count,
        "stock_nll": 0.8 * count,
        "all_num_tokens": 400,
        "all_num_agree": 100 + 270 if compressed else 399,
        "all_kl": 0.2 * count,
        "all_nll": 0.8 * 400 + 0.3 * count,
        "all_stock_nll": 0.8 * 400,
        "compactions": 3 if compressed else 0,
        "evicted": 300 if compressed else 0,
    }
    return {**line, **changes}


def speed_line(side: Side, seconds: float, number: int = 1, **changes: Any) -> dict[str, Any]:
    names = {"kind": "speed", "side": side.name, "set": "made-up", "round": number}
    return {**names, "seconds": seconds, "output_tokens": 4000, "num_requests": 10, **changes}


def lines_of(plan: Plan, chance_of: dict[Side, float], seed: int = 0) -> list[dict[str, Any]]:
    """Every request of a plan; a side with the larger chance is right wherever another one is."""
    rng = np.random.default_rng(seed)
    hardness = {each.problem.id: rng.random() for each in plan.asked}
    return [
        run_line(side, problem, sample, is_correct=bool(hard < chance_of[side]))
        for problem, hard in hardness.items()
        for sample in range(plan.samples)
        for side in plan.sides
    ]
