"""When what two engines say counts as equal. Imports no torch, no vLLM."""

from typing import Any

# Largest difference of a token's log-probability up to where two texts part, and at that place.
# In 16 bits survivors near the cut differ, and texts part; what then has to hold is nearness to
# explicit eviction. Measured on a CPU: float16 0.58, bfloat16 0.91 where texts part.
LOGPROB_TOLERANCE = {"float32": 1e-2, "float16": 1.5, "bfloat16": 2.5}
# How near an engine has to be to explicit eviction, as a share of its distance from a full cache.
NEARER_THAN_FULL = 0.3
# How far stock vLLM may be from transformers; garbage is several nats away.
STOCK_GAP = 1.0

Output = dict[str, Any]


def compare_outputs(got: Output, expected: Output, dtype: str) -> dict[str, Any]:
    """Compare what two engines said.

    In float32 the tokens have to be the same. In bf16 a text may part from the other one at a
    toss-up: the tokens chosen there have log-probabilities within the tolerance of each other.

    Args:
        got: `token_ids` and `logprobs`, one list per request, and `compactions`.
        expected: the same of the other engine.
        dtype: "float32" or "bfloat16".

    Returns:
        `problems`, none when they are equal, and the numbers.
    """
    tolerance = LOGPROB_TOLERANCE[dtype]
    problems, parted, gap = [], [], 0.0
    pairs = zip(got["token_ids"], expected["token_ids"], strict=True)
    for request, (ours, theirs) in enumerate(pairs):
        same = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours)
        )
        until = slice(0, same + 1)
        gaps = [
            abs(a - b)
            for a, b in zip(
                got["logprobs"][request][until], expected["logprobs"][request][until], strict=True
            )
        ]
        gap = max(gap, *gaps)
        if same < len(ours):
            parted.append([request, same])
    if parted and dtype == "float32":
        problems.append(f"tokens differ at [request, token] {parted}")
    if gap > tolerance:
        problems.append(f"log-probabilities differ by {gap:.3g}, wanted at most {tolerance}")
    if got["compactions"] != expected["compactions"]:
        problems.append(f"{got['compactions']} compactions, wanted {expected['compactions']}")
    if not got["compactions"]:
        problems.append("nothing was compacted")
    return {
        "problems": problems,
        "requests": len(got["token_ids"]),
        "parted_at": parted,
        "largest_logprob_gap": gap,
        "compactions": got["compactions"],
    }


def compare_with_reference(got: Output, reference: Output) -> dict[str, Any]:
    """Compare an engine with explicit eviction that was made to say the same text.

    Rounding differs between the two, so nearness is measured by what eviction does: after the first
    compaction the engine's log-probabilities must be those of the evicting reference, not those of
    a full cache.

    Args:
        got: of the engine.
        reference: `logprobs` and `full_logprobs` of the engine's tokens with and without eviction,
            `first_steps` with the step of each request's first compaction, and `compactions`.
    """
    to_evicting, to_full = [], []
    for request, first in enumerate(reference["first_steps"]):
        ours = got["logprobs"][request][first + 1 :]
        for name, gaps in (("logprobs", to_evicting), ("full_logprobs", to_full)):
            theirs = reference[name][request][first + 1 :]
            gaps.extend(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    problems = []
    evicting, full = (sum(gaps) / max(len(gaps), 1) for gaps in (to_evicting, to_full))
    if not evicting < NEARER_THAN_FULL * full:
        problems.append(
            f"mean gap of log-probabilities {evicting:.3g} to explicit eviction, {full:.3g} to a "
            f"full cache; wanted less than {NEARER_THAN_FULL} of that"
        )
    if got["compactions"] != reference["compactions"]:
        problems.append(f"{got['compactions']} compactions, wanted {reference['compactions']}")
    return {
        "problems": problems,
        "mean_gap": evicting,
        "mean_gap_to_full": full,
        "compactions": got["compactions"],
    }


def compare_stock(got: Output, reference: Output) -> dict[str, Any]:
    """Compare stock vLLM with transformers that was made to say the same text.

    Args:
        got: of the engine, without compression.
        reference: `full_logprobs` of the engine's tokens.
    """
    pairs = zip(got["logprobs"], reference["full_logprobs"], strict=True)
    gaps = [abs(a - b) for ours, full in pairs for a, b in zip(ours, full, strict=True)]
    gap, problems = sum(gaps) / len(gaps), []
    if not gap < STOCK_GAP:
        problems.append(
            f"without compression the mean gap of log-probabilities to transformers is {gap:.3g}, "
            f"wanted less than {STOCK_GAP}: vLLM itself goes wrong in this mode"
        )
    return {"problems": problems, "mean_gap_to_full": gap, "compactions": got["compactions"]}
