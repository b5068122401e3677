"""The C++ kernels for CPUs (csrc/cpu/), loaded through ctypes.

They are built with the package when a compiler is there. Where they are missing the torch versions
serve; `is_available` tells which. Callers check shapes before they pass pointers.
"""

import ctypes
import sysconfig
from ctypes import POINTER, Structure, c_bool, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

from rkv_vllm.kernels.paged import PagedStates

# DType of csrc/cpu/heads.h.
DTYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 4,
}

# RkvResult of csrc/cpu/paged.h.
_NO_MEMORY = -2
# kInterface there.
_INTERFACE = 4


class _Paged(Structure):
    """RkvPaged of csrc/cpu/paged.h, field by field."""

    _fields_ = (
        ("base", c_void_p),
        ("layer_stride", c_int64),
        ("block_stride", c_int64),
        ("head_stride", c_int64),
        ("num_layers", c_int64),
        ("num_heads", c_int64),
        ("block_size", c_int64),
        ("head_size", c_int64),
        ("token_offsets", c_void_p),
        ("dim_offsets", c_void_p),
    )


def is_available(states: PagedStates) -> bool:
    """Whether the C++ kernels are built and take this cache."""
    return states.device.type == "cpu" and states.dtype in DTYPES and library() is not None


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, None when it was not built."""
    # Of this Python only: another one's build in the same folder may be older.
    path = Path(__file__).with_name(f"_csrc{sysconfig.get_config_var('EXT_SUFFIX')}")
    if not path.exists():
        return None
    # torch is imported above: the library shares the OpenMP runtime that torch loaded.
    loaded = ctypes.CDLL(str(path))
    # Called with other arguments than it was built for, it would compute something else, silently.
    built_for = loaded.rkv_interface() if hasattr(loaded, "rkv_interface") else 1
    if built_for != _INTERFACE:
        raise RuntimeError(
            f"{path.name}: got the C++ kernels of interface {built_for}, wanted {_INTERFACE}: they "
            "were built from other sources; install the project again (`make venv` in its folder, "
            f"or `pip install -e .`), or delete {path}"
        )
    paged = POINTER(_Paged)
    keys = (paged, c_void_p, c_int32, c_int64, c_int64)
    loaded.rkv_importance.restype = c_int64
    loaded.rkv_importance.argtypes = (
        *(*keys, c_void_p, c_void_p, c_void_p),
        *(c_int64, c_int64, c_int64, c_void_p, c_int64, c_bool),
    )
    loaded.rkv_redundancy.restype = c_int64
    loaded.rkv_redundancy.argtypes = (
        *(*keys, c_int64, c_float),
        *(c_void_p, c_int64, c_void_p, c_bool),
    )
    loaded.rkv_attention.restype = c_int64
    loaded.rkv_attention.argtypes = (
        *(*keys, c_void_p, c_void_p, c_void_p),
        *(c_int64, c_int64, c_int64, c_void_p, c_int64),
    )
    loaded.rkv_channel_range.restype = c_int64
    loaded.rkv_channel_range.argtypes = (*keys, c_void_p, c_int64)
    loaded.rkv_select.restype = c_int64
    loaded.rkv_select.argtypes = (
        *(c_void_p, c_int64, c_int64, c_int64, c_int64),
        *(c_int64, c_int64, c_void_p, c_int64, c_void_p),
    )
    loaded.rkv_compact.restype = None
    loaded.rkv_compact.argtypes = (
        *(paged, c_int64, c_void_p, c_void_p),
        *(c_void_p, c_int64, c_int64, c_int64, c_int64, c_int64),
    )
    return loaded


def check_memory(result: int, what: str) -> None:
    """Raise MemoryError when a function of the library had no memory for its scratch."""
    if result == _NO_MEMORY:
        raise MemoryError(f"no memory to {what}")


def paged(states: PagedStates) -> _Paged:
    """Describe a view to C++; valid while `states` lives."""
    tokens, dims = states.offsets
    return _Paged(
        states.cells.data_ptr(),
        *states.cells.stride()[:3],
        states.num_layers,
        states.num_heads,
        states.block_size,
        states.head_size,
        tokens.data_ptr(),
        dims.data_ptr(),
    )
