"""`rkv-vllm trace`: what compression keeps of one text, as a page to look at.

Checks the command line, runs the prompt and writes the file; what is recorded and how it is drawn
stands in `rkv_vllm/trace/`.
"""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rkv_vllm.cli.checkpoint import (
    DTYPES,
    check_dtype,
    find_config,
    read_config,
    read_decoder,
)
from rkv_vllm.cli.errors import CommandError, one_line_errors
from rkv_vllm.cli.traced_run import (
    Request,
    check_lengths,
    encode,
    load_tokenizer,
    prepare_vllm,
    run,
)
from rkv_vllm.cli.version import VERSIONED_DISTRIBUTIONS
from rkv_vllm.config import OPTIONS_BY_NAME, KVCompressionConfig
from rkv_vllm.fit.versions import installed_version

if TYPE_CHECKING:
    from rkv_vllm.trace.capture import Capture
    from rkv_vllm.trace.record import Trace

INTERRUPTED = 130


def _option(panel: str, metavar: str, meaning: str, *flags: str, **settings: Any) -> Any:
    return typer.Option(
        *flags, rich_help_panel=panel, metavar=metavar, help=meaning, show_default=True, **settings
    )


def _compression(name: str, short: str) -> Any:
    option = OPTIONS_BY_NAME[name]
    panel = "Compression (as for vllm serve)"
    return _option(panel, option.metavar, option.meaning, short, option.flag)


