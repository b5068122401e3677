"""Compacted requests that were preempted: what they held waits in host memory for their return.

A request that was never compacted is recomputed as by stock vLLM, which may find its tokens in the
prefix cache. What an eviction left cannot be computed again, so its blocks, its evicted tokens, the
time of its next compaction and the queries recorded for it are kept, and it goes on as if it had
never left. Tokens in flight at its preemption are kept as well: it comes back when their outputs
have been processed. (Drafts among them may be rejected: then only settled tokens are kept.)

Knows requests, blocks and host blocks, no tensors. Next: directive.py for what the workers are
told, worker/host_cache.py for the copies.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.request import Request

from rkv_vllm.log import init_logger
from rkv_vllm.scheduling.admission import Track
from rkv_vllm.scheduling.directive import StepPlan, SwapDirective
from rkv_vllm.scheduling.host_room import HostRoom
from rkv_vllm.scheduling.publishing import publish_no_more
from rkv_vllm.scheduling.step_stats import FALLBACKS, StepStats

logger = init_logger(__name__)


class _Part(NamedTuple):
    """What a request had in one group; `progress` is its planner's."""

    num_evicted: int
    progress: Any
    host_block_ids: list[int]
    host_window_ids: list[int]


@dataclass(slots=True, eq=False)
class _Absent:
    """A request that is swapped out.

    Attributes:
        num_computed: tokens that it brings along.
        num_in_flight: how many of these were in flight when it left.
        parts: what it had, by group.
    """

    num_computed: int
    num_in_flight: int
    parts: list[_Part]


