"""`rkv-vllm bench`: what compression buys here, measured against stock vLLM.

Reads the options and prints the answer; what is refused stands in `bench_input.py`, the measuring
in `rkv_vllm/bench/`.
"""

import json
import math
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from rkv_vllm.bench.card import make_card
from rkv_vllm.bench.checks import Measured
from rkv_vllm.bench.processes import ChildError, InterruptedBySignal, ended_by_signals
from rkv_vllm.bench.report import make_document, print_report
from rkv_vllm.bench.sides import (
    make_compressed_sides,
    make_schedule,
    make_stock_sides,
    split_engine_flags,
)
from rkv_vllm.bench.workload import SCENARIOS
from rkv_vllm.cli.bench_input import (
    check_options,
    check_own_prompts,
    check_packages,
    make_workload,
    override,
    read_budgets,
    read_caches,
    read_numbers,
    read_whens,
    usage_errors,
)
from rkv_vllm.cli.errors import REFUSED, one_line_errors, plot_errors
from rkv_vllm.cli.options import DTYPES, RKV, ModelArgument, option

ScenarioName = Enum("ScenarioName", {name: name for name in SCENARIOS}, type=str)
ModeName = Enum("ModeName", {name: name for name in ("offline", "served", "both")}, type=str)
_LOAD = "Requests"
_ENGINE = "Engine, equal on all sides"
_ENGINE_OF_ONE = "Engine, further sides"
_CLIENT = "Arrival at a server (as for vllm bench serve)"


def _preset(panel: str, field: str, metavar: str, meaning: str, *flags: str, **more: Any) -> Any:
    """An option whose default is the scenario's."""
    names: dict[str, list[str]] = {}
    for name, scenario in SCENARIOS.items():
        value = getattr(scenario, field)
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        names.setdefault(shown or "none", []).append(name)
    defaults = ", ".join(f"{value} ({', '.join(of)})" for value, of in names.items())
    if len(names) == 1:
        (defaults,) = names
    return option(panel, metavar, f"{meaning} Default: {defaults}.", *flags, **more)


