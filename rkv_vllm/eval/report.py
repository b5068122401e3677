"""From the lines of results to one JSON document: every side, what it lost against stock, checks.

A side is compared with stock over the requests that both finished. A side that never compacted
anything measures nothing but stock: it is refused. Next: tables.py, which prints the document;
plot.py, which draws it.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from math import isinf
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from rkv_vllm.bench.sides import STOCK
from rkv_vllm.eval.sides import most_protected
from rkv_vllm.eval.statistics import Interval, paired_bootstrap, pooled_interval, share_interval
from rkv_vllm.eval.store import FORCED, RUN, SPEED, Line

if TYPE_CHECKING:
    from rkv_vllm.eval.plan import EvalPlan
    from rkv_vllm.eval.sides import EvalSide

# Lines of one side, set and kind, by problem and sample.
_Runs = dict[tuple[str, int], Line]
_Sides = dict["EvalSide", _Runs]
_OF_FORCED = " of forced text"
_SUMMED = ("seconds", "output_tokens", "num_requests")


def make_document(
    card: dict[str, Any], plan: "EvalPlan", lines: Iterable[Line], failure: str | None = None
) -> dict[str, Any]:
    """Returns the whole answer as plain JSON.

    Args:
        card: what the numbers depend on.
        plan: what was asked; other results that the file holds are left out.
        lines: of the results; of several for one request the last one counts.
        failure: why not all runs finished, None when they did.
    """
    lines = list(lines)
    results = []
    for name in plan.sets:
        of_set = [line for line in lines if line.get("set") == name]
        free = _runs(plan, RUN, name, of_set)
        forced = _runs(plan, FORCED, name, of_set)
        sides, checks = _usable(free, "")
        forced_sides, forced_checks = _usable(forced, _OF_FORCED)
        results.append(
            {
                "set": name,
                "num_problems": sum(each.problem.set == name for each in plan.asked),
                "num_samples": plan.samples,
                "sides": _free_sides(sides, plan.seed),
                "forced": _forced_sides(forced_sides, plan.seed),
                "speeds": _speeds(sides, of_set),
                "protected": _protected(plan, free),
                "failed_checks": checks + forced_checks,
                "unfinished": _unfinished(plan, name, "", free)
                + _unfinished(plan, name, _OF_FORCED, forced),
            }
        )
    return {"card": card, "seed": plan.seed, "failure": failure, "results": results}


def has_failed(document: dict[str, Any]) -> bool:
    """Returns whether the command has to end with exit code 1: a check failed somewhere."""
    return any(result["failed_checks"] for result in document["results"])


def _runs(plan: "EvalPlan", kind: str, name: str, lines: Sequence[Line]) -> _Sides:
    """What the sides finished of what was asked of them."""
    wanted = _wanted(plan, name)
    found: _Sides = {side: {} for side in plan.sides if kind in plan.kinds_of(side)}
    by_name = {side.name: runs for side, runs in found.items()}
    for line in lines:
        if line["kind"] == kind and line["side"] in by_name:
            place = (line["problem"], line["sample"])
            if place in wanted:
                by_name[line["side"]][place] = line
    return found


def _wanted(plan: "EvalPlan", name: str) -> set[tuple[str, int]]:
    ids = [each.problem.id for each in plan.asked if each.problem.set == name]
    return {(problem, sample) for problem in ids for sample in range(plan.samples)}


def _unfinished(plan: "EvalPlan", name: str, what: str, sides: _Sides) -> list[str]:
    wanted = len(_wanted(plan, name))
    return [
        f"{side.name}: {len(runs)} of {wanted} requests{what} finished"
        for side, runs in sides.items()
        if len(runs) < wanted
    ]


def _usable(sides: _Sides, what: str) -> tuple[_Sides, list[str]]:
    """The sides that mean something, and what is wrong with the others."""
    problems, usable = [], {}
    for side, runs in sides.items():
        count = sum(run["compactions"] for run in runs.values())
        if side.name == STOCK and count:
            # Nothing can be compared with it.
            return {}, [f"{STOCK}: {count} compactions{what}, wanted none"]
        if side.name != STOCK and runs and not count:
            problems.append(
                f"{side.name}: 0 compactions in {len(runs)} requests{what}, so it is no compressed "
                "side and has no numbers; lower its budget or --kv-buffer, or take longer problems"
            )
        elif runs:
            usable[side] = runs
            problems += _kept_too_much(side, runs, what) if side.name != STOCK else []
    return usable, problems


def _kept_too_much(side: "EvalSide", runs: _Runs, what: str) -> Iterator[str]:
    """Why requests saw more of their text than the budget, which makes a side look better."""
    # Servers do not tell.
    preempted = sum(bool(run.get("preemptions")) for run in runs.values())
    if preempted:
        yield (
            f"{side.name}: {preempted} requests{what} were preempted and computed again from their "
            "whole text; give the pool more memory or lower --max-num-seqs"
        )
    if deferred := max(run.get("deferred", 0) for run in runs.values()):
        yield (
            f"{side.name}: {deferred} compactions{what} of a batch had to wait while requests grew "
            "beyond the budget; raise --kv-seats, or give the pool more memory"
        )


def _protected(plan: "EvalPlan", free: _Sides) -> dict[str, dict[str, float]]:
    """By budget, what of the prompts is protected: tokens on average, and the share of whole ones.

    Prompts are as long on every side, and stock's answers tell how long.
    """
    prompts = [
        run["prompt_len"]
        for side, runs in free.items()
        if side.name == STOCK
        for run in runs.values()
    ]
    budgets = sorted({side.budget for side in plan.sides if side.protect == "prompt"})
    return {
        str(budget): {
            "most_tokens": most_protected(budget),
            "tokens": fmean(min(length, most_protected(budget)) for length in prompts),
            "whole": fmean(length <= most_protected(budget) for length in prompts),
        }
        for budget in budgets
        if prompts
    }


def _of_side(side: "EvalSide") -> dict[str, Any]:
    return {
        "side": side.name,
        "method": str(side.choice),
        "budget": side.budget,
        "protect": side.protect,
    }


def _free_sides(sides: _Sides, seed: int) -> list[dict[str, Any]]:
    stock = next((runs for side, runs in sides.items() if side.name == STOCK), {})
    found = []
    for side, own in sides.items():
        runs = {place: run for place, run in own.items() if place in stock or not stock}
        if not runs:
            continue
        summary = {**_of_side(side), **_summary(runs)}
        if side.name != STOCK and stock:
            summary["against_stock"] = _against(runs, {place: stock[place] for place in runs}, seed)
        found.append(summary)
    return found


def _summary(runs: _Runs) -> dict[str, Any]:
    all_runs = runs.values()
    # A server that is not vLLM tells no tokens, and so no loops.
    looping = [run["is_looping"] for run in all_runs if run["is_looping"] is not None]
    return {
        "num_problems": len({problem for problem, _ in runs}),
        "num_requests": len(runs),
        "accuracy": plain(share_interval(_by_problem(runs, _score))),
        "output_len": fmean(run["output_len"] for run in all_runs),
        "cut_off": fmean(run["finish"] == "length" for run in all_runs),
        "looping": fmean(looping) if looping else None,
        "ungraded": fmean(run["is_correct"] is None for run in all_runs),
        "compactions": fmean(run["compactions"] for run in all_runs),
        "compacted": fmean(run["compactions"] > 0 for run in all_runs),
        "evicted": fmean(run["evicted"] for run in all_runs),
        "preemptions": sum(run.get("preemptions", 0) for run in all_runs),
    }


def _against(ours: _Runs, stock: _Runs, seed: int) -> dict[str, Any]:
    right = paired_bootstrap(_by_problem(stock, _score), _by_problem(ours, _score), seed=seed)
    lengths = paired_bootstrap(_by_problem(stock, _length), _by_problem(ours, _length), seed=seed)
    return {
        "num_problems": right.num_problems,
        "difference": plain(right.difference),
        "ratio": plain(right.ratio),
        "output_len_ratio": plain(lengths.ratio),
    }


def _score(run: Line) -> float:
    """What cannot be graded counts as wrong."""
    return float(run["is_correct"] is True)


def _length(run: Line) -> float:
    return float(run["output_len"])


def _by_problem(runs: _Runs, value_of: Any) -> dict[str, list[float]]:
    values: dict[str, list[float]] = defaultdict(list)
    # In one order, whichever request ended first: a seed has to give the same draws.
    for (problem, _), run in sorted(runs.items()):
        values[problem].append(value_of(run))
    return values


def _speeds(sides: _Sides, lines: Sequence[Line]) -> dict[str, Any]:
    """Tokens per second by side; over stock's, each round against stock's of the same round."""
    rounds: dict[str, dict[int, Counter[str]]] = {side.name: {} for side in sides}
    for line in lines:
        if line["kind"] == SPEED and line["side"] in rounds:
            # A round that went on after a break has several.
            total = rounds[line["side"]].setdefault(line["round"], Counter())
            total.update({name: line[name] for name in _SUMMED})
    stock = rounds.get(STOCK, {})
    found = {}
    for name, own in rounds.items():
        if not own:
            continue
        pairs = [
            _tokens_per_s(own[number]) / _tokens_per_s(stock[number])
            for number in sorted(own.keys() & stock.keys())
            # What was cut off in a break is not in the sums.
            if own[number]["num_requests"] == stock[number]["num_requests"]
        ]
        found[name] = {
            "tokens_per_s": _tokens_per_s(sum(own.values(), Counter())),
            "pairs": pairs,
            "ratio": median(pairs) if pairs else None,
        }
    return found


def _tokens_per_s(total: Counter[str]) -> float:
    return total["output_tokens"] / total["seconds"]


def _forced_sides(sides: _Sides, seed: int) -> list[dict[str, Any]]:
    """What each side did to the odds of stock's text, over the tokens after its first compaction.

    Of stock itself it says in "all_agreement" how far a text that is forced differs from the same
    text written freely: what batches of another shape do.
    """
    found = []
    for side, runs in sides.items():
        shown = {**_of_side(side), "num_requests": len(runs)}
        for prefix in ("", "all_"):
            tokens = _by_problem(runs, lambda run, p=prefix: run[f"{p}num_tokens"])
            shown[f"{prefix}num_tokens"] = sum(map(sum, tokens.values()))
            sums = {
                "agreement": lambda run, p=prefix: run[f"{p}num_agree"],
                "kl": lambda run, p=prefix: run[f"{p}kl"],
                "nll_difference": lambda run, p=prefix: run[f"{p}nll"] - run[f"{p}stock_nll"],
            }
            for name, sum_of in sums.items():
                interval = pooled_interval(_by_problem(runs, sum_of), tokens, seed=seed)
                shown[prefix + name] = plain(interval)
        for name in ("compactions", "evicted"):
            shown[name] = fmean(run[name] for run in runs.values())
        shown["preemptions"] = sum(run.get("preemptions", 0) for run in runs.values())
        found.append(shown)
    return found


def plain(interval: Interval | None) -> dict[str, float | None] | None:
    """An interval as JSON, which knows no infinity."""
    if interval is None:
        return None
    return {
        name: None if value is None or isinf(value) else value
        for name, value in interval._asdict().items()
    }
