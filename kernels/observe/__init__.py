"""observe: keep the queries of watched rows; the last `window` of them judge a compaction."""

from rkv_vllm.kernels.observe.naive import observe_naive as observe

__all__ = ["observe"]
