"""Kernels of one compaction: observe, rkv, select, compact; installed as `rkv_vllm.kernels`.

One folder per operation: `naive.py` is the contract in plain torch, `triton.py` and `cpu.py` beside
it are faster and are tested against it. The ground floor: kernels know tensors and the lengths of
requests, never a method, a scheduler or vLLM, and import nothing of `rkv_vllm` but themselves. Read
`batch.py` next for what one flush hands to all of them, `ops.py` for which version serves,
`paged.py` for how they address a cache, and `rkv_vllm/worker/` for who calls them.
"""
