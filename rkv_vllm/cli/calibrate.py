"""`rkv-vllm calibrate`: measures a model once, for the methods that need to know it.

Reads the options, shows progress and writes the file; what is measured stands in
`rkv_vllm/calibrate/`.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rkv_vllm.cache_owners import write_owners
from rkv_vllm.cli.checkpoint import find_config
from rkv_vllm.cli.environment import quieten_vllm
from rkv_vllm.cli.errors import REFUSED, CommandError, interruptible, one_line_errors
from rkv_vllm.cli.options import DTYPE_BYTES, ModelArgument
from rkv_vllm.cli.progress import progress, status
from rkv_vllm.layer_budgets import require_classes, write_classes
from rkv_vllm.model_name import model_name
from rkv_vllm.whole_file import what_is_missing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Below this a mean says little.
_LEAST_TOKENS = 256

DtypeName = Enum("DtypeName", {name: name for name in DTYPE_BYTES}, type=str)
_OUT = "The file to write, for --kv-option statistics=FILE; replaces an older one."
Out = Annotated[Path | None, typer.Option(metavar="FILE.safetensors", help=_OUT)]
_LAYERS = "The file to write, for --kv-layer-budgets FILE.json; replaces an older one."
LayerBudgets = Annotated[Path | None, typer.Option(metavar="FILE.json", help=_LAYERS)]
_SHARE = "The file to write, for --kv-share-layers FILE.json; replaces an older one."
ShareLayers = Annotated[Path | None, typer.Option(metavar="FILE.json", help=_SHARE)]
_READERS = "With --share-layers: that shall read another layer's cache. Default: a quarter."
Readers = Annotated[int | None, typer.Option(metavar="LAYERS", help=_READERS, min=1)]
_SIMILARITY = (
    "With --share-layers: least cosine, as a mean over tokens, between the model's last hidden "
    "states with shared caches and without."
)
Similarity = Annotated[
    float, typer.Option("--least-similarity", metavar="COSINE", help=_SIMILARITY, min=-1, max=1)
]
_TEXT = (
    "Plain text, UTF-8, such as you expect the model to read and write. Default: a text of worked "
    "exercises, code and prose that comes with the package (about 2,000 tokens)."
)
Text = Annotated[Path | None, typer.Option(metavar="FILE", help=_TEXT)]
_TOKENS = "Read so much of the text, at most."
Tokens = Annotated[
    int, typer.Option("--max-tokens", metavar="TOKENS", help=_TOKENS, min=_LEAST_TOKENS)
]
_CONTEXT = "Read the text in pieces of that length; attention and memory grow with it."
Context = Annotated[int, typer.Option(metavar="TOKENS", help=_CONTEXT, min=16)]
_DTYPE = "Of the weights; the means are float32. On a CPU float32 may be faster."
Dtype = Annotated[DtypeName, typer.Option(help=_DTYPE)]
_DEVICE = "A device of torch, such as cpu or cuda:1. Default: cuda where there is one."
Device = Annotated[str | None, typer.Option(metavar="DEVICE", help=_DEVICE)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]


def calibrate_model(
    model: ModelArgument,
    out: Out = None,
    layer_budgets: LayerBudgets = None,
    share_layers: ShareLayers = None,
    readers: Readers = None,
    similarity: Similarity = 0.5,
    text: Text = None,
    max_tokens: Tokens = 16384,
    context: Context = 1024,
    dtype: Dtype = DtypeName.bfloat16,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model on a text and write what methods need to know of it.

    The method `triattention` judges keys by the model's mean queries before RoPE; this command
    takes them from a text that the model reads once (--out). Layer budgets weigh how much each
    layer's attention changes what it is given (--layer-budgets). Which layers can read another
    layer's cache is found by trying pairs, each of which reads the text once more (--share-layers).
    Llama, Mistral, Qwen2 and Qwen3 are known, with full attention. A file holds for the model of
    that name; it is small, and every process of a server reads it.

    Examples, with the model that `make model` unpacks; a minute at most:

    ```
    M=.models/SmolLM2-135M-Instruct
    rkv-vllm calibrate $M --out smollm2.safetensors
    vllm serve $M --kv-compression triattention --kv-option statistics=smollm2.safetensors
    rkv-vllm calibrate $M --layer-budgets smollm2.json
    vllm serve $M --kv-compression rkv --kv-layer-budgets smollm2.json
    rkv-vllm calibrate $M --share-layers shared.json --max-tokens 1024
    vllm serve $M --kv-compression rkv --kv-share-layers shared.json
    ```

    Exit codes: 0 written; 1 the model or the text cannot be had; 2 the command line is wrong; 130
    interrupted, nothing written.
    """
    with one_line_errors(), interruptible():
        outputs = {
            "--out": out,
            "--layer-budgets": layer_budgets,
            "--share-layers": share_layers,
        }
        _check_outputs(outputs)
        folder = find_config(model).parent
        written = _read_text(text)
        quieten_vllm()
        with status("Importing transformers ..."):
            from rkv_vllm.calibrate import forward
            from rkv_vllm.calibrate.kvsharer import CacheSums
            from rkv_vllm.calibrate.layer_importance import LayerImportance
            from rkv_vllm.calibrate.query_sums import QuerySums
            from rkv_vllm.cli.share_layers import find_sharing, most_readers
        with _refused_by_name(model):
            config = forward.read_config(folder)
            num_layers = config.num_hidden_layers
            if layer_budgets is not None:
                require_classes(num_layers)
            num_readers = most_readers(readers, num_layers)
            token_ids = forward.tokenize(folder, written)[:max_tokens]
        _check_length(text, len(token_ids))
        with status("Loading the model ..."), _refused_by_name(model):
            loaded = _load(folder, dtype.value, device)
        sums, importance = QuerySums(loaded), LayerImportance(num_layers)
        caches = CacheSums(num_layers)
        wanted = [sums] if out is not None else []
        wanted += [importance] if layer_budgets is not None else []
        wanted += [caches] if share_layers is not None else []
        pieces = -(-len(token_ids) // context)
        with progress("Reading", pieces * num_layers, "layers") as move:
            hidden = forward.read(loaded, token_ids, context, [*wanted, _Steps(move)])
        name = model_name(str(folder))
        found: dict[str, Any] = {"model": name, "tokens": len(token_ids)}
        if out is not None:
            with _writing("--out", out):
                sums.statistics(name).save(out)
            found["out"] = str(out)
        if layer_budgets is not None:
            classes = importance.classes()
            with _writing("--layer-budgets", layer_budgets):
                write_classes(layer_budgets, name, classes)
            found["layer_budgets"] = str(layer_budgets)
            found["shares"] = [each.share for each in classes]
        if share_layers is not None:
            sharing = find_sharing(
                loaded, token_ids, context, hidden, caches, num_readers, similarity
            )
            with _writing("--share-layers", share_layers):
                write_owners(share_layers, name, num_layers, sharing.owners)
            found["share_layers"] = str(share_layers)
            found["reads"] = {str(reader): owner for reader, owner in sharing.owners.items()}
            found["similarity"] = round(sharing.similarity, 4)
    if as_json:
        typer.echo(json.dumps(found))
        return
    typer.echo(f"{name}, {num_layers} layers, {len(token_ids)} tokens read")
    if out is not None:
        typer.echo(f"{out}: mean queries of {config.num_attention_heads} heads per layer")
    if layer_budgets is not None:
        for each in classes:
            layers = ", ".join(map(str, each.layers))
            typer.echo(f"{layer_budgets}: share {each.share:.3f} for layers {layers}")
    if share_layers is not None:
        pairs = ", ".join(f"{reader} reads {owner}" for reader, owner in found["reads"].items())
        typer.echo(
            f"{share_layers}: {len(found['reads'])} of {num_layers} layers without a cache of "
            f"their own, similarity {found['similarity']}: {pairs}"
        )


class _Steps:
    """Counts what has been read: an observer that looks at nothing."""

    def __init__(self, move: Callable[[int], None]) -> None:
        self._move = move
        self._num_done = 0

    def observe(self, *_: object) -> None:
        """One layer of one piece is done."""
        self._num_done += 1
        self._move(self._num_done)


def _check_outputs(paths: dict[str, Path | None]) -> None:
    if not any(paths.values()):
        raise CommandError(
            f"{', '.join(paths)}: got none of them, wanted at least one file to write; add one"
        )
    for flag, path in paths.items():
        if path is None:
            continue
        wanted = what_is_missing(path)
        if wanted is not None:
            raise CommandError(f"{flag}: got {str(path)!r}, wanted {wanted}; change the path")


@contextmanager
def _writing(flag: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CommandError(
            f"{flag}: got {error} for {str(path)!r}, wanted a file that can be written; change "
            "the path",
            REFUSED,
        ) from error


def _read_text(path: Path | None) -> str:
    if path is None:
        return files("rkv_vllm.calibrate").joinpath("default.txt").read_text(encoding="utf-8")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(
            f"--text: got {error}, wanted a file of plain text in UTF-8; correct the path", REFUSED
        ) from error


def _check_length(path: Path | None, num_tokens: int) -> None:
    if num_tokens < _LEAST_TOKENS:
        shown = "the default text" if path is None else repr(str(path))
        raise CommandError(
            f"--text: got {shown} with {num_tokens} tokens, wanted at least {_LEAST_TOKENS}; pass "
            "a longer text",
            REFUSED,
        )


@contextmanager
def _refused_by_name(model: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        raise CommandError(
            f"MODEL: got {model!r}, which cannot be calibrated: {' '.join(str(error).split())}; "
            "choose another model or correct its folder",
            REFUSED,
        ) from error


def _load(folder: Path, dtype: str, device: str | None) -> "PreTrainedModel":
    import torch

    from rkv_vllm.calibrate.forward import load_model

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return load_model(folder, getattr(torch, dtype), chosen)
