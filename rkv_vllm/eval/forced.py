"""The text of stock vLLM forced through every side, and what it did to each next token's odds.

`ForceTokens` makes vLLM's runner V1 decode given tokens; runner V2 has trace replay for that. Both
report the log-probabilities of the model itself, from before the forcing. `compare` judges two such
passes over the same tokens. Next: engine.py, which runs them.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm import SamplingParams
from vllm.logprobs import FlatLogprobs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from rkv_vllm.fit.overrides import overrides

FORCED_KEY = "kv_forced"
PROCESSOR = "rkv_vllm.eval.forced:ForceTokens"
# Most likely tokens of a step whose probabilities are kept.
NUM_LOGPROBS = 32


class ForceTokens(AdapterLogitsProcessor):
    """Leaves each step of a request one token: that of `extra_args["kv_forced"]`."""

    @overrides("vllm.v1.sample.logits_processor:AdapterLogitsProcessor.is_argmax_invariant")
    def is_argmax_invariant(self) -> bool:
        """False: greedy requests are forced, too."""
        return False

    @overrides("vllm.v1.sample.logits_processor:AdapterLogitsProcessor.new_req_logits_processor")
    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        """What forces a request's logits; None for requests that are free."""
        token_ids = (params.extra_args or {}).get(FORCED_KEY)
        if token_ids is None:
            return None

        def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            # The last step of an asynchronous engine is one too many, and thrown away.
            token_id = token_ids[min(len(output_ids), len(token_ids) - 1)]
            logits.fill_(-torch.inf)
            logits[token_id] = 0
            return logits

        return force


def forced_params(
    token_ids: list[int], seed: int, extra: dict[str, Any], traces: bool
) -> SamplingParams:
    """Returns what makes a request decode given tokens and report the odds of each.

    Args:
        token_ids: the output.
        seed: draws of a method depend on it.
        extra: the request's `extra_args`.
        traces: force by trace replay (runner V2), not by `ForceTokens`.
    """
    if not traces:
        extra = {**extra, FORCED_KEY: token_ids}
    return SamplingParams(
        temperature=0,
        max_tokens=len(token_ids),
        seed=seed,
        ignore_eos=True,
        logprobs=NUM_LOGPROBS,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=extra or None,
        trace_decode_token_ids=token_ids if traces else None,
    )


class ForcedPass(NamedTuple):
    """Log-probabilities of the forced tokens and of the most likely ones.

    Attributes:
        token_ids: int32 [tokens, 1 + K]; column 0 the forced token, then the most likely ones, the
            likeliest first.
        logprobs: float32 [tokens, 1 + K].
    """

    token_ids: np.ndarray
    logprobs: np.ndarray

    @classmethod
    def of(cls, logprobs: FlatLogprobs) -> "ForcedPass":
        """Reads what a request brought back that asked for `NUM_LOGPROBS`."""
        shape = (len(logprobs), -1)
        return cls(
            np.array(logprobs.token_ids, dtype=np.int32).reshape(shape),
            np.array(logprobs.logprobs, dtype=np.float32).reshape(shape),
        )

    def save(self, path: Path) -> None:
        """Write it, at once or not at all."""
        half = path.with_suffix(".new.npz")
        np.savez(half, **self._asdict())
        half.replace(path)

    @classmethod
    def load(cls, path: Path) -> "ForcedPass":
        """Read what `save` wrote."""
        with np.load(path) as arrays:
            return cls(arrays["token_ids"], arrays["logprobs"])


def compare(stock: ForcedPass, side: ForcedPass, first: int | None) -> dict[str, float]:
    """Returns what a side's pass did to the odds of stock's, as sums over tokens.

    Args:
        stock: stock's pass.
        side: the side's, over the same tokens.
        first: index of the first token that was decoded after a compaction; None: there was none.

    Returns:
        `num_tokens`, `num_agree` (the likeliest token is the same), `kl` (of stock from the side in
        nats, a lower bound), `nll` of the forced tokens and stock's `stock_nll`, over the tokens
        from `first`; the same over all tokens with the prefix "all_".
    """
    agree = stock.token_ids[:, 1] == side.token_ids[:, 1]
    kl = kl_bound(stock, side)
    sums = {}
    for prefix, begin in (("", len(agree) if first is None else first), ("all_", 0)):
        sums[f"{prefix}num_tokens"] = len(agree[begin:])
        sums[f"{prefix}num_agree"] = int(agree[begin:].sum())
        sums[f"{prefix}kl"] = float(kl[begin:].sum())
        sums[f"{prefix}nll"] = -float(side.logprobs[begin:, 0].sum(dtype=np.float64))
        sums[f"{prefix}stock_nll"] = -float(stock.logprobs[begin:, 0].sum(dtype=np.float64))
    return sums


def kl_bound(stock: ForcedPass, side: ForcedPass) -> np.ndarray:
    """Lower bound of KL(stock || side), float64 [tokens], in nats.

    The divergence of the two distributions over the tokens whose probability both sides report,
    and one more outcome for all the others: merging outcomes never adds divergence (log-sum
    inequality).
    """
    ids, logp = stock.token_ids, stock.logprobs.astype(np.float64)
    # [tokens, stock's column, side's column]
    same = ids[:, :, None] == side.token_ids[:, None, :]
    known = same.any(axis=2)
    # The forced token counts once where it is among the likeliest, too.
    known[:, 0] &= ~(ids[:, :1] == ids[:, 1:]).any(axis=1)
    found = np.take_along_axis(side.logprobs.astype(np.float64), same.argmax(axis=2), axis=1)
    p = np.where(known, np.exp(logp), 0.0)
    q = np.where(known, np.exp(found), 0.0)
    shared = np.where(known, p * (logp - found), 0.0).sum(axis=1)
    # Rounding can leave less than nothing of the rest.
    rest_p, rest_q = (np.maximum(1 - each.sum(axis=1), 1e-7) for each in (p, q))
    return np.maximum(shared + rest_p * np.log(rest_p / rest_q), 0.0)
