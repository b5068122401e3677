"""`rkv-vllm trace`: what compression keeps of one text, as a page to look at.

Reads the options, runs the prompt with progress on stderr and writes the file. What is refused
stands in `trace_input.py`; what is recorded and how it is drawn, in `rkv_vllm/trace/`.
"""

import json
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rkv_vllm.cli.checkpoint import check_dtype, find_config, read_config, read_decoder
from rkv_vllm.cli.environment import quieten_vllm
from rkv_vllm.cli.errors import REFUSED, CommandError, interruptible, one_line_errors
from rkv_vllm.cli.options import DTYPES, ModelArgument, option
from rkv_vllm.cli.progress import progress, status
from rkv_vllm.cli.version import VERSIONED_DISTRIBUTIONS
from rkv_vllm.fit.versions import installed_version
from rkv_vllm.options import OPTIONS, ServerOptions
from rkv_vllm.whole_file import whole_file

if TYPE_CHECKING:
    from rkv_vllm.trace.capture import Capture, TracedRequest
    from rkv_vllm.trace.record import Trace

_GENERATION, _COMPRESSION = "Generation", "Compression (as for vllm serve)"


def _compression(name: str, short: str) -> Any:
    """An option of compression, under its own name and under a short one."""
    known = OPTIONS[name]
    return option(_COMPRESSION, known.metavar, known.meaning, short, known.flag)


_PROMPT = "The prompt; `-` reads it from standard input."
PromptArgument = Annotated[str, typer.Argument(metavar="PROMPT", help=_PROMPT)]
_PAGE = "The page to write; replaces an older one."
Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE.html", help=_PAGE)]
_CHOOSES = "Method that chooses the tokens to keep: its name, or package.module.Class."
_METHOD_FLAGS = ("--method", "--kv-compression")
Method = Annotated[str, option(_COMPRESSION, "METHOD", _CHOOSES, *_METHOD_FLAGS)]
Budget = Annotated[int, _compression("budget", "--budget")]
Buffer = Annotated[int, _compression("buffer", "--buffer")]
Window = Annotated[int, _compression("window", "--window")]
_WEIGHT_FLAGS, _POOL_FLAGS = ("--lambda", "--kv-lambda"), ("--pool", "--kv-pool")
_COSINE_FLAGS = ("--threshold", "--kv-threshold")
# Their table is the method's, which is not imported for --help.
_WEIGHT = "Weight of importance against redundancy (rkv). Default: 0.1."
_WIDTH = "Width of the max-pooling over importance, odd (rkv). Default: 7."
_COSINE = "Cosine above which two keys count as similar (rkv). Default: 0.5."
Lambda = Annotated[float | None, option(_COMPRESSION, "WEIGHT", _WEIGHT, *_WEIGHT_FLAGS)]
Pool = Annotated[int | None, option(_COMPRESSION, "TOKENS", _WIDTH, *_POOL_FLAGS)]
Threshold = Annotated[float | None, option(_COMPRESSION, "COSINE", _COSINE, *_COSINE_FLAGS)]
MaxTokens = Annotated[int, option(_GENERATION, "TOKENS", "Generated at most, in tokens.", min=1)]
_GO_ON = "Go on to --max-tokens when the model ends."
IgnoreEos = Annotated[bool, option(_GENERATION, "", _GO_ON, "--ignore-eos")]
_TEMPLATE = "Put the prompt into the chat template as the user's message, or take it as it is."
_IF_THERE = "--chat if the model has a chat template"
Chat = Annotated[
    bool | None, option(_GENERATION, "", _TEMPLATE, "--chat/--raw", show_default=_IF_THERE)
]
_SAMPLED = "Of sampling, 0 to 2, no unit; 0 takes the likeliest token."
Temperature = Annotated[float, option(_GENERATION, "T", _SAMPLED)]
Seed = Annotated[int, option(_GENERATION, "SEED", "Of sampling.", min=0)]
_DTYPE = f"Of weights and cache: {', '.join(DTYPES)}."
Dtype = Annotated[str, option(_GENERATION, "DTYPE", _DTYPE)]
_PER_BLOCK = "Per cache block; without it vLLM's own for this device."
BlockSize = Annotated[int | None, option(_GENERATION, "TOKENS", _PER_BLOCK, min=1)]
_JSON = "Print the path and the counts as one JSON document."
AsJson = Annotated[bool, typer.Option("--json", help=_JSON)]


