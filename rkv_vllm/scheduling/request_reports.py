"""What compression did to the requests that want to know: counted here, read by their clients.

The numbers of one request go into a field of its response that vLLM has for KV connectors, which
compression refuses beside it, and into one line of the log when it ends: streamed responses have no
such field, and a client that hangs up gets none. Knows no request that did not ask. Next:
request_options.py for the key.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from vllm.v1.engine import EngineCoreOutput
from vllm.v1.request import Request

from rkv_vllm.log import init_logger
from rkv_vllm.request_options import REPORT_KEY
from rkv_vllm.scheduling.directive import EvictionDirective

logger = init_logger(__name__)


@dataclass(slots=True)
class _Count:
    request: Request
    compactions: int = 0
    evicted_tokens: int = 0


class RequestReports:
    """Counts for the requests that asked, like the counters of /metrics.

    Args:
        evicted_now: tokens that a request's cache lacks in each compressed group, without those of
            compactions that are booked and not carried out yet.
    """

    def __init__(self, evicted_now: Callable[[str], Sequence[int]]) -> None:
        self._evicted_now = evicted_now
        self._counts: dict[str, _Count] = {}
        # Of requests that ended since the last outputs were made.
        self._ended: dict[str, dict[str, int | str]] = {}

    def __bool__(self) -> bool:
        """Whether anybody asked."""
        return bool(self._counts or self._ended)

    def begin(self, request: Request) -> None:
        """Count for a request from now on."""
        self._counts[request.request_id] = _Count(request)

    def note_compactions(self, carried_out: Iterable[EvictionDirective]) -> None:
        """Count compactions of all requests that the workers carry out."""
        for directive in carried_out:
            count = self._counts.get(directive.req_id)
            if count is not None:
                count.compactions += 1
                count.evicted_tokens += directive.num_evict

    def end(self, req_id: str) -> None:
        """Log the report of a request that has ended; call it before its blocks are freed."""
        count = self._counts.get(req_id)
        if count is None:
            return
        report = self._ended[req_id] = self._report(count)
        del self._counts[req_id]
        reason = count.request.get_finished_reason()
        logger.info("%s: %s", REPORT_KEY, json.dumps({**report, "finish_reason": str(reason)}))

    def attach(self, outputs: Iterable[EngineCoreOutput]) -> None:
        """Put the reports as they are now into what the clients' API servers get of a step.

        Not only those of requests that end: a stop string ends one in the API server, which then
        answers with the output that it has.
        """
        for output in outputs:
            report = self._ended.get(output.request_id)
            if report is None and output.request_id in self._counts:
                report = self._report(self._counts[output.request_id])
            if report is not None:
                output.kv_transfer_params = {REPORT_KEY: report}
        self._ended.clear()

    def _report(self, count: _Count) -> dict[str, int | str]:
        request = count.request
        # The newest token is computed by the next step, if there is one.
        num_computed = min(request.num_computed_tokens, request.num_tokens - 1)
        evicted = self._evicted_now(request.request_id)
        return {
            "request_id": request.request_id,
            "compactions": count.compactions,
            "evicted_tokens": count.evicted_tokens,
            "kept_tokens": max(0, num_computed - sum(evicted) // len(evicted)),
            "preemptions": request.num_preemptions,
        }
