"""How many compactions a run must have made, from what was asked and what it says of itself.

Next: checks.py, which compares.
"""

import math
from typing import Any

from rkv_vllm.bench.workload import Workload, prompt_compactions

PRESSURE = "pressure"


def expected_compactions(workload: Workload, result: dict[str, Any]) -> tuple[int, int]:
    """Returns the fewest and the most.

    Args:
        workload: what was asked.
        result: of one run.
    """
    budget = result["budget"]
    if budget is None:
        return 0, 0
    if result["when"] == PRESSURE:
        return _under_pressure(workload, budget, result)
    fewest, most = workload.expected_compactions(budget, result.get("drafts", 0))
    if result["deferred"] or result["preemptions"]:
        # A wait shifts all that follow; a preempted request starts over with a longer prompt.
        fewest = 1
        most += result["preemptions"] * _most_of_a_recompute(workload, budget)
    return fewest, most


def _most_of_a_recompute(workload: Workload, budget: int) -> int:
    """Compactions of all the text of a request as its prompt."""
    return max(
        prompt_compactions(total_len, workload.terms(budget, prompt_len), workload.prompt_chunk)[0]
        for prompt_len, total_len in zip(workload.prompt_lens, workload.total_lens, strict=True)
    )


def _under_pressure(workload: Workload, budget: int, result: dict[str, Any]) -> tuple[int, int]:
    """Only those of prompts where the pool holds all requests whole, whatever else is going on.

    Where it cannot hold as many of the shortest as ran at once, at least one.
    """
    blocks = [workload.blocks_of(total_len) for total_len in workload.total_lens]
    fewest, most = 0, 0
    for prompt_len, total_len in zip(workload.prompt_lens, workload.total_lens, strict=True):
        terms = workload.terms(budget, prompt_len)
        fewest += prompt_compactions(prompt_len, terms, workload.prompt_chunk)[0]
        # A compaction evicts at least one token.
        most += max(total_len - terms.prefix_len - terms.budget, 0)
    # The forecast may count a block that a request asks for just before its end.
    if sum(blocks) + len(blocks) <= result["pool_blocks"] // result["engines"]:
        return fewest, fewest
    all_at_once = math.isinf(workload.request_rate) and workload.max_concurrency is None
    if all_at_once and min(blocks) * result["running_peak"] > result["pool_blocks"]:
        fewest = max(fewest, 1)
    return fewest, most * (1 + result["preemptions"])
