"""Compacts the prompts that reach a boundary with a step, and keeps prefix hits clear of that.

Knows requests, the books and seats; where boundaries lie is `prompt_rule.py`'s affair. Next:
scheduler.py, which asks.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from rkv_vllm.policy import Terms, longest_prefill
from rkv_vllm.scheduling.admission import Track
from rkv_vllm.scheduling.booking import ScheduledRequest, book_eviction
from rkv_vllm.scheduling.directive import StepPlan
from rkv_vllm.scheduling.prompt_rule import PromptRule


class PromptCompactor:
    """Applies the rule of prompts to the requests of an engine.

    Args:
        rule: says where.
        tracks: the compressed groups; their books learn what prompts need.
        requests: all requests that vLLM knows, by id.
        terms_of: what holds for a request in each group; None if its cache is kept whole.
        decodes: whether a request decodes, so that nothing that it computes is a prompt.

    Attributes:
        booked: the requests whose prompt was compacted in the last step.
    """

    def __init__(
        self,
        rule: PromptRule,
        tracks: Sequence[Track],
        requests: Mapping[str, Request],
        terms_of: Callable[[Request], Sequence[Terms] | None],
        decodes: Callable[[str], bool],
    ) -> None:
        self._rule = rule
        self._tracks = tracks
        self._requests = requests
        self._terms_of = terms_of
        self._decodes = decodes
        # Requests compacted in the last step.
        self.booked: list[str] = []
        for index, track in enumerate(tracks):
            track.books.longest_prefill = partial(self._longest_prefill, index)
            track.books.kept_at = partial(self._kept_at, index)

    def cap(self, request: Request, num_computed: int, num_new: int) -> int:
        """How many of the next `num_new` tokens of its prefill a step may compute, perhaps none."""
        if self._decodes(request.request_id):
            return num_new
        return self._rule.cap(self._terms_of(request), request.num_tokens, num_computed, num_new)

    def longest_hit(
        self,
        request: Request,
        hits: Sequence[Sequence[KVCacheBlock]],
        num_tokens: int,
        block_size: int,
    ) -> int:
        """How much of a prefix hit a request may take over.

        Args:
            request: asks to be admitted.
            hits: cached blocks of each KV-cache group.
            num_tokens: that they hold.
            block_size: whose multiple a shorter hit has to be.
        """
        limit = self._rule.longest_hit(self._terms_of(request), request.num_tokens, block_size)
        longest = num_tokens if limit is None else min(num_tokens, limit)
        for track in self._tracks:
            books = track.books
            num_sharable = books.num_sharable(hits[books.kv_cache_group_id])
            if num_sharable < len(hits[books.kv_cache_group_id]):
                longest = min(longest, num_sharable * books.block_size)
        return longest if longest == num_tokens else longest // block_size * block_size

    def compact(
        self,
        req_ids: Iterable[str],
        describe: Callable[[str], ScheduledRequest | None],
        plan: StepPlan,
    ) -> dict[str, int]:
        """Compact the prompts that reach a boundary with this step.

        Call it before anything else is compacted: blocks were set aside for their copies.

        Args:
            req_ids: the requests whose prefill goes on behind this step.
            describe: a request of this step; None if the step does not compute it.
            plan: takes the directives.

        Returns:
            The seats in which their queries are recorded in this step.
        """
        self._rule.begin_step()
        self.booked = []
        seats: dict[str, int] = {}
        num_compacted = 0
        for req_id in req_ids:
            request = self._requests[req_id]
            terms, computed = self._terms_of(request), request.num_computed_tokens
            if not self._rule.is_boundary(terms, request.num_tokens, computed):
                continue
            if self._decodes(req_id):
                continue
            scheduled = describe(req_id)
            if scheduled is None:
                continue
            seat = self._rule.seat(num_compacted)
            num_compacted += 1
            self.booked.append(req_id)
            if seat is not None:
                seats[req_id] = seat
            # Nothing of a prompt can be rolled back, so that nothing of it is in flight.
            settled = scheduled._replace(num_in_flight=0)
            for own, track in zip(terms, self._tracks, strict=True):
                _compact(track, settled, own, seat, plan)
        return seats

    def _longest_prefill(self, index: int, req_id: str) -> int:
        request = self._requests[req_id]
        terms = self._terms_of(request)
        if terms is None:
            return request.num_tokens
        return longest_prefill(terms[index], request.num_tokens)

    def _kept_at(self, index: int, req_id: str, end: int) -> tuple[int, int] | None:
        request = self._requests[req_id]
        terms = self._terms_of(request)
        if not self._rule.is_boundary(terms, request.num_tokens, end) or self._decodes(req_id):
            return None
        own = terms[index]
        return own.prefix_len, own.prefix_len + own.budget


def _compact(
    track: Track, request: ScheduledRequest, terms: Terms, seat: int | None, plan: StepPlan
) -> None:
    books = track.books
    physical_len = request.settled - books.num_evicted.get(request.req_id, 0)
    if physical_len <= terms.prefix_len + terms.budget:
        return
    directive = book_eviction(books.kv_cache_group_id, books, request, terms, seat, "prompt")
    if directive is None:
        raise RuntimeError(
            f"request {request.req_id}: no block for the survivors of its prompt, though blocks "
            "were set aside for them; the bookkeeping is broken"
        )
    plan.directives.append(directive)
