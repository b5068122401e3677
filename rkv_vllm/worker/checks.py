"""Scores that are not finite, found after the fact: nothing waits for the device.

The kernels note the first such head of each request and go on with its newest tokens (SPEC 2); here
the notes are brought to the host, counted and logged. Next: flush.py, which starts a check.
"""

import time
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from rkv_vllm.kernels.batch import ALL_FINITE
from rkv_vllm.log import init_logger

logger = init_logger(__name__)

_SECONDS_BETWEEN_WARNINGS = 10.0


class JudgedLayers(NamedTuple):
    """Layers whose heads were judged in one call.

    Attributes:
        names: the layers.
        num_kv_heads: of each of them.
    """

    names: tuple[str, ...]
    num_kv_heads: int


class FiniteChecks:
    """Counts and logs the compactions of which some head's scores are NaN or infinite.

    Attributes:
        num_found: such compactions, so far as the device has told.
    """

    def __init__(self) -> None:
        self.num_found = 0
        self._on_their_way: deque[_Check] = deque()
        self._warned_at = -_SECONDS_BETWEEN_WARNINGS
        self._num_told = 0

    def start(self, flags: Tensor, calls: list[JudgedLayers], req_ids: list[str]) -> None:
        """Queue a copy on the current stream, behind the kernels that write the flags.

        Args:
            flags: int32 [calls, requests], first such head of each, ALL_FINITE without one.
            calls: what was judged in each call.
            req_ids: the requests.
        """
        event = None
        if flags.device.type != "cpu":
            on_host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            on_host.copy_(flags, non_blocking=True)
            event = torch.Event(flags.device)
            event.record()
            flags = on_host
        self._on_their_way.append(_Check(flags, event, calls, req_ids))

    def examine(self, wait: bool = False) -> None:
        """Take note of the flags that have arrived.

        Args:
            wait: for those on their way as well.
        """
        while self._on_their_way:
            event = self._on_their_way[0].event
            if event is not None and wait:
                event.synchronize()
            elif event is not None and not event.query():
                return
            self._take_note(self._on_their_way.popleft())

    def drop(self) -> None:
        """Forget the flags that are on their way."""
        self._on_their_way.clear()

    def _take_note(self, check: "_Check") -> None:
        found = check.flags != ALL_FINITE
        for request in found.any(dim=0).nonzero().flatten().tolist():
            self.num_found += 1
            call = int(found[:, request].nonzero()[0])
            layers, head = check.calls[call], int(check.flags[call, request])
            self._warn(
                check.req_ids[request],
                layers.names[head // layers.num_kv_heads],
                head % layers.num_kv_heads,
            )

    def _warn(self, req_id: str, layer: str, head: int) -> None:
        now = time.monotonic()
        if now - self._warned_at < _SECONDS_BETWEEN_WARNINGS:
            return
        logger.warning(
            "request %s: scores of layer %s, KV head %d are not finite, so that head keeps its "
            "newest tokens; the model's keys or queries overflow in this dtype (%d such "
            "compactions since the last warning)",
            req_id,
            layer,
            head,
            self.num_found - self._num_told,
        )
        self._warned_at, self._num_told = now, self.num_found


class _Check(NamedTuple):
    """Flags on their way from the device.

    Attributes:
        flags: int32 [calls, requests]; valid behind the event.
        event: the copy's end; None where nothing had to be copied.
        calls: what was judged in each call.
        req_ids: the requests.
    """

    flags: Tensor
    event: torch.Event | None
    calls: list[JudgedLayers]
    req_ids: list[str]
