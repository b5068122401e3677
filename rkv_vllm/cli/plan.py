"""`rkv-vllm plan`: how many requests fit into a GPU, from `config.json` alone.

Reads the options and prints the answer; the formulas stand in `capacity.py` and `footprint.py`,
the plot in `plot.py`.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from rkv_vllm.cli.capacity import Capacity, Machine, Side, Workload, make_capacity
from rkv_vllm.cli.checkpoint import (
    DTYPES,
    Decoder,
    check_dtype,
    find_config,
    read_config,
    read_decoder,
)
from rkv_vllm.cli.errors import REFUSED, CommandError, one_line_errors
from rkv_vllm.cli.sizes import format_size, parse_size
from rkv_vllm.config import KVCompressionConfig

# vLLM's default for --max-num-seqs on GPUs below 70 GiB; above it is larger.
SMALLEST_MAX_NUM_SEQS = 256


def _option(panel: str, metavar: str, meaning: str, *flags: str, **settings: Any) -> Any:
    return typer.Option(
        *flags, rich_help_panel=panel, metavar=metavar, help=meaning, show_default=True, **settings
    )


def _length(panel: str, meaning: str, *flags: str) -> Any:
    return _option(panel, "TOKENS", meaning, *flags, min=1)


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Folder with config.json, or a hub id in the local cache."
    ),
]
PromptLen = Annotated[int, _length("Requests", "Tokens of a prompt.")]
OutputLen = Annotated[int, _length("Requests", "Tokens of an output.")]
_RKV = "R-KV (as for vllm serve)"
Budget = Annotated[int, _length(_RKV, "Kept by a compaction.", "--budget", "--kv-budget")]
Buffer = Annotated[int, _length(_RKV, "Between two compactions.", "--buffer", "--kv-buffer")]
Window = Annotated[int, _length(_RKV, "Newest, always kept.", "--window", "--kv-window")]
ObservationSlots = Annotated[
    int,
    _option(
        _RKV,
        "REQUESTS",
        "Watched at once; their memory is counted.",
        "--observation-slots",
        "--kv-observation-slots",
        min=1,
    ),
]
_MEMORY = "Memory"
GpuMemory = Annotated[str, _option(_MEMORY, "SIZE", "Of one GPU: 80GiB, 24GB or bytes.")]
Utilization = Annotated[
    float, _option(_MEMORY, "SHARE", "Share of it that vLLM may use, above 0, at most 1.")
]
Reserved = Annotated[
    str,
    _option(
        _MEMORY,
        "SIZE",
        "Activations, CUDA graphs and libraries on one GPU. A guess: vLLM measures it at start.",
    ),
]
Weights = Annotated[
    str,
    _option(_MEMORY, "SIZE", "Weights of the whole model, instead of estimating them."),
]
KvCacheMemory = Annotated[
    str,
    _option(
        _MEMORY,
        "SIZE",
        "The cache of one GPU as it is, as for vllm serve; then nothing else is counted.",
    ),
]
BlockSize = Annotated[int, _length(_MEMORY, "Tokens per block.")]
Dtype = Annotated[str, _option(_MEMORY, "DTYPE", f"Of weights and cache: {', '.join(DTYPES)}.")]
TensorParallel = Annotated[int, _option(_MEMORY, "GPUS", "That share the model.", min=1)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document, no table.")]
PlotFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE.png", help="Draw requests at once against output length."),
]


def show_plan(
    model: ModelArgument,
    gpu_memory: GpuMemory = "",
    prompt_len: PromptLen = 512,
    output_len: OutputLen = 16384,
    budget: Budget = KVCompressionConfig.budget,
    buffer: Buffer = KVCompressionConfig.buffer,
    window: Window = KVCompressionConfig.window,
    observation_slots: ObservationSlots = KVCompressionConfig.observation_slots,
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
    """Print how many requests a GPU holds at once: stock, with an fp8 cache, and with R-KV.

    Needs config.json only: no weights, no GPU, no network. The weights are estimated from it. Give
    the memory with --gpu-memory, or that of the cache alone with --kv-cache-memory-bytes.

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
    with one_line_errors():
        if plot is not None:
            _check_plot(plot)
        config = _compression(budget, buffer, window, observation_slots)
        workload = Workload(prompt_len, output_len)
        check_dtype(dtype)
        decoder = read_decoder(read_config(find_config(model)))
        machine = Machine(
            *_memory(gpu_memory, gpu_memory_utilization, kv_cache_memory_bytes),
            reserved=parse_size("--reserved", reserved, smallest=0),
            weights=_weights(weights, kv_cache_memory_bytes, decoder, dtype),
            tensor_parallel=tensor_parallel_size,
        )
        capacity = make_capacity(decoder, machine, dtype, block_size, config)
        _require_room(capacity, workload)
        if plot is not None:
            from rkv_vllm.cli.plot import draw

            draw(plot, capacity, workload, Path(model).name, decoder.max_positions)
    document = {"model": model, **_document(capacity, machine, workload)}
    document["notes"] = _notes(capacity, machine, workload, decoder, not weights)
    if as_json:
        typer.echo(json.dumps(document))
    else:
        _print(document, capacity)


