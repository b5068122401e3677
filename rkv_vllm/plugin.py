"""Entry point of the `vllm.general_plugins` group: what installing this package changes in vLLM.

vLLM calls `register()` in every one of its processes, at times more than once. It replaces the
functions listed in `patches/__init__.py` and nothing else; until a user asks for compression the
replacements hand through to the originals. Read `patches/create_engine_config.py` next.
"""

from rkv_vllm.patches import add_cli_args, create_engine_config

_registered = False


def register() -> None:
    """Adds the flags and the switch for compression to vLLM; a second call does nothing."""
    global _registered
    if _registered:
        return
    add_cli_args.apply()
    create_engine_config.apply()
    _registered = True
