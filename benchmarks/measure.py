"""How the kernel benchmark measures: time, memory beyond the inputs, bandwidth, and the machine."""

import ctypes
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from rkv_vllm.bench.card import cpu_name
from rkv_vllm.fit.versions import installed_version

ROOT = Path(__file__).resolve().parent.parent
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
# Writing it there makes the kernel forget the peak of the resident memory.
_RESET_PEAK = "5"
# About two milliseconds of an H100.
_SLEEP_CYCLES = 4_000_000


class Quantiles(NamedTuple):
    """Milliseconds."""

    p20: float
    p50: float
    p80: float

    def __str__(self) -> str:
        """As the tables show it."""
        return f"{_short(self.p50)} [{_short(self.p20)}, {_short(self.p80)}]"


def _short(milliseconds: float) -> str:
    return f"{milliseconds:.3g}" if milliseconds < 1000 else f"{milliseconds:.0f}"


def quantiles(samples: list[float]) -> Quantiles:
    """p20, p50 and p80; of a single sample three times the same."""
    if len(samples) == 1:
        return Quantiles(samples[0], samples[0], samples[0])
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return Quantiles(cuts[1], cuts[4], cuts[7])


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """One run; on a GPU between two events of the stream, without the time that launching takes."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        # The device sleeps a moment, so that launches queue up: seven small kernels take the host
        # longer to launch than the device to run. A run that waits for the device gains nothing.
        torch.cuda._sleep(_SLEEP_CYCLES)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)


def interleaved(
    runs: dict[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    most: int = 50,
) -> dict[str, Quantiles]:
    """Time several versions in turn, so that a slow moment of the machine meets all of them.

    Args:
        runs: name -> one run.
        device: where they run.
        seconds: start no further round after this long; if a round is shorter, there are at least
            three.
        most: rounds at most.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    started = time.monotonic()
    for number in range(1, most + 1):
        for name, run in runs.items():
            samples[name].append(milliseconds(run, device))
        spent = time.monotonic() - started
        if spent > seconds and (number >= 3 or spent > number * seconds):
            break
    return {name: quantiles(values) for name, values in samples.items()}


def kernel_microseconds(
    run: Callable[[], object], device: torch.device, rounds: int = 20
) -> dict[str, float]:
    """Microseconds of device time that one run spends in each kernel, copies and memsets included.

    Empty on a CPU.
    """
    if device.type != "cuda":
        return {}
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        for _ in range(rounds):
            run()
        torch.cuda.synchronize()
    spent = {event.key: event.device_time_total / rounds for event in profiled.key_averages()}
    return {name: time for name, time in spent.items() if time > 0}


def peak_extra_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Most memory that one run holds beyond what was there before it.

    On a GPU what torch's allocator hands out. On a CPU resident memory, which sees what C++
    allocates too, to about 0.2 MB; None where the kernel does not let us reset the peak.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not os.access(_CLEAR_REFS, os.W_OK):
        return None
    # What earlier runs freed must be gone, or this run would take it up unseen.
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR_REFS.write_text(_RESET_PEAK)
    before = _kibibytes("VmRSS")
    run()
    return max(0, _kibibytes("VmHWM") - before) << 10


def _kibibytes(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+)", _STATUS.read_text())[1])


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes read plus bytes written per second, best of ten plain copies."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(milliseconds(lambda: target.copy_(source), device) for _ in range(10))
    return 2e3 * num_bytes / best


def card(device: torch.device) -> dict[str, str | int | float]:
    """What the numbers depend on."""
    found: dict[str, str | int | float] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # Above the number of CPUs: the machine is busy and the times are rough.
        "load_1_min": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "commit": commit(),
    }
    for name in ("torch", "triton", "vllm", "transformers"):
        found[name] = installed_version(name) or "missing"
    return found


def commit() -> str:
    """The checkout's commit, "unknown" where there is no git or no repository."""
    try:
        command = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