def _compression(budget: int, buffer: int, window: int, slots: int) -> KVCompressionConfig:
    try:
        return KVCompressionConfig(
            budget=budget, buffer=buffer, window=window, observation_slots=slots
        )
    except ValueError as error:
        raise CommandError(str(error)) from error


def _memory(
    gpu_memory: str, utilization: float, kv_cache_memory: str
) -> tuple[int, float, int | None]:
    """Bytes of a GPU, the share of it that may be used, bytes of the cache if those are given."""
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
        return 0, utilization, parse_size("--kv-cache-memory-bytes", kv_cache_memory)
    return parse_size("--gpu-memory", gpu_memory), utilization, None


def _weights(weights: str, kv_cache_memory: str, decoder: Decoder, dtype: str) -> int:
    if weights:
        return parse_size("--weights", weights)
    # They do not matter when the size of the cache is given, so they need not be known.
    return 0 if kv_cache_memory else decoder.weight_bytes(dtype)


def _check_plot(path: Path) -> None:
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise CommandError(
            f"--plot: got {str(path)!r}, wanted a file that ends in .png, in a folder that exists; "
            "change the path"
        )
    if find_spec("matplotlib") is None:
        raise CommandError(
            "--plot: got an installation without matplotlib, wanted one that has it; run: "
            "pip install matplotlib",
            REFUSED,
        )


def _require_room(capacity: Capacity, workload: Workload) -> None:
    if capacity.rkv.holds_whole(workload):
        return
    longest = capacity.longest_output(workload.prompt_len)
    name, got, wanted = "--output-len", workload.output_len, f"at most {longest}"
    if longest < 1:
        name, got = "--prompt-len", workload.prompt_len
        wanted = f"at most {longest + workload.prompt_len - 1}"
    raise CommandError(
        f"{name}: got {got}, wanted {wanted}: the pool must hold one request uncompressed, with "
        "R-KV as without, because a prompt and a preempted text are computed whole; lower it or "
        "give more memory",
        REFUSED,
    )


def _document(capacity: Capacity, machine: Machine, workload: Workload) -> dict[str, Any]:
    """The answer as plain JSON; sizes in bytes and lengths in tokens, of one GPU."""
    by_peak = {"stock": capacity.stock.at_once_by_peak, "stock_fp8": capacity.fp8.at_once_by_peak}
    by_mean = {"stock": capacity.stock.at_once_by_mean, "stock_fp8": capacity.fp8.at_once_by_mean}
    config = capacity.config
    return {
        "prompt_len": workload.prompt_len,
        "output_len": workload.output_len,
        "budget": config.budget,
        "buffer": config.buffer,
        "window": config.window,
        "observation_slots": config.observation_slots,
        "block_size": capacity.stock.block_size,
        "tensor_parallel_size": machine.tensor_parallel,
        "weight_bytes": machine.weights // machine.tensor_parallel or None,
        "observation_bytes": capacity.observation_bytes,
        "sides": {side.name: _side_document(side, workload) for side in capacity.sides},
        "crossover": {
            other: {
                "peak": capacity.crossover(workload.prompt_len, by_peak[other]),
                "mean": capacity.crossover(workload.prompt_len, by_mean[other]),
            }
            for other in by_peak
        },
    }


