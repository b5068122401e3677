"""Imported by Python at start: puts by hand what kernels that do nothing leave undone.

Sampled tokens are made up (7 for everyone), and a cache layout that cannot be told apart, because
nothing was written, counts as recognised. Flags of scores that are not finite are not read.
"""

import ctypes
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

TOKEN = 7
_PATCHES: dict[str, Callable[[ModuleType], None]] = {}


class _Patched(importlib.abc.Loader):
    """Runs a module's own loader, then its patch."""

    def __init__(self, inner: Any, patch: Callable[[ModuleType], None]) -> None:
        self._inner, self._patch = inner, patch

    def create_module(self, spec):
        return self._inner.create_module(spec)

    def exec_module(self, module):
        self._inner.exec_module(module)
        self._patch(module)

    def __getattr__(self, name):
        return getattr(self._inner, name)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        patch = _PATCHES.pop(name, None)
        if patch is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None:
            spec.loader = _Patched(spec.loader, patch)
        return spec


def _after(name: str) -> Callable[[Callable], Callable]:
    def register(patch):
        _PATCHES[name] = patch
        return patch

    return register


@_after("rkv_vllm.worker.cache_views")
def _take_the_first_layout(module: ModuleType) -> None:
    module._reads_back = lambda *args: True


@_after("rkv_vllm.worker.checks")
def _read_no_flags(module: ModuleType) -> None:
    # torch fills them with a kernel where a flush takes several calls.
    module.FiniteChecks._take_note = lambda self, check: None


@_after("vllm.v1.worker.gpu.model_runner")
def _sample(module: ModuleType) -> None:
    sample = module.GPUModelRunner.sample

    def sampled(self, hidden_states, input_batch, grammar_output):
        import numpy as np

        output, num_sampled, num_rejected = sample(self, hidden_states, input_batch, grammar_output)
        end = input_batch.num_computed_tokens_np + input_batch.num_scheduled_tokens
        put(num_sampled, end >= input_batch.prefill_len_np)
        if num_rejected is not None:
            put(num_rejected, np.zeros(input_batch.num_reqs))
        tokens = [output.sampled_token_ids]
        if output.logprobs_tensors is not None:
            tokens.append(output.logprobs_tensors.logprob_token_ids)
        for tensor in tokens:
            put(tensor, np.full(tensor.shape, TOKEN))
        return output, num_sampled, num_rejected

    def put(tensor, values):
        import numpy as np

        integers = {4: np.int32, 8: np.int64}[tensor.element_size()]
        values = np.ascontiguousarray(values, dtype=integers)
        assert tensor.is_contiguous()
        assert tensor.numel() * tensor.element_size() >= values.nbytes
        ctypes.memmove(tensor.data_ptr(), values.ctypes.data, values.nbytes)

    module.GPUModelRunner.sample = sampled


sys.meta_path.insert(0, _Finder())
