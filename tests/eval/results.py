"""A plan and lines of results as the report gets them: no engine, made-up outcomes."""

from typing import Any

import numpy as np

from rkv_vllm.eval.plan import Asked, EvalPlan
from rkv_vllm.eval.question import Problem
from rkv_vllm.eval.sides import EvalSide, MethodChoice, read_methods

STOCK = EvalSide(MethodChoice(None))


def new_side(method: str, budget: int = 128, protect: str = "none") -> EvalSide:
    (choice,) = read_methods(method)
    return EvalSide(choice, budget, protect)


RKV = new_side("rkv[center=true]", 128, "prompt")
OLDEST = new_side("oldest", 128)


def new_plan(sides=(STOCK, RKV, OLDEST), num_problems: int = 40, **changes: Any) -> EvalPlan:
    problems = [Problem("made-up", f"p{i}", "?", "1", "integer") for i in range(num_problems)]
    fields = {
        "model": "folder/of/model",
        "asked": tuple(Asked(problem, [1, 2, 3]) for problem in problems),
        "sides": tuple(sides),
        "max_tokens": 1000,
        "samples": 1,
        "seed": 0,
        "sampling": {"temperature": 0.0, "top_p": 1.0},
        "rounds": 1,
        "at_once": False,
        "is_free": True,
        "is_forced": False,
        "engine_flags": (),
        "common": {},
    }
    return EvalPlan(**{**fields, **changes})


def run_line(side: EvalSide, problem: str, sample: int = 0, **changes: Any) -> dict[str, Any]:
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


def forced_line(side: EvalSide, problem: str, **changes: Any) -> dict[str, Any]:
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


def speed_line(side: EvalSide, seconds: float, number: int = 1, **changes: Any) -> dict[str, Any]:
    names = {"kind": "speed", "side": side.name, "set": "made-up", "round": number}
    return {**names, "seconds": seconds, "output_tokens": 4000, "num_requests": 10, **changes}


def lines_of(
    plan: EvalPlan, chance_of: dict[EvalSide, float], seed: int = 0
) -> list[dict[str, Any]]:
    """Every request of a plan; a side with the larger chance is right wherever another one is."""
    rng = np.random.default_rng(seed)
    hardness = {each.problem.id: rng.random() for each in plan.asked}
    return [
        run_line(side, problem, sample, is_correct=bool(hard < chance_of[side]))
        for problem, hard in hardness.items()
        for sample in range(plan.samples)
        for side in plan.sides
    ]