def _side_document(side: Side, workload: Workload) -> dict[str, int | float]:
    life = side.life(*workload)
    return {
        "cache_bytes": side.cache_bytes,
        "bytes_per_token": side.bytes_per_token,
        "pool_blocks": side.num_blocks,
        "pool_tokens": side.num_blocks * side.block_size,
        "request_mean_tokens": round(life.mean_len, 1),
        "request_peak_tokens": life.peak_len,
        "at_once_peak": side.at_once_by_peak(workload),
        "at_once_mean": side.at_once_by_mean(workload),
    }


def _notes(
    capacity: Capacity, machine: Machine, workload: Workload, decoder: Decoder, estimated: bool
) -> list[str]:
    """What to know about these numbers, in sentences."""
    notes = []
    if machine.kv_cache_memory is not None:
        notes.append(
            "The cache has the size that was given: weights are not counted, and R-KV's "
            f"observation slots need {format_size(capacity.observation_bytes)} beside it."
        )
    elif estimated:
        parts = ", its text part only" if decoder.is_multimodal else ""
        notes.append(
            f"Weights are estimated from config.json{parts} (gated MLP, no adapters), and "
            f"{format_size(machine.reserved)} reserved is a guess; the log of a start of vLLM "
            "gives both: --weights, --reserved."
        )
    life = capacity.rkv.life(*workload)
    if life == capacity.stock.life(*workload):
        notes.append("No request grows long enough to be compacted: lower --budget.")
    longest = workload.prompt_len + workload.output_len
    if decoder.max_positions is not None and longest > decoder.max_positions:
        notes.append(
            f"Prompt and output make {longest} tokens, the model was made for "
            f"{decoder.max_positions}: vLLM refuses that without RoPE scaling."
        )
    at_once = capacity.rkv.at_once_by_peak(workload)
    if at_once > capacity.watched_requests():
        notes.append(
            f"{capacity.config.observation_slots} observation slots serve about "
            f"{capacity.watched_requests()} requests without a wait: raise --observation-slots, or "
            "requests hold a little more than shown."
        )
    if at_once > SMALLEST_MAX_NUM_SEQS:
        notes.append(f"vLLM runs that many only with --max-num-seqs {at_once} or more.")
    return notes


def _print(document: dict[str, Any], capacity: Capacity) -> None:
    console = Console(highlight=False)
    table = Table(
        title=f"{document['model']}: prompt {document['prompt_len']:,}, "
        f"output {document['output_len']:,} tokens, budget {document['budget']:,}",
        title_justify="left",
    )
    table.add_column("per GPU")
    for side in capacity.sides:
        table.add_column(side.label, justify="right")
    weights = "not counted"
    if document["weight_bytes"]:
        weights = format_size(document["weight_bytes"])
    observation = format_size(document["observation_bytes"])
    table.add_row("weights", weights, weights, weights)
    table.add_row("observation slots", "-", "-", observation)
    for label, key, form in (
        ("KV cache", "cache_bytes", format_size),
        ("KV bytes per token", "bytes_per_token", "{:,}".format),
        ("pool, blocks", "pool_blocks", "{:,}".format),
        ("pool, tokens", "pool_tokens", "{:,}".format),
        ("tokens per request, mean over its life", "request_mean_tokens", "{:,.0f}".format),
        ("tokens per request, peak", "request_peak_tokens", "{:,}".format),
        ("requests at once, peak", "at_once_peak", "{:,}".format),
        ("requests at once, mean", "at_once_mean", "{:,}".format),
    ):
        values = [form(side[key]) for side in document["sides"].values()]
        table.add_row(label, *values, style="bold" if key == "at_once_peak" else "")
    console.print(table)
    for other, label in (("stock", "stock"), ("stock_fp8", "stock with an fp8 cache")):
        crossover = document["crossover"][other]
        console.print(
            f"R-KV holds more than {label} from an output of {_tokens(crossover['peak'])} "
            f"(against its mean: {_tokens(crossover['mean'])}).",
            soft_wrap=True,
        )
    for note in document["notes"]:
        console.print(f"Note: {note}", soft_wrap=True)


def _tokens(crossover: int | None) -> str:
    return "no length that this pool holds" if crossover is None else f"{crossover:,} tokens"
