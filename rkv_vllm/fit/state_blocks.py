"""How large the blocks of a hybrid model are: one of attention holds as much as one state.

vLLM finds that out when the layers exist. Here it is asked before, by vLLM's own function, so that
a budget that such blocks make pointless is refused before the weights are loaded. Next:
refusals.py, which asks.
"""

import copy
from typing import TYPE_CHECKING

from rkv_vllm.fit.overrides import calls
from rkv_vllm.options import ServerOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@calls("vllm.platforms.interface:Platform._align_hybrid_block_size")
def state_block_size(vllm_config: "VllmConfig") -> int | None:
    """Tokens of a block, where states make it larger than asked for; else None.

    Args:
        vllm_config: finished, not changed here; of any model.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if not vllm_config.model_config.is_hybrid:
        return None
    backend = vllm_config.attention_config.backend
    if backend is None:
        # One block of all others of a GPU is as large, except where one cannot serve the model.
        on_cpu = current_platform.device_type == "cpu"
        backend = AttentionBackendEnum.CPU_ATTN if on_cpu else AttentionBackendEnum.FLASH_ATTN
    asked = vllm_config.cache_config.block_size
    trial = copy.copy(vllm_config)
    trial.cache_config = copy.copy(vllm_config.cache_config)
    current_platform._align_hybrid_block_size(trial, backend.get_class())
    aligned = trial.cache_config.block_size
    return aligned if aligned > asked else None


def check_budget(options: ServerOptions, block_size: int, in_flight: int) -> None:
    """Raises ValueError for a budget smaller than a block of a hybrid model.

    Args:
        options: of the server.
        block_size: tokens, as a state makes it.
        in_flight: tokens of a request that are computed and not settled.
    """
    if options.budget >= block_size:
        return
    beside = options.buffer + in_flight
    num_blocks = -(-(block_size + beside) // block_size)
    fits = num_blocks * block_size - beside
    raise ValueError(
        f"--kv-budget: got {options.budget}, wanted at least {block_size}: this model keeps a "
        f"state beside its attention, for which vLLM makes blocks of {block_size} tokens, and a "
        f"request takes whole blocks; pass --kv-budget {fits}, which with --kv-buffer "
        f"{options.buffer} fills {num_blocks} of them"
    )