EngineFlags = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="-- ENGINE_FLAGS",
        help="Flags of vllm serve, after `--`, for all sides alike; --kv-window and the like, for "
        "the compressed sides.",
    ),
]
ScenarioOption = Annotated[
    ScenarioName,
    typer.Option(
        help="Preset for SmolLM2-135M on a small CPU machine. starved: memory decides how many "
        "requests run at once. ample: compression can only cost. burst: many prompts at once, "
        "short answers. long-prompt: prompts are most of the cache. mixed: lengths of all kinds. "
        "beyond-pool: no request fits into the pool; stock gets the smallest that it starts in. "
        "priorities: every other request may overtake. The other options override it."
    ),
]
ModeOption = Annotated[
    ModeName,
    typer.Option(help="offline: LLM.generate. served: vllm serve, loaded by vllm bench serve."),
]
Repeats = Annotated[int, typer.Option(metavar="RUNS", help="Runs of every side.", min=1)]
_KEPT = "Kept by a compaction; a side for each: repeat it, or put commas between."
Budgets = Annotated[
    list[str] | None, _preset(RKV, "budgets", "TOKENS", _KEPT, "--budget", "--kv-budget")
]
_WHEN = (
    "When compressed sides compact: always (every --buffer tokens), pressure (when the pool runs "
    "short). A side for each: repeat it, or put commas between. Default: that of vllm serve."
)
Whens = Annotated[list[str] | None, option(RKV, "always|pressure", _WHEN, "--when", "--kv-when")]
_CACHE = (
    "KV cache of the compressed sides: auto, fp8, fp8_e4m3, fp8_e5m2; with as many blocks as the "
    "same bytes hold. A side for each: repeat it, or put commas between; beside --baseline fp8 it "
    "shows fp8, compression, and both. One that does not start is reported. Default: auto."
)
_CACHE_FLAGS = ("--cache-dtype", "--kv-cache-dtype")
CacheDtypes = Annotated[list[str] | None, option(RKV, "auto|fp8|...", _CACHE, *_CACHE_FLAGS)]
_BETWEEN = "Between two compactions."
Buffer = Annotated[
    int | None, _preset(RKV, "buffer", "TOKENS", _BETWEEN, "--buffer", "--kv-buffer")
]
_ALL = "Requests, all different."
_NUM_FLAGS = ("--num-prompts", "--num-requests")
NumPrompts = Annotated[
    int | None, _preset(_LOAD, "num_prompts", "REQUESTS", _ALL, *_NUM_FLAGS, min=1)
]
_FORCED = "Forced output of each request; of several, commas between, requests take turns."
OutputLen = Annotated[str | None, _preset(_LOAD, "output_lens", "TOKENS", _FORCED, "--output-len")]
_FILLED = (
    "What the own prompts are filled up to with notes, at most, in turn as outputs; 0: not at all."
)
PromptLen = Annotated[str | None, _preset(_LOAD, "prompt_lens", "TOKENS", _FILLED, "--prompt-len")]
_URGENCY = (
    "Of the requests, in turn: the lower, the earlier (vLLM's --scheduling-policy priority, on all "
    "sides). Latencies are shown for each. Offline only."
)
Priority = Annotated[str | None, _preset(_LOAD, "priorities", "NUMBER", _URGENCY, "--priority")]
_OWN_PROMPTS = (
    'Your prompts, one {"prompt": "..."} per line, without a chat template: the model\'s own is '
    "applied. Default: tasks in arithmetic, about 70 tokens each."
)
DatasetPath = Annotated[Path | None, option(_LOAD, "FILE.jsonl", _OWN_PROMPTS)]
Seed = Annotated[int, option(_LOAD, "NUMBER", "Of the order of the prompts, and of the engines.")]
_BASELINE = (
    "A further side of stock vLLM with these flags of vllm serve, in quotes, such as "
    "'--max-num-seqs=4'; fp8: an fp8 KV cache, with as many blocks as the same bytes hold. Repeat "
    "it for more. One that does not start is reported with vLLM's reason."
)
Baselines = Annotated[list[str] | None, option(_ENGINE_OF_ONE, "FLAGS", _BASELINE, "--baseline")]
_POOL = "Held by the pool of KV blocks; 0: vLLM's own size."
PoolTokens = Annotated[int | None, _preset(_ENGINE, "pool_tokens", "TOKENS", _POOL, min=0)]
BlockSize = Annotated[int | None, _preset(_ENGINE, "block_size", "TOKENS", "Per block.", min=1)]
_DTYPE = f"Of weights and cache: {', '.join(DTYPES)}."
Dtype = Annotated[str | None, _preset(_ENGINE, "dtype", "DTYPE", _DTYPE)]
_RATE = "Requests that arrive per second; inf: all at once."
RequestRate = Annotated[float, option(_CLIENT, "PER_SECOND", _RATE)]
_OPEN = "Open at the same time. Default: all."
MaxConcurrency = Annotated[int | None, option(_CLIENT, "REQUESTS", _OPEN, min=1)]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one line, the JSON document; no card, no table.")
]
PlotFile = Annotated[
    Path | None, typer.Option(metavar="FILE.png", help="Draw speed and requests running at once.")
]


