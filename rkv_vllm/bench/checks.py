"""What forbids a ratio: requests lost, compactions that do not add up, other outputs than stock's.

Judges the results of runs, knows no process. Next: report.py.
"""

from collections.abc import Sequence
from typing import Any

from rkv_vllm.bench.sides import STOCK
from rkv_vllm.bench.workload import Workload

Result = dict[str, Any]

# With a pool of vLLM's own size the query ring makes ours smaller: a part of the price, unless the
# pool is so small that it decides the comparison.
POOL_TOLERANCE = 0.01


def failed_checks(workload: Workload, results: Sequence[Result]) -> list[str]:
    """Returns the reasons why these runs must not be compared; none when all is well.

    Args:
        workload: what every run was asked.
        results: of one mode, each with its `side`, `budget` and `repeat`.
    """
    problems = []
    for result in results:
        where = f"{result['side']}, run {result['repeat']}"
        problems += [f"{where}: {problem}" for problem in _problems_of(workload, result)]
    return problems + _differences(workload, results)


def _problems_of(workload: Workload, result: Result) -> list[str]:
    problems = []
    lost = sum(length == 0 for length in result["output_lens"])
    lost += len(workload.prompts) - len(result["output_lens"])
    if lost:
        why = f" ({result['error']})" if result.get("error") else ""
        problems.append(f"{lost} of {len(workload.prompts)} requests lost{why}")
    wrong = {length for length in result["output_lens"] if length} - {workload.output_len}
    if wrong:
        problems.append(f"outputs of {sorted(wrong)} tokens, wanted {workload.output_len}")
    if sorted(result["prompt_lens"]) != sorted(workload.prompt_lens) and not lost:
        problems.append("prompts of other lengths than were sent")
    return problems + _wrong_compactions(workload, result)


def _wrong_compactions(workload: Workload, result: Result) -> list[str]:
    got = result["compactions"]
    if result["budget"] is None:
        return [f"{got} compactions, wanted none"] if got else []
    fewest, most = workload.expected_compactions(result["budget"])
    if result["deferred"] or result["preemptions"]:
        # A wait shifts all that follow; a preempted request starts over with a longer prompt.
        fewest = 1
    wanted = f"{most}" if fewest == most else f"{fewest} to {most}"
    return [] if fewest <= got <= most else [f"{got} compactions, wanted {wanted}"]


def _differences(workload: Workload, results: Sequence[Result]) -> list[str]:
    """What must be the same in all runs, and is not."""
    stock = next((result for result in results if result["side"] == STOCK), None)
    if stock is None:
        return []
    problems = []
    for result in results:
        where = f"{result['side']}, run {result['repeat']}"
        if result["probe"] != stock["probe"]:
            problems.append(
                f"{where}: a request too short to be compacted got another text than from {STOCK}, "
                f"run {stock['repeat']}"
            )
        wanted, tolerance = stock["pool_blocks"], POOL_TOLERANCE
        if workload.pool_tokens:
            # Engines of data parallelism have a pool each.
            wanted, tolerance = workload.pool_blocks * result["engines"], 0
        if abs(result["pool_blocks"] - wanted) > tolerance * wanted:
            problems.append(f"{where}: a pool of {result['pool_blocks']} blocks, wanted {wanted}")
    return problems
