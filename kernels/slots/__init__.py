"""slots: from logical positions to cache slots, physical lengths and places in the pool.

Runs once per step, outside captured graphs, into buffers whose addresses those graphs hold.
"""

from rkv_vllm.kernels.slots.step import StepRows, StepSlots

__all__ = ["StepRows", "StepSlots"]
