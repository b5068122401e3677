"""Loggers that vLLM shows: it configures those below its own name only."""

from logging import Logger


def init_logger(name: str) -> Logger:
    """Returns vLLM's logger for one of our modules (`name` is its `__name__`)."""
    from vllm.logger import init_logger as vllm_init_logger

    return vllm_init_logger(f"vllm.{name}")
