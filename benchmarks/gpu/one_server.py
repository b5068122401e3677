"""Child of verify.py: one engine that serves several loads in turn, with its compactions timed.

A smaller pool is had by taking blocks out of the engine's pool for as long; that saves an engine
start per size. The loads are run and counted by `rkv_vllm/bench/offline.py`.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from one_engine import make_model

import rkv_vllm
from rkv_vllm.bench.offline import run_job


def main() -> None:
    """Serve every load; the result grows with each, so that a crash loses only the rest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--job", type=Path, required=True, help="JSON, as `run_job` takes it")
    parser.add_argument("--make-model", type=Path, help="a random one, when missing")
    args = parser.parse_args()
    if args.make_model:
        make_model(args.make_model)
    job = json.loads(args.job.read_text())
    flushes = FlushTimes() if job["is_compressed"] else None
    runs = []
    for run in run_job(job, lambda share: print(f"{share:.0%}", file=sys.stderr, flush=True)):
        if flushes is not None:
            run |= flushes.take(run["seconds"])
        runs.append(run)
        args.result.write_text(json.dumps({"package": rkv_vllm.__file__, "runs": runs}))


class FlushTimes:
    """What flushes take, on the host and on the device."""

    def __init__(self) -> None:
        from rkv_vllm.worker.flush import Compactor

        self._events: list[tuple[torch.Event, torch.Event]] = []
        self._host_seconds = 0.0
        self._inner = Compactor.flush
        Compactor.flush = lambda *args: self._timed(*args)

    def take(self, seconds: float) -> dict[str, float]:
        """Times since the last call, and the device's share of a run of `seconds`."""
        device_ms = 1e3 * self._host_seconds
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            device_ms = sum(start.elapsed_time(end) for start, end in self._events)
        found = {
            "flush_host_ms": 1e3 * self._host_seconds,
            "flush_device_ms": device_ms,
            "flush_share": device_ms / 1e3 / seconds,
        }
        self._events, self._host_seconds = [], 0.0
        return found

    def _timed(self, *args: object) -> object:
        events = ()
        if torch.cuda.is_available():
            events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
            events[0].record()
        started = time.perf_counter()
        done = self._inner(*args)
        if done:
            self._host_seconds += time.perf_counter() - started
            if events:
                events[1].record()
                self._events.append(events)
        return done


if __name__ == "__main__":
    main()
