"""compact: move the survivors of an eviction together."""

from rkv_vllm.kernels.compact.naive import compact_naive as compact

__all__ = ["compact"]