class SwapSpace:
    """Hands out host blocks, and takes requests out of planners and books and back in.

    Args:
        tracks: the compressed groups.
        managers: vLLM's of all groups; with others than the compressed ones nothing is swapped,
            because a window or a state has moved on by the time its tokens settle.
        room: of the engine.
        has_drafts: whether tokens in flight may be rejected.

    Attributes:
        num_swapped_out: requests copied to host memory so far.
        num_swapped_in: requests copied back so far.
        fallbacks: compacted requests computed again so far, by reason (`FALLBACKS`).
    """

    def __init__(
        self,
        tracks: Sequence[Track],
        managers: Sequence[SingleTypeKVCacheManager],
        room: HostRoom,
        has_drafts: bool,
    ) -> None:
        self._tracks = tracks
        self._managers = managers
        self._room = room
        self._has_drafts = has_drafts
        self._free = list(range(room.num_blocks - 1, -1, -1))
        self._absent: dict[str, _Absent] = {}
        # To be told to the workers with the next step.
        self._saved: dict[str, list[SwapDirective]] = {}
        # Asked in the step at hand whether they can come back.
        self._asked: list[str] = []
        # Of those that came back: computed tokens from which on nothing remembers their absence.
        self._settling: dict[str, int] = {}
        self._is_closed = False
        self._num_told = 0
        self._reported = StepStats()
        self.num_swapped_out = 0
        self.num_swapped_in = 0
        self.fallbacks = dict.fromkeys(FALLBACKS, 0)
        if len(tracks) < len(managers):
            logger.warning(
                "--kv-swap-space: layers with a window or a state cannot be swapped, so preempted "
                "requests of this model compute their text again"
            )

    @property
    def bytes_in_use(self) -> int:
        """Host memory that belongs to a request, over all ranks."""
        return (self._room.num_blocks - len(self._free)) * self._room.block_bytes

    def report(self, step: StepStats) -> None:
        """Write into a message what happened since the last one, and what holds now."""
        step.swapped_out = self.num_swapped_out - self._reported.swapped_out
        step.swapped_in = self.num_swapped_in - self._reported.swapped_in
        earlier = self._reported.recomputed
        step.recomputed = {r: n - earlier.get(r, 0) for r, n in self.fallbacks.items()}
        step.swap_bytes = self.bytes_in_use
        self._reported = StepStats(
            swapped_out=self.num_swapped_out,
            swapped_in=self.num_swapped_in,
            recomputed=dict(self.fallbacks),
        )

    def leave(self, request: Request) -> bool:
        """A request's blocks are about to be freed: preempted, it is swapped out if possible.

        Call it before books and planners forget the request.

        Returns:
            Whether it is swapped out; a compaction booked for it is then carried out first.
        """
        req_id = request.request_id
        self._settling.pop(req_id, None)
        if request.is_finished():
            self._drop(req_id)
            return False
        if not any(req_id in track.books.num_evicted for track in self._tracks):
            return False
        reason = self._why_not(request) or self._save(request)
        if reason:
            self.fallbacks[reason] += 1
        return not reason

    def _why_not(self, request: Request) -> str | None:
        # Stale outputs at this point are those of before a reset, which vLLM drops.
        if self._is_closed or request.num_stale_output_tokens:
            return "reset"
        if len(self._tracks) < len(self._managers):
            return "groups"
        # Then vLLM computes every prompt token, whatever is cached.
        return "prompt_logprobs" if request.skip_reading_prefix_cache else None

    def _save(self, request: Request) -> str | None:
        """Book the copy; returns why it is impossible."""
        req_id = request.request_id
        num_lost = 0
        if self._has_drafts:
            # Of a prefill nothing is rejected.
            prefilled = min(request.num_computed_tokens, request.num_tokens - 1)
            settled = request.num_computed_tokens - request.num_in_flight_tokens
            num_lost = request.num_computed_tokens - max(settled, prefilled)
        num_computed = request.num_computed_tokens - num_lost
        # A decoding request has one token in flight per step; those of its prompt are settled.
        num_decoding = max(0, request.num_computed_tokens - request.num_tokens + 1)
        num_in_flight = min(request.num_in_flight_tokens - num_lost, num_decoding)
        absent = _Absent(num_computed, num_in_flight, [])
        directives = []
        for track in self._tracks:
            books = track.books
            progress = track.planner.leave(req_id)
            if progress is not None and num_lost:
                # What was recorded of rejected drafts is not to be told from the rest.
                progress.seat = None
            num_evicted = books.num_evicted.get(req_id, 0)
            num_blocks = cdiv(num_computed - num_evicted, books.block_size)
            seat = None if progress is None else progress.seat
            num_window = 0 if seat is None else self._room.blocks_per_window
            if num_blocks <= 0 or num_blocks + num_window > len(self._free):
                self._give_back(absent)
                return "space"
            part = _Part(num_evicted, progress, self._take(num_blocks), self._take(num_window))
            absent.parts.append(part)
            block_ids = [block.block_id for block in books.req_to_blocks[req_id][:num_blocks]]
            directives.append(self._directive(req_id, track, part, block_ids, seat))
        self._absent[req_id] = absent
        self._saved[req_id] = directives
        self.num_swapped_out += 1
        return None

    def ask(self, req_id: str) -> int | None:
        """The tokens that a request brings along; None if it is not swapped out.

        From here to `step` the books reckon with them; vLLM allocates its blocks in between, or
        does not.
        """
        absent = self._absent.get(req_id)
        if absent is None:
            return None
        self._asked.append(req_id)
        for part, track in zip(absent.parts, self._tracks, strict=True):
            if part.num_evicted:
                track.books.adopt(req_id, part.num_evicted)
        publish_no_more(self._managers, req_id)
        return absent.num_computed

    def decodes(self, req_id: str) -> bool:
        """Whether a request is swapped out that decoded when it left."""
        absent = self._absent.get(req_id)
        return absent is not None and absent.parts[0].progress is not None

    def num_in_flight(self, request: Request) -> int:
        """Tokens of a request that do not count as settled.

        With steps in flight a token settles when later ones are on their way. One that came back
        starts without these, so for as many steps its newest tokens are taken for in flight: its
        compactions fall on the same tokens, in the same steps, as if it had never left.
        """
        until = self._settling.get(request.request_id, 0)
        return request.num_in_flight_tokens + max(0, until - request.num_computed_tokens)

    def step(
        self, scheduled: Collection[str], requests: Mapping[str, Request], plan: StepPlan
    ) -> None:
        """Tell the workers what to copy before this step; take back in whom vLLM admitted.

        Args:
            scheduled: ids of the requests of this step, counters advanced.
            requests: all requests.
            plan: of this step.
        """
        plan.saved = [each for directives in self._saved.values() for each in directives]
        self._saved.clear()
        num_fallbacks = sum(self.fallbacks.values())
        plan.num_recomputed, self._num_told = num_fallbacks - self._num_told, num_fallbacks
        for req_id, until in list(self._settling.items()):
            if requests[req_id].num_computed_tokens >= until:
                del self._settling[req_id]
        for req_id in self._asked:
            if req_id in scheduled:
                self._restore(requests[req_id], plan)
            else:
                for manager in self._managers:
                    manager.pop_blocks_for_free(req_id)
        self._asked.clear()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Whoever is preempted within computes its text again."""
        self._is_closed = True
        try:
            yield
        finally:
            self._is_closed = False

    def drop_all(self) -> None:
        """Whoever is swapped out computes its text again: what was computed is void."""
        for req_id in list(self._absent):
            self._drop(req_id)
            self.fallbacks["reset"] += 1

    def _restore(self, request: Request, plan: StepPlan) -> None:
        req_id = request.request_id
        absent = self._absent.pop(req_id)
        for part, track in zip(absent.parts, self._tracks, strict=True):
            seat = None
            if part.progress is not None:
                num_computed = request.num_computed_tokens
                seat = track.planner.rejoin(req_id, part.progress, num_computed)
            blocks = track.books.req_to_blocks[req_id][: len(part.host_block_ids)]
            block_ids = [block.block_id for block in blocks]
            plan.restored.append(self._directive(req_id, track, part, block_ids, seat))
        if absent.num_in_flight:
            self._settling[req_id] = absent.num_computed + absent.num_in_flight + 1
        # The workers copy in the order of the steps, so they may be handed out at once.
        self._give_back(absent)
        self.num_swapped_in += 1

    def _directive(
        self, req_id: str, track: Track, part: _Part, block_ids: list[int], seat: int | None
    ) -> SwapDirective:
        return SwapDirective(
            req_id=req_id,
            group_id=track.books.kv_cache_group_id,
            num_evicted=part.num_evicted,
            block_ids=block_ids,
            host_block_ids=part.host_block_ids,
            seat=-1 if seat is None else seat,
            host_window_ids=part.host_window_ids,
        )

    def _drop(self, req_id: str) -> None:
        self._saved.pop(req_id, None)
        absent = self._absent.pop(req_id, None)
        if absent is not None:
            self._give_back(absent)

    def _take(self, count: int) -> list[int]:
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        # Neighbours in rising order, which are copied at once.
        return taken[::-1]

    def _give_back(self, absent: _Absent) -> None:
        for part in absent.parts:
            self._free.extend(reversed(part.host_block_ids))
            self._free.extend(reversed(part.host_window_ids))
