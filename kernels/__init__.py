"""Kernels of one compaction: observe, score, select, compact; installed as `rkv_vllm.kernels`.

One folder per operation: `naive.py` is the contract in plain torch, `triton.py` and `cpu.py` beside
it are faster and are tested against it. Kernels know tensors, never requests, schedulers or vLLM
objects. Read `eviction.py` next for what one flush hands to all of them, `paged.py` for how they
address a cache, and `rkv_vllm/worker/` for who calls them.
"""
