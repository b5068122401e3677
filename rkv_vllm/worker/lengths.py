"""The rows of one compressed group in one step: how long each cache is, which tokens are recorded.

vLLM computes with logical lengths; only attention and the slots see the physical ones kept here.
Knows tensors in batch order, neither requests nor directives. Next: attention_group.py, which hands
these lengths to attention.
"""

import numpy as np
import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata


class DraftRows:
    """Which tokens of a draft model's forwards are recorded.

    Its first forward after a step computes the tokens of that step, or these and some between
    them; each later one computes one token per request.

    Args:
        max_num_tokens: most tokens of a forward.
        device: where the model runs.

    Attributes:
        token_rows: int32 [max_num_tokens], as in `GroupRows`. Graphs hold its address.
        records: likewise.
    """

    def __init__(self, max_num_tokens: int, device: torch.device) -> None:
        self.token_rows = torch.full((max_num_tokens,), -1, dtype=torch.int32, device=device)
        self.records = True

    def begin_step(self, rows: "GroupRows") -> None:
        """The next forward may compute the tokens of the step, with its slots."""
        self.records = rows.records
        self.token_rows[: rows.token_rows.shape[0]].copy_(rows.token_rows)

    def end_step(self) -> None:
        """Nothing that follows, up to the next `begin_step`, belongs to a request."""
        self.records = True
        self.token_rows.fill_(-1)


class GroupRows:
    """The rows of one compressed group.

    Between `end_step` and the next `begin_step` they belong to nobody: vLLM captures graphs and
    runs dummy batches then, whose row numbers coincide with those of live requests.

    Args:
        max_num_reqs: most rows of a step.
        max_num_tokens: most tokens of a step.
        ring_len: positions per seat of the query ring.
        device: where the model runs.

    Attributes:
        seq_lens: int32 [max_num_reqs], physical lengths in batch order. Attention reads this one
            buffer in captured, dummy and real runs: graphs hold its address.
        token_rows: int32 [max_num_tokens], where each token's query is recorded, -1 = nowhere
            (`observe_naive` has the formula). Graphs hold its address.
        ring_len: see above.
        draft: the same for layers of a draft model.
        records: False where it is known on the host that no token of the step is recorded, so that
            its layers need not look; captured graphs always look.
    """

    def __init__(
        self, max_num_reqs: int, max_num_tokens: int, ring_len: int, device: torch.device
    ) -> None:
        self.seq_lens = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        self.token_rows = torch.full((max_num_tokens,), -1, dtype=torch.int32, device=device)
        self.ring_len = ring_len
        # Some speculators compute one token more of each request.
        self.draft = DraftRows(max_num_tokens + max_num_reqs, device)
        self.records = True
        self._num_evicted: Tensor | None = None
        self._subtracts = False

    def begin_step(self, num_evicted: Tensor, *, subtract: bool) -> None:
        """The next attention metadata is that of a real step.

        Args:
            num_evicted: int32 [rows of the step] on the host, tokens evicted from each request.
            subtract: whether `seq_lens` is still to be filled; a kernel may have done it.
        """
        self._num_evicted = num_evicted
        self._subtracts = subtract

    def end_step(self) -> None:
        """Nothing that follows, up to the next `begin_step`, belongs to a request."""
        self._num_evicted = None
        # Graphs are captured with everything that a later step may need.
        self.records = True
        self.token_rows.fill_(-1)

    def watch(self, rows: list[tuple[int, int, int, int]]) -> None:
        """Say which tokens of the coming forward to record, all others not; on a CPU.

        Args:
            rows: one (seat, first token index, number of tokens, first logical position) per
                watched request. Of a row longer than the ring its last tokens are recorded.
        """
        self.records = bool(rows)
        self.token_rows.fill_(-1)
        token_rows = self.token_rows.numpy()
        for seat, first_token, num_tokens, first_position in rows:
            recorded = np.arange(max(0, num_tokens - self.ring_len), num_tokens)
            ring_idx = (first_position + recorded) % self.ring_len
            token_rows[first_token + recorded] = seat * self.ring_len + ring_idx

    def apply(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """The same metadata with this group's lengths, for attention alone."""
        seq_lens = self.seq_lens[: common.seq_lens.shape[0]]
        evicted = self._num_evicted
        if evicted is None:
            seq_lens.copy_(common.seq_lens)
            return common.replace(seq_lens=seq_lens, _num_computed_tokens_cache=None)
        num_reqs = evicted.shape[0]
        if self._subtracts:
            seq_lens.copy_(common.seq_lens)
            seq_lens[:num_reqs] -= evicted.to(seq_lens.device)
        upper_bound = common.seq_lens_cpu_upper_bound.clone()
        upper_bound[:num_reqs] -= evicted
        return common.replace(
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=upper_bound,
            max_seq_len=int(upper_bound[:num_reqs].max()),
            _num_computed_tokens_cache=None,
        )
