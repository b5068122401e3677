"""Notices when compacted requests run into a loop: counts each once, logs what helps.

A request is looked at when one of its compactions was carried out, and when it ends: some
microseconds for every `buffer` tokens, spread over the steps as the compactions are. Knows request
ids and tokens; what a loop is stands in repetition.py. Next: scheduler.py.
"""

import time
from collections.abc import Sequence

from rkv_vllm.log import init_logger
from rkv_vllm.scheduling.repetition import tail_repeats

logger = init_logger(__name__)

# A server whose requests all loop says so no more often than this.
SECONDS_BETWEEN_LINES = 10.0


class LoopWatch:
    """The compacted requests that live, and which of them have been found in a loop.

    Once found, a request is looked at no more, so one that leaves its loop and enters another
    counts once. One that repeats itself at its first compaction already does not count: nothing had
    been evicted when it began. Preemption changes nothing of it.
    """

    def __init__(self) -> None:
        self._has_looped: dict[str, bool] = {}
        self._next_line_at = 0.0
        self._num_unsaid = 0

    def note_compaction(self, req_id: str, token_ids: Sequence[int]) -> bool:
        """Look at a request of which a compaction was carried out.

        Args:
            req_id: vLLM's request id.
            token_ids: its output so far, as `tail_repeats` takes it.

        Returns:
            Whether it is found in a loop, for the first time.
        """
        if req_id not in self._has_looped:
            self._has_looped[req_id] = tail_repeats(token_ids)
            return False
        return self._look(req_id, token_ids)

    def note_end(self, req_id: str, token_ids: Sequence[int]) -> bool:
        """Look for the last time at a request that finished or was aborted, and forget it.

        Args:
            req_id: vLLM's request id; nothing happens when it was never compacted.
            token_ids: its output.

        Returns:
            Whether it is found in a loop, for the first time.
        """
        is_found = req_id in self._has_looped and self._look(req_id, token_ids)
        self._has_looped.pop(req_id, None)
        return is_found

    def _look(self, req_id: str, token_ids: Sequence[int]) -> bool:
        if self._has_looped[req_id] or not tail_repeats(token_ids):
            return False
        self._has_looped[req_id] = True
        self._say(req_id)
        return True

    def _say(self, req_id: str) -> None:
        now = time.monotonic()
        if now < self._next_line_at:
            self._num_unsaid += 1
            return
        logger.info(
            "request %s began to repeat itself after its KV cache was compacted%s; if many do, too "
            "much is evicted: raise --kv-budget (per request: kv_budget) or keep the prompt with "
            "--kv-protect prompt (kv_protect)",
            req_id,
            f", as did {self._num_unsaid} more since the last such line" * bool(self._num_unsaid),
        )
        self._next_line_at, self._num_unsaid = now + SECONDS_BETWEEN_LINES, 0
