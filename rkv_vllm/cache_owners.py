"""Layers that read another layer's KV cache in place of one of their own.

A file names for each such layer, the reader, the one whose cache it reads, the owner: a layer
before it that has its own. Only owners take memory, so the pool holds more tokens. Knows no vLLM;
`rkv_vllm/calibrate/kvsharer.py` makes such a file, worker/shared_caches.py obeys it.

Source: KVSharer: Efficient Inference via Layer-Wise Dissimilar KV Cache Sharing (arXiv:2410.18517).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rkv_vllm.model_file import check_model, write_model_file
from rkv_vllm.option_field import OptionError

NONE = "none"
LABEL = "--kv-share-layers (share_layers)"

# Characters of an inlined file that an error repeats.
_MOST_SHOWN = 200


def inline(setting: str) -> str:
    """Returns the content of a file as one line of JSON; `none` and JSON stay as they are.

    Processes on other machines then need no file, and vLLM, which tells compiled graphs apart by
    the options, sees a change of it: a graph has no place for the keys of a reader.

    Args:
        setting: of `--kv-share-layers`.

    Raises:
        OptionError: it is no file of JSON.
    """
    if setting == NONE or setting.lstrip().startswith("{"):
        return setting
    try:
        return json.dumps(json.loads(Path(setting).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise _refusal(setting, "MODEL", f"it cannot be read ({error})") from error


def owners_of_readers(setting: str, model: str, num_layers: int) -> dict[int, int]:
    """Returns the owner of each layer that has no cache of its own.

    Args:
        setting: of `--kv-share-layers`: `none`, a path or JSON.
        model: folder or hub id.
        num_layers: of the whole model.

    Raises:
        OptionError: the file does not fit the model.
    """
    if setting == NONE:
        return {}

    def refuse(got: str) -> OptionError:
        return _refusal(setting, model, got)

    try:
        document = json.loads(inline(setting))
    except ValueError as error:
        raise refuse(f"it is no JSON ({error})") from error
    owners = _parse(document)
    if isinstance(owners, str):
        raise refuse(owners)
    check_model(document, model, num_layers, refuse)
    for reader, owner in owners.items():
        if not 0 <= owner < reader < num_layers:
            raise refuse(
                f"layer {reader} reads layer {owner}, not one before it of layers 0 to "
                f"{num_layers - 1}"
            )
        if owner in owners:
            raise refuse(f"layer {reader} reads layer {owner}, which itself reads {owners[owner]}")
    return owners


def write_owners(path: Path, model: str, num_layers: int, owners: Mapping[int, int]) -> None:
    """Write a file that `owners_of_readers` reads; what stops it leaves an older one as it was.

    Args:
        path: of the file.
        model: its name.
        num_layers: of the whole model.
        owners: of each reader.

    Raises:
        OSError: it cannot be written.
    """
    reads = {str(reader): owner for reader, owner in sorted(owners.items())}
    write_model_file(path, {"model": model, "num_layers": num_layers, "reads": reads})


def _refusal(setting: str, model: str, got: str) -> OptionError:
    return OptionError(
        LABEL,
        setting if len(setting) <= _MOST_SHOWN else f"{setting[:_MOST_SHOWN]}...",
        f"{NONE} or a JSON file of {model!r} that says which layer reads which layer's cache, but "
        f"{got}",
        f"make it: rkv-vllm calibrate {model} --share-layers FILE.json",
    )


def _parse(document: Any) -> dict[int, int] | str:
    """The owners of a document of the right form, or what is wrong with it."""
    if not isinstance(document, dict) or not {"model", "num_layers", "reads"} <= document.keys():
        return 'it is no object with "model", "num_layers" and "reads"'
    if not isinstance(document["model"], str) or not isinstance(document["reads"], dict):
        return '"model" is no text or "reads" no object'
    owners = {}
    for reader, owner in document["reads"].items():
        if not reader.isdecimal() or type(owner) is not int:
            return f'"reads" has {reader!r}: {owner!r}, not two layer numbers'
        owners[int(reader)] = owner
    if not owners:
        return "no layer reads another one's cache"
    if len(owners) < len(document["reads"]):
        return '"reads" names a layer twice'
    return owners
