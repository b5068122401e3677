"""Kernels of one compaction: observe, score, select, compact; installed as `rkv_vllm.kernels`.

One folder per operation: `naive.py` is the contract in plain torch, the files beside it are faster
and are tested against it. Kernels know tensors, never requests, schedulers or vLLM objects.
Read `rkv_vllm/worker/` next to see who calls them.
"""
