"""slots: from logical positions to cache slots, physical lengths and places in the query ring.

Runs once per step, outside captured graphs, into buffers whose addresses those graphs hold.
"""

from rkv_vllm.kernels.slots.naive import StepRows, StepSlots

__all__ = ["StepRows", "StepSlots"]
