"""`rkv-vllm plan`: how many requests fit into a GPU, from `config.json` alone.

Reads the options and prints the answer; the formulas stand in `capacity.py` and `footprint.py`,
the plot in `plot.py`.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from rkv_vllm.cache_owners import owners_of_readers
from rkv_vllm.cli.checkpoint import (
    check_dtype,
    find_config,
    read_config,
    read_decoder,
    weight_bytes,
)
from rkv_vllm.cli.errors import REFUSED, CommandError, check_plot, one_line_errors
from rkv_vllm.cli.options import DTYPES, RKV, ModelArgument, option, tokens
from rkv_vllm.cli.sizes import format_size, parse_size
from rkv_vllm.options import OPTIONS, ServerOptions

# vLLM's default for --max-num-seqs on GPUs below 70 GiB; above it is larger.
SMALLEST_MAX_NUM_SEQS = 256
_LOAD, _MEMORY = "Requests", "Memory"
_SEATS = "Watched at once; their memory is counted."
_SEAT_FLAGS = ("--seats", "--kv-seats", "--observation-slots", "--kv-observation-slots")
_RESERVED = "Activations, CUDA graphs and libraries on one GPU. A guess: vLLM measures it at start."
_WEIGHTS = "Weights of the whole model, where neither files nor config.json tell."
_CACHE = "The cache of one GPU as it is, as for vllm serve; then nothing else is counted."
_SHARE = "Share of it that vLLM may use, above 0, at most 1."
_DTYPE = f"Of weights and cache: {', '.join(DTYPES)}."

PromptLen = Annotated[int, tokens(_LOAD, "Tokens of a prompt.")]
OutputLen = Annotated[int, tokens(_LOAD, "Tokens of an output.")]
Budget = Annotated[int, tokens(RKV, "Kept by a compaction.", "--budget", "--kv-budget")]
Buffer = Annotated[int, tokens(RKV, "Between two compactions.", "--buffer", "--kv-buffer")]
Window = Annotated[int, tokens(RKV, "Newest, always kept.", "--window", "--kv-window")]
Seats = Annotated[int, option(RKV, "REQUESTS", _SEATS, *_SEAT_FLAGS, min=1)]
_PROTECT = "Never evicted: none, the prompt, or so many first tokens."
_PROTECT_FLAGS = ("--protect", "--kv-protect")
Protect = Annotated[str, option(RKV, "none|prompt|TOKENS", _PROTECT, *_PROTECT_FLAGS)]
_COMPRESS = "Compact long prompts between their chunks; then the pool does not limit their length."
_CHUNK_FLAGS = ("--prompt-chunk", "--kv-prompt-chunk")
CompressPrompt = Annotated[
    bool,
    typer.Option("--compress-prompt", "--kv-compress-prompt", help=_COMPRESS, rich_help_panel=RKV),
]
PromptChunk = Annotated[int, tokens(RKV, "Of a prompt, between two of those.", *_CHUNK_FLAGS)]
_SHARED = "Which layers read another layer's cache."
_SHARED_FLAGS = ("--share-layers", "--kv-share-layers")
ShareLayers = Annotated[str, option(RKV, "none|FILE.json", _SHARED, *_SHARED_FLAGS)]
GpuMemory = Annotated[str, option(_MEMORY, "SIZE", "Of one GPU: 80GiB, 24GB or bytes.")]
Utilization = Annotated[float, option(_MEMORY, "SHARE", _SHARE)]
Reserved = Annotated[str, option(_MEMORY, "SIZE", _RESERVED)]
Weights = Annotated[str, option(_MEMORY, "SIZE", _WEIGHTS)]
KvCacheMemory = Annotated[str, option(_MEMORY, "SIZE", _CACHE)]
BlockSize = Annotated[int, tokens(_MEMORY, "Tokens per block.")]
Dtype = Annotated[str, option(_MEMORY, "DTYPE", _DTYPE)]
TensorParallel = Annotated[int, option(_MEMORY, "GPUS", "That share the model.", min=1)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document, no table.")]
_DRAWN = "Draw requests at once against output length."
PlotFile = Annotated[Path | None, typer.Option(metavar="FILE.png", help=_DRAWN)]


def show_plan(
    model: ModelArgument,
    gpu_memory: GpuMemory = "",
    prompt_len: PromptLen = 512,
    output_len: OutputLen = 16384,
    budget: Budget = ServerOptions.budget,
    buffer: Buffer = ServerOptions.buffer,
    window: Window = ServerOptions.window,
    seats: Seats = ServerOptions.seats,
    protect: Protect = ServerOptions.protect,
    compress_prompt: CompressPrompt = ServerOptions.compress_prompt,
    prompt_chunk: PromptChunk = ServerOptions.prompt_chunk,
    share_layers: ShareLayers = ServerOptions.share_layers,
    gpu_memory_utilization: Utilization = 0.92,
    reserved: Reserved = "2GiB",
    weights: Weights = "",
    kv_cache_memory_bytes: KvCacheMemory = "",
    block_size: BlockSize = 16,
    dtype: Dtype = "auto",
    tensor_parallel_size: TensorParallel = 1,
    as_json: AsJson = False,
    plot: PlotFile = None,
) -> None:
    """Print how many requests a GPU holds at once: stock, with an fp8 cache, with R-KV, with both.

    Needs config.json only: no weights, no GPU, no network; without files of weights beside it
    their size is estimated. Give the memory with --gpu-memory, or that of the cache alone with
    --kv-cache-memory-bytes.

    Two counts are printed. Peak: each request has room for the longest that it still becomes, so
    none is preempted; R-KV admits by this count. Mean: requests of evenly spread ages; stock vLLM
    can reach it, and preempts when requests grow together.

    Examples, with the model that `make model` unpacks:

    ```
    M=.models/SmolLM2-135M-Instruct
    rkv-vllm plan $M --gpu-memory 8GiB --output-len 4096
    rkv-vllm plan $M --gpu-memory 8GiB --output-len 4096 --budget 512 --json
    ```

    Exit codes: 0 fine; 1 the model or one request does not fit, or is not supported; 2 the command
    line is wrong.
    """
    # Only now: it imports numpy.
    from rkv_vllm.cli.capacity import Machine, make_capacity
    from rkv_vllm.cli.plot import draw

    with one_line_errors():
        check_plot(plot)
        try:
            config = ServerOptions(
                budget=budget,
                buffer=buffer,
                window=window,
                seats=seats,
                protect=OPTIONS["protect"].parse(protect),
                compress_prompt=compress_prompt,
                prompt_chunk=prompt_chunk,
                share_layers=share_layers,
            )
        except ValueError as error:
            raise CommandError(str(error)) from error
        check_dtype(dtype)
        memory, cache = _memory(gpu_memory, gpu_memory_utilization, kv_cache_memory_bytes)
        found = find_config(model)
        decoder = read_decoder(read_config(found))
        try:
            owners = owners_of_readers(share_layers, model, decoder.num_layers)
        except ValueError as error:
            raise CommandError(str(error)) from error
        # They do not matter when the size of the cache is given, so they need not be known.
        size, is_guess = 0, False
        if weights:
            size = parse_size("--weights", weights)
        elif cache is None:
            size, is_guess = weight_bytes(found.parent, decoder, dtype)
        reserve = parse_size("--reserved", reserved, smallest=0)
        machine = Machine(
            memory, gpu_memory_utilization, cache, reserve, size, tensor_parallel_size
        )
        capacity = make_capacity(decoder, machine, dtype, block_size, config, len(owners))
        longest = capacity.rkv.longest_output(prompt_len)
        _require_room(prompt_len, output_len, longest, compress_prompt)
        document = {
            "model": model,
            "prompt_len": prompt_len,
            "output_len": output_len,
            "budget": budget,
            "buffer": buffer,
            "window": window,
            "observation_slots": seats,
            "protect": config.protect,
            "compress_prompt": compress_prompt,
            "prompt_chunk": prompt_chunk,
            "shared_layers": len(owners),
            "num_layers": decoder.num_layers,
            "block_size": block_size,
            "tensor_parallel_size": tensor_parallel_size,
            "weight_bytes": size // tensor_parallel_size or None,
            "observation_bytes": capacity.ring_bytes,
            "layers": decoder.layers.describe(),
            "sides": {
                pool.name: _pool_document(pool, prompt_len, output_len) for pool in capacity.pools
            },
        }
        document["notes"] = _notes(document, decoder.max_positions, is_guess)
        if plot is not None:
            if decoder.max_positions is None:
                longest = min(longest, 4 * output_len)
            else:
                longest = min(longest, max(decoder.max_positions - prompt_len, output_len))
            title = f"{Path(model).name}: prompt {prompt_len:,}, budget {budget:,}, "
            title += f"buffer {buffer:,}"
            draw(plot, title, capacity, prompt_len, output_len, longest)
    if as_json:
        typer.echo(json.dumps(document))
    else:
        _print(document, [pool.label for pool in capacity.pools])


def _memory(gpu_memory: str, utilization: float, kv_cache_memory: str) -> tuple[int, int | None]:
    """Bytes of a GPU, and bytes of the cache if those are given."""
    if bool(gpu_memory) == bool(kv_cache_memory):
        got = "both" if gpu_memory else "neither"
        raise CommandError(
            f"--gpu-memory, --kv-cache-memory-bytes: got {got}, wanted one of them; for example "
            "--gpu-memory 80GiB"
        )
    if not 0 < utilization <= 1:
        raise CommandError(
            f"--gpu-memory-utilization: got {utilization}, wanted a share above 0 and at most 1; "
            "vLLM's default is 0.92"
        )
    if kv_cache_memory:
        return 0, parse_size("--kv-cache-memory-bytes", kv_cache_memory)
    return parse_size("--gpu-memory", gpu_memory), None


def _require_room(prompt_len: int, output_len: int, longest: int, compress_prompt: bool) -> None:
    """Raise CommandError unless the pool holds one whole request."""
    if output_len <= longest:
        return
    name, got, wanted = "--output-len", output_len, f"at most {longest}"
    if longest < 1:
        name, got, wanted = "--prompt-len", prompt_len, f"at most {longest + prompt_len - 1}"
    if compress_prompt:
        why = "a request with its protected tokens, a budget, a chunk and a buffer"
        cure = "lower it, --budget or --prompt-chunk, or give more memory"
    else:
        why = (
            "one request uncompressed, with R-KV as without, because a prompt and a preempted text "
            "are computed whole"
        )
        cure = "lower it, give more memory or try --compress-prompt"
    raise CommandError(
        f"{name}: got {got}, wanted {wanted}: the pool must hold {why}; {cure}", REFUSED
    )


def _pool_document(pool: Any, prompt_len: int, output_len: int) -> dict[str, int | float]:
    from rkv_vllm.cli.footprint import stock_life

    held = pool.life(prompt_len, output_len).held
    return {
        "cache_bytes": pool.cache_bytes,
        "bytes_per_token": pool.bytes_per_token,
        "pool_blocks": pool.num_blocks,
        "pool_tokens": pool.num_tokens,
        "block_tokens": pool.block_size,
        "request_peak_blocks": int(
            pool.blocks(held, stock_life(prompt_len, output_len).held).max()
        ),
        "request_mean_tokens": round(float(held.mean()), 1),
        "request_peak_tokens": int(held.max()),
        "at_once_peak": pool.at_once_by_peak(prompt_len, output_len),
        "at_once_mean": pool.at_once_by_mean(prompt_len, output_len),
    }


def _notes(document: dict[str, Any], max_positions: int | None, is_guess: bool) -> list[str]:
    """What to know about these numbers, in sentences."""
    from rkv_vllm.cli.capacity import IN_FLIGHT

    notes = []
    if is_guess:
        notes.append(
            "Weights are estimated from config.json (language part, gated MLP, no adapters): "
            "vLLM's log gives them at a start, --weights takes them."
        )
    stock, rkv = document["sides"]["stock"], document["sides"]["rkv"]
    at_least = document["sides"]["rkv_fp8"]["at_once_peak"]
    if rkv["block_tokens"] > document["block_size"]:
        notes.append(
            f"A state beside the attention makes blocks of {rkv['block_tokens']} tokens, which are "
            f"freed whole: a request holds up to {rkv['request_peak_blocks']} blocks, "
            f"{stock['request_peak_blocks']} with stock."
        )
    if rkv["request_mean_tokens"] == stock["request_mean_tokens"]:
        notes.append("No request grows long enough to be compacted: lower --budget.")
    longest = document["prompt_len"] + document["output_len"]
    if max_positions is not None and longest > max_positions:
        notes.append(
            f"Prompt and output make {longest} tokens, the model was made for {max_positions}: "
            "vLLM refuses that without RoPE scaling."
        )
    # A request is watched for `window + in_flight` of every `buffer` steps.
    seats, steps = document["observation_slots"], document["window"] + IN_FLIGHT
    if at_least > (served := seats * document["buffer"] // steps):
        notes.append(
            f"{seats} seats serve about {served} requests without a wait: raise --seats, or "
            "requests hold a little more than shown."
        )
    if at_least > SMALLEST_MAX_NUM_SEQS:
        notes.append(f"vLLM runs that many only with --max-num-seqs {at_least} or more.")
    return notes


def _print(document: dict[str, Any], labels: list[str]) -> None:
    console = Console(highlight=False)
    table = Table(
        title=f"{document['model']}: prompt {document['prompt_len']:,}, "
        f"output {document['output_len']:,} tokens, budget {document['budget']:,}",
        title_justify="left",
    )
    table.add_column("per GPU")
    for label in labels:
        table.add_column(label, justify="right")
    size = document["weight_bytes"]
    table.add_row("weights", *[format_size(size) if size else "not counted"] * len(labels))
    table.add_row("query ring", "-", "-", *[format_size(document["observation_bytes"])] * 2)
    if shared := document["shared_layers"]:
        layers = document["num_layers"]
        table.add_row("layers with a cache", *[str(layers)] * 2, *[str(layers - shared)] * 2)
    for label, key, form in (
        ("KV cache", "cache_bytes", format_size),
        ("KV bytes per token", "bytes_per_token", "{:,}".format),
        ("pool, blocks", "pool_blocks", "{:,}".format),
        ("pool, tokens", "pool_tokens", "{:,}".format),
        ("tokens per request, mean over its life", "request_mean_tokens", "{:,.0f}".format),
        ("tokens per request, peak", "request_peak_tokens", "{:,}".format),
        ("blocks per request, peak", "request_peak_blocks", "{:,}".format),
        ("requests at once, peak", "at_once_peak", "{:,}".format),
        ("requests at once, mean", "at_once_mean", "{:,}".format),
    ):
        values = [form(side[key]) for side in document["sides"].values()]
        table.add_row(label, *values, style="bold" if key == "at_once_peak" else "")
    console.print(table)
    console.print(f"Layers: {document['layers']}.", soft_wrap=True)
    for note in document["notes"]:
        console.print(f"Note: {note}", soft_wrap=True)