def show_trace(
    model: ModelArgument,
    prompt: PromptArgument,
    output: Output = Path("trace.html"),
    method: Method = ServerOptions.method,
    budget: Budget = ServerOptions.budget,
    buffer: Buffer = ServerOptions.buffer,
    window: Window = ServerOptions.window,
    lam: Lambda = None,
    pool: Pool = None,
    threshold: Threshold = None,
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
    # Only now: it imports numpy.
    from rkv_vllm.cli import trace_input
    from rkv_vllm.trace.capture import TracedRequest, prepare_vllm

    with one_line_errors(), interruptible():
        trace_input.check_output(output)
        trace_input.check_temperature(temperature)
        try:
            own = {"lam": lam, "pool": pool, "threshold": threshold}
            # One request is watched, so one seat serves.
            config = ServerOptions(
                method=method,
                budget=budget,
                buffer=buffer,
                window=window,
                seats=1,
                **{name: value for name, value in own.items() if value is not None},
            )
        except ValueError as error:
            raise CommandError(str(error)) from error
        check_dtype(dtype)
        found = find_config(model)
        decoder = read_decoder(read_config(found))
        quieten_vllm()
        prepare_vllm()
        with status("Importing vLLM ..."):
            tokenizer = trace_input.load_tokenizer(str(found.parent))
        text = sys.stdin.read() if prompt == "-" else prompt
        prompt_ids = trace_input.encode(tokenizer, text, chat)
        request = TracedRequest(prompt_ids, max_tokens, temperature, ignore_eos)
        trace_input.check_lengths(request, config, decoder.max_positions)
        options = {"dtype": dtype, "seed": seed}
        if block_size is not None:
            options["block_size"] = block_size
        # Elements of four bytes, which no supported dtype exceeds.
        captured = _run(found.parent, request, config, 4 * decoder.elements_per_token, options)
        shown = {"method": method, "budget": budget, "buffer": buffer, "window": window}
        for name, value in asdict(config.method_options).items():
            shown["lambda" if name == "lam" else name] = value
        shown |= {"max_tokens": max_tokens, "temperature": temperature, **options}
        trace = _trace(Path(model).name, shown, prompt_ids, captured, tokenizer)
        num_bytes = _write(output, trace)
    counts = trace.counts()
    if as_json:
        typer.echo(json.dumps({"output": str(output), "bytes": num_bytes, **counts}))
    else:
        typer.echo(
            f"{output}: {num_bytes / 1e6:.2f} MB, {counts['prompt_tokens']} + "
            f"{counts['output_tokens']} tokens, {counts['compactions']} compactions evicted "
            f"{counts['evicted_tokens']} and freed {counts['freed_blocks']} blocks; the cache "
            f"holds {counts['physical_len']} of {counts['logical_len']} tokens"
        )


def _run(
    folder: Path,
    request: "TracedRequest",
    config: ServerOptions,
    bytes_per_token: int,
    options: dict[str, Any],
) -> "Capture":
    """Generate in an engine of this process, with progress on stderr.

    Raises:
        CommandError: vLLM refuses the start, or the text ended before the first compaction.
    """
    from rkv_vllm.cli.trace_input import first_due_at
    from rkv_vllm.trace import capture

    with ExitStack() as stack:
        with status("Loading the model ..."):
            try:
                llm = stack.enter_context(
                    capture.running_engine(
                        str(folder), config, request.max_len, bytes_per_token, **options
                    )
                )
            except (ValueError, RuntimeError, OSError) as error:
                raise CommandError(
                    f"MODEL: got {folder.name!r}, which vLLM does not start with these options: "
                    f"{' '.join(str(error).split())}; see rkv-vllm doctor {folder}",
                    REFUSED,
                ) from error
        on_token = stack.enter_context(progress("Generating", request.max_tokens, "tokens"))
        captured = capture.capture(llm, config, request, on_token)
    if captured.evictions is None:
        prompt_len, output_len = len(request.prompt_ids), len(captured.output_ids)
        raise CommandError(
            f"MODEL: got the end of its text after {output_len} tokens, {prompt_len + output_len} "
            f"with the prompt, wanted more than {first_due_at(prompt_len, config)}, where the "
            "first compaction is due; lower --budget or --buffer, or go on with --ignore-eos",
            REFUSED,
        )
    return captured


def _trace(
    model: str,
    options: dict[str, Any],
    prompt_ids: list[int],
    captured: "Capture",
    tokenizer: Any,
) -> "Trace":
    from rkv_vllm.trace.pieces import split_text
    from rkv_vllm.trace.record import Trace

    versions = {name: installed_version(name) for name in VERSIONED_DISTRIBUTIONS}
    return Trace(
        model=model,
        options=options,
        versions={name: version for name, version in versions.items() if version is not None},
        prompt_len=len(prompt_ids),
        pieces=split_text(tokenizer, [*prompt_ids, *captured.output_ids]),
        window=options["window"],
        finish_reason=captured.finish_reason,
        evictions=captured.evictions,
    )


def _write(path: Path, trace: "Trace") -> int:
    """Write the page at once or not at all; returns its bytes."""
    from rkv_vllm.trace.page import render

    page = render(trace)
    try:
        with whole_file(path) as half:
            half.write_bytes(page)
    except OSError as error:
        raise CommandError(
            f"--output: got {error}, wanted a file that can be written; change the path", REFUSED
        ) from error
    return len(page)
