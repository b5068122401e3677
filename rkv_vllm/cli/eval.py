"""`rkv-vllm eval`: what a budget costs in accuracy, stock vLLM beside it.

Reads the options and prints the answer; what is refused stands in `eval_input.py`, the measuring in
`rkv_vllm/eval/`.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from rkv_vllm.bench.card import CODE, make_card
from rkv_vllm.bench.processes import ChildError, InterruptedBySignal, ended_by_signals
from rkv_vllm.cli.bench_input import usage_errors
from rkv_vllm.cli.errors import REFUSED, check_plot, one_line_errors, plot_errors
from rkv_vllm.cli.options import DTYPES, RKV, ModelArgument, option, tokens
from rkv_vllm.eval.plan import EvalPlan
from rkv_vllm.eval.store import CARD, ResultStore, StoreError
from rkv_vllm.options import ServerOptions

_PROBLEMS = "Problems"
_ANSWERS = "Answers"
_ENGINE = "Engine, equal on all sides"
_SERVER = "A running server, which nobody else uses meanwhile"
_MEASURED = "What is measured"

EngineFlags = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="-- ENGINE_FLAGS",
        help="Flags of vllm serve, after `--`, for all sides alike, such as --max-num-seqs "
        "(default: 256); --kv-seats and the like, for the compressed sides.",
    ),
]
_SETS = (
    "math500, math500:1-3 (levels), aime24, trace, trace:40 (lines of each program), or your own "
    'file: one {"question": "...", "answer": "..."} per line. Repeat it for several sets.'
)
Problems = Annotated[list[str], option(_PROBLEMS, "SET|FILE.jsonl", _SETS)]
_LIMIT = "Problems of each set, a sample that --seed draws. Default: all."
Limit = Annotated[int | None, option(_PROBLEMS, "PROBLEMS", _LIMIT, min=1)]
_METHODS = (
    "Names with commas between; options of the method, or window and buffer, in brackets: "
    '"rkv,rkv[lam=0.2],snapkv[window=16]".'
)
Methods = Annotated[str, option(RKV, "NAMES", _METHODS)]
_BUDGETS = "Memory of a request, a protected prompt counted in; a side for each, commas between."
Budgets = Annotated[str, option(RKV, "TOKENS", _BUDGETS)]
_PROTECT = "none, prompt or both, with a comma; of a budget, at most three quarters are protected."
Protect = Annotated[str, option(RKV, "none|prompt", _PROTECT)]
Buffer = Annotated[int, tokens(RKV, "Between two compactions.", "--buffer", "--kv-buffer")]
_WINDOW = (
    "Newest tokens, always kept, whose queries judge the others. With --base-url: that server's."
)
Window = Annotated[int, tokens(RKV, _WINDOW, "--window", "--kv-window")]
MaxTokens = Annotated[int, tokens(_ANSWERS, "Of one output; what is longer is cut off.")]
_TEMPERATURE = "0 takes the likeliest token."
Temperature = Annotated[float, option(_ANSWERS, "NUMBER", _TEMPERATURE)]
TopP = Annotated[float, option(_ANSWERS, "NUMBER", "Nucleus of the distribution sampled from.")]
_SAMPLES = "For each problem, with the seeds --seed, --seed + 1 and so on, the same on all sides."
Samples = Annotated[int, option(_ANSWERS, "OUTPUTS", _SAMPLES, min=1)]
_SEED = "Of the samples, of the choice of problems, and of the engines."
Seed = Annotated[int, option(_ANSWERS, "NUMBER", _SEED)]
_FREE = (
    "Whether compressed sides write answers of their own; without, only stock does, for --forced."
)
FreeRunning = Annotated[
    bool, typer.Option("--free-running/--no-free-running", help=_FREE, rich_help_panel=_MEASURED)
]
_FORCED = (
    "Also force stock's answers through every side: how often the likeliest next token stays the "
    "same, and the KL divergence. Cheaper than accuracy, and far less noisy."
)
Forced = Annotated[bool, typer.Option("--forced", help=_FORCED, rich_help_panel=_MEASURED)]
_ROUNDS = "Parts of the problems; the sides take turns in each. Each costs a start per engine."
Rounds = Annotated[int, option(_MEASURED, "ROUNDS", _ROUNDS, min=1)]
_AT_ONCE = (
    "Serve all sides of a method as one batch: several times faster where a step's time hardly "
    "depends on its requests, but speeds cannot be told apart."
)
AtOnce = Annotated[bool, typer.Option("--at-once", help=_AT_ONCE, rich_help_panel=_MEASURED)]
Dtype = Annotated[str, option(_ENGINE, "DTYPE", f"Of weights and cache: {', '.join(DTYPES)}.")]
_BASE_URL = (
    "Measure this OpenAI endpoint of vllm serve --kv-compression instead of engines of this "
    "command. Sides are options of requests (vllm_xargs); MODEL is the name that it serves."
)
BaseUrl = Annotated[str | None, option(_SERVER, "URL", _BASE_URL)]
_STOCK_URL = (
    "Measure the server of --base-url as it is, against the one here: two sides, no others."
)
StockUrl = Annotated[str | None, option(_SERVER, "URL", _STOCK_URL)]
_OPEN = "Open at the same time."
Concurrency = Annotated[int, option(_SERVER, "REQUESTS", _OPEN, min=1)]
_OUT = (
    "Takes each result as it comes. If it is there, the evaluation goes on with it: what it "
    "holds is not done again, and further sides, problems or samples are added."
)
OutFile = Annotated[Path, typer.Option("--out", "-o", metavar="FILE.jsonl", help=_OUT)]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one line, the JSON document; no card, no table.")
]
PlotFile = Annotated[
    Path | None, typer.Option(metavar="FILE.png", help="Draw accuracy over budget.")
]


def run_evaluation(
    model: ModelArgument,
    engine_flags: EngineFlags = None,
    problems: Problems = ("trace",),
    limit: Limit = None,
    methods: Methods = ServerOptions.method,
    budgets: Budgets = "128",
    protect: Protect = "none",
    buffer: Buffer = 64,
    window: Window = ServerOptions.window,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    samples: Samples = 1,
    seed: Seed = 0,
    forced: Forced = False,
    free_running: FreeRunning = True,
    rounds: Rounds = 1,
    at_once: AtOnce = False,
    dtype: Dtype = "auto",
    base_url: BaseUrl = None,
    stock_url: StockUrl = None,
    concurrency: Concurrency = 16,
    out: OutFile = Path("eval.jsonl"),
    as_json: AsJson = False,
    plot: PlotFile = None,
) -> None:
    """Measure what a budget costs: the same problems answered by stock vLLM and by each side.

    Every method x protection x budget is a side, stock is always one. Each method runs in a process
    of its own, all requests of a side at once; a budget is memory, so a protected prompt counts
    against it. A side without any compaction gets no numbers.

    Standard output: card, tables and, as its last line, one JSON document. Ctrl-C ends every
    process and shows what is finished; the same command goes on from there.

    Examples, with the model that `make model` unpacks:

    ```
    M=.models/SmolLM2-135M-Instruct
    rkv-vllm eval $M --problems trace:10 --limit 8 --methods rkv,snapkv --budgets 96,160
    rkv-vllm eval $M --problems math500:1 --limit 8 --forced --no-free-running --plot kl.png
    rkv-vllm eval $M --problems mine.jsonl --temperature 0.6 --samples 4 -- --max-num-seqs 32
    rkv-vllm eval $M --base-url http://127.0.0.1:8000 --budgets 128,256
    ```

    Exit codes: 0 fine; 1 a side without compactions or with more than its budget, or a process
    failed; 2 the command line is
    wrong; 130 Ctrl-C.
    """
    # Only now: they import what comes with vLLM.
    from rkv_vllm.cli import eval_input
    from rkv_vllm.eval.server import ServerError, run_served_eval
    from rkv_vllm.eval.session import run_offline_eval

    failure, exit_code, store = None, 0, None
    with one_line_errors():
        try:
            with ended_by_signals():
                with usage_errors():
                    options = eval_input.EvalOptions(
                        model=model,
                        engine_flags=engine_flags or (),
                        problems=problems,
                        limit=limit,
                        methods=methods,
                        budgets=budgets,
                        protect=protect,
                        buffer=buffer,
                        window=window,
                        max_tokens=max_tokens,
                        temperature=temperature,
                        top_p=top_p,
                        samples=samples,
                        seed=seed,
                        forced=forced,
                        free_running=free_running,
                        rounds=rounds,
                        at_once=at_once,
                        dtype=dtype,
                        base_url=base_url,
                        stock_url=stock_url,
                    )
                    check_plot(plot)
                    plan, endpoints = eval_input.make_plan(options)
                    card = {**make_card(model), "options": eval_input.card_options(plan, options)}
                    store = eval_input.open_store(out, {"kind": CARD, **card})
                if endpoints:
                    run_served_eval(plan, store, endpoints, concurrency)
                else:
                    run_offline_eval(plan, store)
        except ChildError as error:
            hint = "; its log ends as above" if error.log_tail else ""
            typer.echo("\n".join([*error.log_tail, f"Error: {error}{hint}"]), err=True)
            failure, exit_code = str(error), REFUSED
        except (ServerError, StoreError) as error:
            typer.echo(f"Error: {error}", err=True)
            failure, exit_code = str(error), REFUSED
        except InterruptedBySignal as interruption:
            typer.echo("Interrupted.", err=True)
            failure, exit_code = "interrupted", interruption.exit_code
        if store is not None and store.lines:
            shown = _show(plan, store, failure, as_json, plot)
            exit_code = exit_code or shown
    raise typer.Exit(exit_code)


def _show(
    plan: EvalPlan, store: ResultStore, failure: str | None, as_json: bool, plot: Path | None
) -> int:
    """Print and draw what there is; the exit code that it deserves."""
    from rkv_vllm.eval.report import has_failed, make_document
    from rkv_vllm.eval.server import with_counts
    from rkv_vllm.eval.tables import print_report

    document = make_document(_card(store), plan, with_counts(store.lines), failure)
    if not as_json:
        print_report(document)
    typer.echo(json.dumps(document, allow_nan=False))
    # Last: whatever happens to the plot, what was measured is printed.
    if plot is not None:
        from rkv_vllm.eval.plot import draw

        with plot_errors():
            draw(plot, document)
    return REFUSED if has_failed(document) else 0


def _card(store: ResultStore) -> dict[str, Any]:
    """That of the first start, and what later ones ran with where it was other code."""
    first, *later = store.cards
    card = {name: value for name, value in first.items() if name != "kind"}
    others = []
    for each in later:
        changed = [f"{name} {each.get(name)}" for name in CODE if each.get(name) != first.get(name)]
        if changed:
            others.append(f"{each['date']}: {', '.join(changed)}")
    return {**card, "continued_by": others} if others else card
