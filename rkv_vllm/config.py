"""Former home of `options.py`; goes when nobody imports it."""

from typing import Any

from rkv_vllm import options
from rkv_vllm.options import CONFIG_KEY
from rkv_vllm.options import ServerOptions as KVCompressionConfig

__all__ = ["CONFIG_KEY", "KVCompressionConfig"]


def __getattr__(name: str) -> Any:
    if name == "OPTIONS_BY_NAME":
        return {**options.OPTIONS, **options.flagged_method_options()}
    if name == "OPTIONS":
        return tuple(__getattr__("OPTIONS_BY_NAME").values())
    raise AttributeError(name)