_GENERATION = "Generation"
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Folder with config.json, or a hub id in the local cache."
    ),
]
PromptArgument = Annotated[
    str, typer.Argument(metavar="PROMPT", help="The prompt; `-` reads it from standard input.")
]
Output = Annotated[
    Path,
    typer.Option(
        "--output", "-o", metavar="FILE.html", help="The page to write; replaces an older one."
    ),
]
Method = Annotated[
    str,
    _option(
        "Compression (as for vllm serve)",
        "METHOD",
        "Method that chooses the tokens to keep: its name, or package.module.Class.",
        "--method",
        "--kv-compression",
    ),
]
Budget = Annotated[int, _compression("budget", "--budget")]
Buffer = Annotated[int, _compression("buffer", "--buffer")]
Window = Annotated[int, _compression("window", "--window")]
Lambda = Annotated[float, _compression("lam", "--lambda")]
Pool = Annotated[int, _compression("pool", "--pool")]
Threshold = Annotated[float, _compression("threshold", "--threshold")]
MaxTokens = Annotated[
    int, _option(_GENERATION, "TOKENS", "Generated at most, in tokens.", "--max-tokens", min=1)
]
IgnoreEos = Annotated[
    bool, _option(_GENERATION, "", "Go on to --max-tokens when the model ends.", "--ignore-eos")
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--raw",
        rich_help_panel=_GENERATION,
        show_default="--chat if the model has a chat template",
        help="Put the prompt into the chat template as the user's message, or take it as it is.",
    ),
]
Temperature = Annotated[
    float, _option(_GENERATION, "T", "Of sampling, 0 to 2, no unit; 0 takes the likeliest token.")
]
Seed = Annotated[int, _option(_GENERATION, "SEED", "Of sampling.", min=0)]
Dtype = Annotated[str, _option(_GENERATION, "DTYPE", f"Of weights and cache: {', '.join(DTYPES)}.")]
BlockSize = Annotated[
    int | None,
    _option(
        _GENERATION, "TOKENS", "Per cache block; without it vLLM's own for this device.", min=1
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the path and the counts as one JSON document.")
]


def show_trace(
    model: ModelArgument,
    prompt: PromptArgument,
    output: Output = Path("trace.html"),
    method: Method = KVCompressionConfig.method,
    budget: Budget = KVCompressionConfig.budget,
    buffer: Buffer = KVCompressionConfig.buffer,
    window: Window = KVCompressionConfig.window,
    lam: Lambda = KVCompressionConfig.lam,
    pool: Pool = KVCompressionConfig.pool,
    threshold: Threshold = KVCompressionConfig.threshold,
    max_tokens: MaxTokens = 2048,
    ignore_eos: IgnoreEos = False,
    chat: Chat = None,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    block_size: BlockSize = None,
    as_json: AsJson = False,
) -> None:
    """Run one prompt with compression and write a page that shows which tokens each head keeps.

    The page is one HTML file without any request to the network: every token is coloured by the
    layers and KV heads that still keep it, a slider goes from compaction to compaction, all heads,
    one layer or one head can be chosen, and a token shows its scores. Press `?` on it for the keys.

    The prompt runs eagerly in an engine of this process. Without a compaction there is nothing to
    show: that needs more tokens than budget and buffer together, and a model that does not end
    before (--ignore-eos).

    Examples, with the model that `make model` unpacks:

    ```
    M=.models/SmolLM2-135M-Instruct
    rkv-vllm trace $M "How do bees find home?" --budget 96 --block-size 32 -o bees.html
    rkv-vllm trace $M "Once upon a time" --raw --ignore-eos --budget 96 --max-tokens 400 --json
    ```

    Exit codes: 0 written; 1 the prompt does not fit, vLLM refuses the model, or it ended before the
    first compaction; 2 the command line is wrong; 130 interrupted, nothing written.
    """
    with one_line_errors(), _interruptible():
        _check_output(output)
        _check_temperature(temperature)
        config = _config(method, budget, buffer, window, lam, pool, threshold)
        check_dtype(dtype)
        decoder = read_decoder(read_config(find_config(model)))
        folder = str(find_config(model).parent)
        prepare_vllm()
        tokenizer = load_tokenizer(folder)
        prompt_ids = encode(tokenizer, sys.stdin.read() if prompt == "-" else prompt, chat)
        request = Request(prompt_ids, max_tokens, temperature, ignore_eos)
        check_lengths(request, config, decoder.max_positions)
        options = {"dtype": dtype, "seed": seed}
        if block_size is not None:
            options["block_size"] = block_size
        captured = run(folder, request, config, decoder, options)
        shown = {**_shown(config), "max_tokens": max_tokens, "temperature": temperature, **options}
        trace = _trace(model, shown, request.prompt_ids, captured, tokenizer)
        num_bytes = _write(output, trace)
    counts = trace.counts()
    if as_json:
        typer.echo(json.dumps({"output": str(output), "bytes": num_bytes, **counts}))
    else:
        typer.echo(_summary(output, num_bytes, counts))


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends the command with one line, also in a background job, where shells ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise CommandError("interrupted; nothing was written", INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGINT, before)


def _check_output(path: Path) -> None:
    """Raise CommandError unless the page can be written: found out by trying, before the model."""
    wanted = None
    if path.suffix.lower() not in (".html", ".htm"):
        wanted = "a file that ends in .html"
    elif path.is_dir():
        wanted = "a file, not a folder"
    elif not path.parent.is_dir():
        wanted = "a file in a folder that exists"
    elif path.exists() and not os.access(path, os.W_OK):
        wanted = "a file that may be replaced"
    else:
        try:
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            wanted = f"a folder that can be written to ({error.strerror})"
    if wanted is not None:
        raise CommandError(f"--output: got {str(path)!r}, wanted {wanted}; change the path")


def _config(
    method: str, budget: int, buffer: int, window: int, lam: float, pool: int, threshold: float
) -> KVCompressionConfig:
    try:
        # One request is watched, so one slot serves.
        return KVCompressionConfig(
            method=method,
            budget=budget,
            buffer=buffer,
            window=window,
            lam=lam,
            pool=pool,
            threshold=threshold,
            seats=1,
        )
    except ValueError as error:
        raise CommandError(str(error)) from error


def _check_temperature(temperature: float) -> None:
    # Written so that NaN is refused too.
    if not 0 <= temperature <= 2:
        raise CommandError(
            f"--temperature: got {temperature}, wanted a number from 0 to 2; change it"
        )


def _shown(config: KVCompressionConfig) -> dict[str, str | int | float]:
    """The options that this command has, as it spells them."""
    names = ("method", "budget", "buffer", "window", "pool", "threshold")
    return {**{name: getattr(config, name) for name in names}, "lambda": config.lam}


def _trace(
    model: str,
    options: dict[str, Any],
    prompt_ids: list[int],
    captured: "Capture",
    tokenizer: Any,
) -> "Trace":
    from rkv_vllm.trace.pieces import split_text
    from rkv_vllm.trace.record import Trace

    return Trace(
        model=Path(model).name,
        options=options,
        versions=_versions(),
        prompt_len=len(prompt_ids),
        pieces=split_text(tokenizer, [*prompt_ids, *captured.output_ids]),
        window=options["window"],
        finish_reason=captured.finish_reason,
        evictions=captured.evictions,
    )


def _versions() -> dict[str, str]:
    found = {name: installed_version(name) for name in VERSIONED_DISTRIBUTIONS}
    return {name: version for name, version in found.items() if version is not None}


def _write(path: Path, trace: "Trace") -> int:
    """Write the page at once or not at all; returns its bytes."""
    from rkv_vllm.trace.page import render

    page = render(trace)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        half.write_bytes(page)
        half.replace(path)
    except OSError as error:
        raise CommandError(
            f"--output: got {error}, wanted a file that can be written; change the path"
        ) from error
    finally:
        half.unlink(missing_ok=True)
    return len(page)


def _summary(path: Path, num_bytes: int, counts: dict[str, int]) -> str:
    return (
        f"{path}: {num_bytes / 1e6:.2f} MB, {counts['prompt_tokens']} + "
        f"{counts['output_tokens']} tokens, {counts['compactions']} compactions evicted "
        f"{counts['evicted_tokens']} and freed {counts['freed_blocks']} blocks; the cache holds "
        f"{counts['physical_len']} of {counts['logical_len']} tokens"
    )
