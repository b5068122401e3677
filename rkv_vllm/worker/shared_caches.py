"""Lets attention layers read the cache of an earlier layer, by vLLM's own way of sharing caches.

vLLM has it for models that are made so: a layer with `kv_sharing_target_layer_name` gets no cache,
writes nothing, and attends to what the named layer has written. Here layers of any model are given
such a name, after they are loaded and before vLLM asks them for the cache they need. Next:
rkv_vllm/cache_owners.py for which layers, runner.py for when.
"""

from collections.abc import Mapping

from vllm.model_executor.layers.attention import Attention

from rkv_vllm.methods.base import layer_number

# What a reader takes over: a quantised cache is read with the scales that it was written with.
_SCALES = ("_k_scale", "_v_scale", "_k_scale_float", "_v_scale_float")


def share_caches(layers: Mapping[str, Attention], owners: Mapping[int, int]) -> None:
    """Let layers read others' caches.

    Args:
        layers: all attention layers of the model by name, in its order.
        owners: by number of a layer that reads, the number of the one whose cache it reads.

    Raises:
        ValueError: a layer is missing, or reader and owner are not alike.
    """
    if not owners:
        return
    names: dict[int, str] = {}
    for name in layers:
        # Layers of a draft model come last and may repeat the numbers.
        names.setdefault(layer_number(name), name)
    for reader, owner in owners.items():
        if not {reader, owner} <= names.keys():
            raise ValueError(
                f"--kv-share-layers: got layer {reader} reading layer {owner}, wanted layers of "
                f"full attention, which are {sorted(names)}; correct the file"
            )
        _share(layers[names[reader]], layers[names[owner]])


def _share(reader: Attention, owner: Attention) -> None:
    forms = [_form(layer) for layer in (reader, owner)]
    if forms[0] != forms[1] or owner.kv_sharing_target_layer_name is not None:
        raise ValueError(
            f"--kv-share-layers: got {reader.layer_name} {forms[0]} reading {owner.layer_name} "
            f"{forms[1]}, wanted equal heads and backends, and an owner with a cache of its own; "
            "correct the file"
        )
    for name in _SCALES:
        setattr(reader, name, getattr(owner, name))
    reader.kv_sharing_target_layer_name = owner.layer_name
    # The backends look at their own copy.
    reader.impl.kv_sharing_target_layer_name = owner.layer_name


def _form(layer: Attention) -> tuple[str, int, int, int, str]:
    return (
        layer.attn_backend.get_name(),
        layer.num_kv_heads,
        layer.head_size,
        layer.head_size_v,
        layer.kv_cache_dtype,
    )