def run_benchmark(
    model: ModelArgument,
    engine_flags: EngineFlags = None,
    scenario: ScenarioOption = ScenarioName.starved,
    mode: ModeOption = ModeName.offline,
    repeats: Repeats = 1,
    budget: Budgets = None,
    when: Whens = None,
    cache_dtype: CacheDtypes = None,
    buffer: Buffer = None,
    baseline: Baselines = None,
    num_prompts: NumPrompts = None,
    output_len: OutputLen = None,
    prompt_len: PromptLen = None,
    priority: Priority = None,
    dataset_path: DatasetPath = None,
    seed: Seed = 0,
    pool_tokens: PoolTokens = None,
    block_size: BlockSize = None,
    dtype: Dtype = None,
    request_rate: RequestRate = math.inf,
    max_concurrency: MaxConcurrency = None,
    as_json: AsJson = False,
    plot: PlotFile = None,
) -> None:
    """Measure stock vLLM against compression: same prompts, same pool, same seeds.

    Stock means none of our options and vLLM's own defaults, or --baseline's. Every run is a fresh
    process, sides take turns, and the order turns round with each repeat. No ratio is given when
    requests were lost or cut short, when compactions do not add up (with --when pressure and room
    for all: none), or when a request too short to be compacted got another text than from stock.

    Standard output: card, table, ratios and, as its last line, one JSON document. Ctrl-C ends
    every process and prints the runs that are finished.

    Examples, with the model that `make model` unpacks; the first takes 8 to 12 minutes:

    ```
    M=.models/SmolLM2-135M-Instruct
    rkv-vllm bench $M -- --enforce-eager
    rkv-vllm bench $M --scenario ample --mode both --plot bench.png
    rkv-vllm bench $M --budget 128,256 --repeats 3 --json
    rkv-vllm bench $M --scenario burst --when always,pressure --baseline fp8
    rkv-vllm bench $M --baseline fp8 --cache-dtype auto,fp8
    ```

    Exit codes: 0 fine; 1 a check or a process failed; 2 the command line is wrong; 130 Ctrl-C.
    """
    # Only now: it imports what comes with vLLM.
    from rkv_vllm.bench.session import run_all

    measured = Measured()
    failure, exit_code = None, 0
    with one_line_errors():
        try:
            with ended_by_signals():
                with usage_errors():
                    common, compression = split_engine_flags(engine_flags or ())
                    preset = SCENARIOS[scenario.value]
                    load = override(
                        preset,
                        budgets=read_budgets(budget or ()),
                        buffer=buffer,
                        num_prompts=num_prompts,
                        output_lens=read_numbers("--output-len", output_len, least=1),
                        prompt_lens=read_numbers("--prompt-len", prompt_len),
                        priorities=read_numbers("--priority", priority, least=None),
                        pool_tokens=pool_tokens,
                        block_size=block_size,
                        dtype=dtype,
                        compression={**preset.compression, **compression},
                    )
                    whens, caches = read_whens(when or ()), read_caches(cache_dtype or ())
                    modes = ("offline", "served") if mode is ModeName.both else (mode.value,)
                    check_own_prompts(dataset_path, prompt_len)
                    check_options(load, whens, modes, request_rate)
                    check_packages(modes, plot)
                    workload = make_workload(
                        model, load, dataset_path, seed, request_rate, max_concurrency
                    )
                    sides = [
                        *make_stock_sides(workload, baseline or ()),
                        *make_compressed_sides(
                            workload,
                            load.budgets,
                            whens,
                            {"buffer": load.buffer, **load.compression},
                            caches,
                        ),
                    ]
                card = make_card(model)
                run_all(workload, make_schedule(modes, sides, repeats), common, measured)
        except ChildError as error:
            hint = "; its log ends as above" if error.log_tail else ""
            typer.echo("\n".join([*error.log_tail, f"Error: {error}{hint}"]), err=True)
            failure, exit_code = str(error), REFUSED
        except InterruptedBySignal as interruption:
            typer.echo("Interrupted.", err=True)
            failure, exit_code = "interrupted", interruption.exit_code
        if measured.results:
            document = make_document(card, workload, sides, repeats, measured, failure)
            _show(document, as_json, plot)
            if exit_code == 0 and any(each["ratios"] is None for each in document["results"]):
                exit_code = REFUSED
    raise typer.Exit(exit_code)


def _show(document: dict[str, Any], as_json: bool, plot: Path | None) -> None:
    if not as_json:
        print_report(document)
    typer.echo(json.dumps(document, allow_nan=False))
    # Last: whatever happens to the plot, what was measured is printed.
    if plot is not None:
        from rkv_vllm.bench.plot import draw

        with plot_errors():
            draw(plot, document)
