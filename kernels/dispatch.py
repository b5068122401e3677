"""Which version of the kernels serves a cache: Triton on a GPU, C++ on a CPU, torch elsewhere."""

import logging
from functools import cache
from importlib.util import find_spec
from typing import Literal

from rkv_vllm.kernels import native
from rkv_vllm.kernels.paged import PagedStates

# Below vLLM's own name, because vLLM configures its loggers only; the kernels do not import it.
logger = logging.getLogger(f"vllm.{__name__}")

Backend = Literal["triton", "cpu", "naive"]


def backend(states: PagedStates) -> Backend:
    """Choose the version for this cache; says so once when it is the slow one."""
    if native.is_available(states):
        return "cpu"
    # Triton reports AMD's devices under the name "cuda" as well.
    if states.device.type == "cuda" and _is_plain(states) and find_spec("triton") is not None:
        return "triton"
    _log_fallback(states.device.type, str(states.dtype))
    return "naive"


def _is_plain(states: PagedStates) -> bool:
    """Whether one stride leads from dimension to dimension and at most two to a token."""
    return states.num_token_dims <= 2 and states.cells.dim() == 4 + states.num_token_dims


@cache
def _log_fallback(device: str, dtype: str) -> None:
    logger.warning(
        "No kernel of this installation takes a %s cache on %s: compaction runs in plain torch, "
        "which is slower. On a CPU reinstall rkv-vllm where a C++ compiler is found, on a GPU "
        "install triton",
        dtype,
        device,
    )
