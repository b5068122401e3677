"""A compressed KV-cache group on the worker's side: its layers, and what its requests have evicted.

The number of evicted tokens has its home here; V2 mirrors it by row. Knows requests by id, not how
they are evicted. Next: layer_set.py for the layers, flush.py for evictions.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from rkv_vllm.methods.base import Method
from rkv_vllm.scheduling.directive import EvictionDirective
from rkv_vllm.worker.layer_set import LayerSet

# Options that requests bring of their own; an object is cheap to make again.
_MAX_METHOD_OBJECTS = 32


class CompressedGroup:
    """The layers of one KV-cache group whose rows are shortened.

    Args:
        group_id: index of the group in vLLM's configuration.
        block_size: tokens per block.
        layer_sets: its layers on this rank; none when a pipeline stage holds none of them.
        make_method: makes a method object for a layer set, of given options or the server's.

    Attributes:
        group_id: see above.
        block_size: see above.
        layer_sets: see above.
        num_compactions: carried out so far.
    """

    def __init__(
        self,
        group_id: int,
        block_size: int,
        layer_sets: Sequence[LayerSet],
        make_method: Callable[[LayerSet, Any | None], Method],
    ) -> None:
        self.group_id = group_id
        self.block_size = block_size
        self.layer_sets = layer_sets
        self.num_compactions = 0
        self._num_evicted: dict[str, int] = {}
        self._methods = lru_cache(_MAX_METHOD_OBJECTS)(
            lambda options: [make_method(layer_set, options) for layer_set in layer_sets]
        )

    @property
    def records_queries(self) -> bool:
        """Whether the method is shown queries."""
        return any(layer_set.ring is not None for layer_set in self.layer_sets)

    def methods(self, options: Any | None) -> list[Method]:
        """The method of each layer set.

        Args:
            options: the method's options of some requests, None for the server's.
        """
        return self._methods(options)

    def num_evicted(self, req_id: str) -> int:
        """Tokens this request's cache is shorter than its text."""
        return self._num_evicted.get(req_id, 0)

    def note(self, directive: EvictionDirective) -> None:
        """A directive of this group has been carried out."""
        self._num_evicted[directive.req_id] = directive.num_evicted_before + directive.num_evict
        self.num_compactions += 1

    def adopt(self, req_id: str, num_evicted: int) -> None:
        """The request comes with a cache that is so many tokens shorter than its text."""
        self._num_evicted[req_id] = num_evicted

    def forget(self, req_id: str) -> None:
        """The request is gone, or starts from zero: physical = logical."""
        self._num_evicted.pop(req_id, None)
