"""What forbids a ratio: requests lost, compactions that do not add up, other outputs than stock's.

Judges the results of runs, knows no process. Next: report.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rkv_vllm.bench.expected import expected_compactions
from rkv_vllm.bench.sides import STOCK
from rkv_vllm.bench.workload import Workload

Result = dict[str, Any]

# With a pool of vLLM's own size the query ring makes ours smaller: a part of the price, unless the
# pool is so small that it decides the comparison.
POOL_TOLERANCE = 0.01


@dataclass
class Measured:
    """What the runs of a benchmark gave, while they go on and afterwards.

    Attributes:
        results: of the runs that finished, in their order.
        refusals: vLLM's reason, by mode and name of a side that did not start.
    """

    results: list[Result] = field(default_factory=list)
    refusals: dict[tuple[str, str], str] = field(default_factory=dict)


def failed_checks(workload: Workload, results: Sequence[Result]) -> list[str]:
    """Returns the reasons why these runs must not be compared; none when all is well.

    Args:
        workload: what every run was asked.
        results: of one mode, each with its `side`, `budget`, `when`, `repeat`, the `pool_tokens` of
            a side with a pool of its own, and whether its text `is_exact`.
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
    pairs = zip(result["output_lens"], workload.output_lens, strict=False)
    if wrong := sorted({pair for pair in pairs if pair[0] not in (0, pair[1])}):
        got, wanted = ([*dict.fromkeys(lens)] for lens in zip(*wrong, strict=True))
        problems.append(f"outputs of {got} tokens, wanted {', '.join(map(str, wanted))}")
    if sorted(result["prompt_lens"]) != sorted(workload.prompt_lens) and not lost:
        problems.append("prompts of other lengths than were sent")
    return problems + _wrong_compactions(workload, result)


def _wrong_compactions(workload: Workload, result: Result) -> list[str]:
    got = result["compactions"]
    fewest, most = expected_compactions(workload, result)
    wanted = f"{most or 'none'}" if fewest == most else f"{fewest} to {most}"
    return [] if fewest <= got <= most else [f"{got} compactions, wanted {wanted}"]


def _differences(workload: Workload, results: Sequence[Result]) -> list[str]:
    """What must be the same in all runs, and is not."""
    stock = next((result for result in results if result["side"] == STOCK), None)
    if stock is None:
        return []
    problems = []
    for result in results:
        where = f"{result['side']}, run {result['repeat']}"
        if result["is_exact"] and result["probe"] != stock["probe"]:
            problems.append(
                f"{where}: a request too short to be compacted got another text than from {STOCK}, "
                f"run {stock['repeat']}"
            )
        wanted, tolerance = stock["pool_blocks"], POOL_TOLERANCE
        if workload.pool_tokens:
            # Engines of data parallelism have a pool each.
            tokens = result["pool_tokens"] or workload.pool_tokens
            wanted, tolerance = tokens // workload.block_size * result["engines"], 0
        elif not result["is_exact"]:
            # Another cache: more blocks in the same memory.
            continue
        if abs(result["pool_blocks"] - wanted) > tolerance * wanted:
            problems.append(f"{where}: a pool of {result['pool_blocks']} blocks, wanted {wanted}")
    return problems
