"""The checks of verify.py. Each returns one or more documents: name, ok, numbers, problems."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from children import HERE, ROOT, Child, Launcher
from comparisons import compare_outputs, compare_stock, compare_with_reference

from rkv_vllm.bench.checks import failed_checks
from rkv_vllm.bench.sides import STOCK
from rkv_vllm.bench.workload import Workload
from rkv_vllm.options import ServerOptions

Document = dict[str, Any]
# What stands for `ok` where a check could not be made; `reason` says why.
SKIPPED = "skipped"

# Attention backend and dtype of the equality checks; FLASH_ATTN has no float32. Not bfloat16: the
# random model is made to depend on every key, and 8 bits part an engine from explicit eviction half
# as far as a full cache does (measured on a CPU: 1.06 of 2.82; float16 0.17, float32 0.000003).
BACKENDS = (
    ("TRITON_ATTN", "float32"),
    ("FLASH_ATTN", "float16"),
    ("FLASHINFER", "float16"),
)
GRAPH_MODES = ("full", "piecewise", "default")
# Stock vLLM, and the modes that go wrong when it does.
STOCK_MODE, LIKE_STOCK = "stock", ("full", "unsynced")

# What vLLM takes by default for FLASH_ATTN, and the least that CPU_ATTN takes.
GPU_BLOCK_SIZE, REHEARSAL_BLOCK_SIZE = 16, 32
WARM_UP_REQUESTS = 8
# How much longer than another side stock vLLM may take.
STOCK_WEIGHT = 1.6

LOADS = ("small", "ample", "starved", "long", "again")

AMPLE_AIM, FLOOR_AIM, BATCHED_AIM, SHARE_AIM = 0.98, 3.0, 5.0, 0.02


@dataclass(frozen=True)
class Plan:
    """What the command line asked for.

    Attributes:
        rehearse: in miniature on a CPU.
        jobs: tiny engines at the same time.
        model: folder of the 8B-shaped model.
        pools: tokens, of the starved loads.
        requests: of the ample and starved loads.
        output_len: of the ample and starved loads; the long one has four times that.
        modes: of the equality checks, none for all.
        loads: of the serving phase, see `LOADS`.
        whens: `--kv-when` of the sides beside stock.
    """

    rehearse: bool
    jobs: int
    model: str
    pools: list[int]
    requests: int
    output_len: int
    modes: tuple[str, ...] = ()
    loads: tuple[str, ...] = LOADS
    whens: tuple[str, ...] = (ServerOptions.when,)


def kernels(launcher: Launcher, plan: Plan) -> Iterator[Document]:
    """Every Triton kernel against naive."""
    args = ["--small"] if plan.rehearse else []
    env = {"TRITON_INTERPRET": "1"} if plan.rehearse else {}

    def run(part: int) -> Child:
        share = ["--part", str(part), "--parts", str(plan.jobs)]
        script = HERE / "checked_kernels.py"
        return launcher.run(f"kernels-{part}", script, [*args, *share], 240, env=env)

    # Most of the time Triton compiles, on one CPU per process.
    with ThreadPoolExecutor(plan.jobs) as pool:
        children = list(pool.map(run, range(plan.jobs)))
    results = [child.result for child in children if child.result]
    problems = [child.problem for child in children if child.problem]
    problems += [failure for result in results for failure in result["failures"]]
    passed = sum(result["passed"] for result in results)
    yield _document("kernels", problems, {"passed": passed}, max(c.seconds for c in children))


def sanitizer(launcher: Launcher, plan: Plan) -> Iterator[Document]:
    """compute-sanitizer memcheck on one compaction."""
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if tool is None and not plan.rehearse:
        yield _skipped("sanitizer", "compute-sanitizer is not installed")
        return
    # torch's allocator would hide an access beyond a tensor inside a larger allocation.
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # What torch asks the driver in vain is not this check's business.
    options = ["--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "99"]
    prefix = [] if tool is None else [tool, *options]
    child = launcher.run("sanitizer", HERE / "one_compaction.py", [], 240, env=env, prefix=prefix)
    problems = [child.problem] if child.problem else []
    if child.result:
        problems += child.result["failures"]
    yield _document("sanitizer", problems, {"tool": tool or "none: rehearsal"}, child.seconds)


def equality(launcher: Launcher, plan: Plan) -> Iterator[Document]:
    """Every graph mode says what the eager engine says, and that what explicit eviction says."""
    backends = [("", "float32")] if plan.rehearse else list(BACKENDS)
    if find_spec("flashinfer") is None:
        backends = [pair for pair in backends if pair[0] != "FLASHINFER"]
        if not plan.rehearse:
            yield _skipped("equality FLASHINFER", "flashinfer is not installed")
    modes = {backend: _modes(backend, plan) for backend, _ in backends}
    runs = {
        f"{backend or 'cpu'}-{dtype}-{mode}": (mode, backend, dtype)
        for backend, dtype in backends
        for mode in ("eager", *modes[backend])
    }
    with ThreadPoolExecutor(plan.jobs) as pool:
        engines = pool.map(lambda name: _engine(launcher, plan, name, *runs[name]), runs)
        children = dict(zip(runs, engines, strict=True))
        explicit = list(pool.map(lambda name: _explicit(launcher, children[name], name), runs))
    for backend, dtype in backends:
        prefix = f"{backend or 'cpu'}-{dtype}"
        stock = next((c for c in explicit if c["name"].startswith(f"{STOCK_MODE} {prefix}")), None)
        for mode in modes[backend]:
            if mode != STOCK_MODE:
                pair = children[f"{prefix}-{mode}"], children[f"{prefix}-eager"]
                yield _equal(f"equality {prefix} {mode} = eager", *pair, dtype, plan.rehearse)
            if mode in LIKE_STOCK and stock and stock["problems"]:
                name = f"equality {prefix}-{mode} = explicit eviction"
                failed = next(check for check in explicit if check["name"] == name)
                failed |= {"ok": SKIPPED, "reason": f"see {stock['name']}"}
    yield from explicit


def _modes(backend: str, plan: Plan) -> tuple[str, ...]:
    if plan.rehearse:
        return ("full", STOCK_MODE)
    # vLLM's own check that no step waits for the device concerns our code, not the backend's.
    modes = (*GRAPH_MODES, "unsynced", STOCK_MODE) if backend == "FLASH_ATTN" else GRAPH_MODES
    return tuple(mode for mode in modes if not plan.modes or mode in plan.modes)


def _engine(
    launcher: Launcher, plan: Plan, name: str, mode: str, backend: str, dtype: str
) -> Child:
    args = ["--mode", mode, "--dtype", dtype, "--model", str(launcher.folder / "random-model")]
    args += ["--backend", backend] if backend else []
    # Triton multiplies float32 as TF32 by default, 10 bits: another order of additions in one graph
    # mode would then choose other survivors.
    env = {"TRITON_F32_DEFAULT": "tf32x3"}
    if mode == "unsynced":
        env["VLLM_GPU_SYNC_CHECK"] = "error"
    if plan.rehearse:
        args += ["--num-tokens", "90", "--without-graphs"]
        env = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
        env["PYTHONPATH"] = f"{launcher.env['PYTHONPATH']}:{ROOT / 'tests' / 'triton_stub'}"
    return launcher.run(f"equality-{name}", HERE / "one_engine.py", args, 240, env=env)


def _equal(name: str, got: Child, expected: Child, dtype: str, rehearse: bool) -> Document:
    seconds = got.seconds + expected.seconds
    problems = [child.problem for child in (got, expected) if child.problem]
    if problems:
        return _document(name, problems, {}, seconds)
    numbers = compare_outputs(got.result, expected.result, dtype)
    for key in ("async_scheduling", "cudagraph_mode", "graph_replays"):
        numbers[key] = got.result[key]
    if not rehearse and not numbers["graph_replays"]:
        numbers["problems"].append("no graph was replayed")
    if not rehearse and not numbers["async_scheduling"]:
        numbers["problems"].append("asynchronous scheduling is off")
    return _document(name, numbers.pop("problems"), numbers, seconds)


def _explicit(launcher: Launcher, engine: Child, run: str) -> Document:
    is_stock = run.endswith(STOCK_MODE)
    name = f"equality {run} = explicit eviction"
    if is_stock:
        name = f"{STOCK_MODE} {run.removesuffix(f'-{STOCK_MODE}')}, full graphs = transformers"
    if engine.problem:
        return _document(name, [engine.problem], {}, engine.seconds)
    args = ["--mode", "reference", "--dtype", run.split("-")[1], "--forced", str(engine.file)]
    args += ["--model", str(launcher.folder / "random-model")]
    child = launcher.run(f"equality-{run}-reference", HERE / "one_engine.py", args, 120)
    if child.problem:
        return _document(name, [child.problem], {}, child.seconds)
    compare = compare_stock if is_stock else compare_with_reference
    numbers = compare(engine.result, child.result)
    return _document(name, numbers.pop("problems"), numbers, child.seconds)


def timings(launcher: Launcher, plan: Plan) -> Iterator[Document]:
    """bench_kernels.py on an 8B shape; aims: 3 times the copy floor, 5 times the n x n version."""
    args = ["--head-sizes", "128", "--no-model", "--seconds", "2", "--longest-naive", "4224"]
    # One request at all lengths; of a batch of sixteen the last lengths would not fit.
    runs = {"one": ["--lengths", "384", "1152", "4224", "32768"]}
    runs["sixteen"] = ["--lengths", "384", "1152", "--requests", "16"]
    if plan.rehearse:
        args, runs = ["--smoke"], {"one": [], "sixteen": ["--requests", "2"]}
    for name, lengths in runs.items():
        script = ROOT / "benchmarks" / "bench_kernels.py"
        child = launcher.run(f"timings-{name}", script, [*args, *lengths], 200)
        if child.result is None:
            yield _document(f"timings {name}", [child.problem], {}, child.seconds)
            continue
        problems = list(child.result["failed_checks"])
        for case in child.result["cases"]:
            problems += [] if plan.rehearse else _missed_aims(case)
        yield _document(f"timings {name}", problems, child.result, child.seconds)


def _missed_aims(case: Document) -> list[str]:
    """Aims of one request of 1152 tokens."""
    if (case["num_tokens"], case["num_requests"]) != (1152, 1) or case["speedup"] is None:
        return []
    missed = []
    if case["times_copy_floor"] > FLOOR_AIM:
        missed.append(f"{case['times_copy_floor']:.1f} times the copy floor, aim {FLOOR_AIM}")
    slowest = min(ratio for name, ratio in case["speedup"].items() if name != "naive")
    if slowest < BATCHED_AIM:
        missed.append(f"{slowest:.1f} times the n x n version, aim {BATCHED_AIM}")
    return missed


def serving(launcher: Launcher, plan: Plan) -> Iterator[Document]:
    """Ample, starved and long loads on one engine per side; the second of them twice."""
    budget, buffer, loads = _loads(plan)
    flags = [f"--model={plan.model}", "--load-format=dummy", "--skip-tokenizer-init", "--seed=0"]
    longest = max(workload.total_lens[0] for workload in loads.values())
    flags += [f"--max-model-len={max(longest + 16, 0 if plan.rehearse else 2048)}"]
    flags += ["--dtype=bfloat16"]
    if plan.rehearse:
        # A few megabytes: 4096 tokens of the random model.
        flags[-1:] = ["--dtype=float32", "--enforce-eager", "--max-num-seqs=16"]
        flags += [f"--block-size={REHEARSAL_BLOCK_SIZE}"]
        flags += [f"--kv-cache-memory-bytes={4096 * 4 * 2 * 2 * 64 * 4}"]
    ours = ["--kv-compression=rkv", f"--kv-budget={budget}", f"--kv-buffer={buffer}"]
    sides = {STOCK: ([], None, ServerOptions.when)}
    for when in plan.whens:
        sides[f"budget {budget}, {when}"] = ([*ours, f"--kv-when={when}"], budget, when)
    children = []
    for side, (more, _, _) in sides.items():
        job = {"engine_flags": flags + more, "is_compressed": bool(more), "probes": []}
        job |= {"probe_len": 1, "loads": [_load(workload) for workload in loads.values()]}
        name = f"serving-{side.replace(',', '').replace(' ', '-')}"
        file = launcher.folder / f"{name}.job"
        file.write_text(json.dumps(job))
        args = ["--job", str(file)] + (["--make-model", plan.model] if plan.rehearse else [])
        # The stock side takes longer, but must leave the others their turn.
        weight, others = 1 if more else STOCK_WEIGHT, len(sides) - len(children) - 1
        limit = launcher.seconds_left * weight / (weight + others)
        children.append(launcher.run(name, HERE / "one_server.py", args, limit))
    seconds = sum(child.seconds for child in children)
    problems = [child.problem for child in children if child.problem]
    runs = [child.result["runs"] if child.result else [] for child in children]
    of_side = {"repeat": 1, "pool_tokens": None, "is_exact": True}
    served = list(zip(loads.items(), *runs, strict=False))[1:]
    for (label, workload), *of_load in served:
        stock, *results = [
            {"side": side, "budget": budget, "when": when, **of_side, **run}
            for (side, (_, budget, when)), run in zip(sides.items(), of_load, strict=True)
        ]
        for result in results:
            name = f"{label}, {result['when']}"
            yield _ratio(name, workload, [stock, result], plan.rehearse, seconds)
    if problems or len(served) < len(loads) - 1:
        missing = ["not all loads were served"]
        yield _document("serving, all sides to the end", problems or missing, {}, seconds)


def _loads(plan: Plan) -> tuple[int, int, dict[str, Workload]]:
    """Budget and buffer, and what is asked for, by its label; the warm-up first."""
    # Prompts of about 700 tokens of which 512 are shared, or of 70 in a rehearsal.
    shared, own, budget, buffer = (48, 22, 32, 16) if plan.rehearse else (512, 188, 256, 128)
    many = plan.requests, shared, own, plan.output_len, buffer
    few = max(2, plan.requests * 100 // 256), 0, max(16, budget // 8), 4 * plan.output_len, buffer
    warm_up = min(plan.requests, WARM_UP_REQUESTS), shared, own, buffer + 8, buffer
    small = min(plan.requests, 16), shared, own, plan.output_len // 2, buffer
    ample = _workload(plan, *many)
    loads = {"warm-up": _workload(plan, *warm_up)}
    if "small" in plan.loads:
        # Its caches hardly count in a step: it shows the price, a large batch the gain.
        loads["ample, small batch"] = _workload(plan, *small)
    if "ample" in plan.loads:
        loads["ample"] = ample
    if "starved" in plan.loads:
        for pool in sorted(plan.pools, reverse=True):
            loads[f"starved, pool of {pool} tokens"] = _workload(plan, *many, pool)
    if "long" in plan.loads:
        # A quarter of 16K tokens at a quarter of the budget of 1024, in a quarter of 430K tokens.
        pool = 2048 if plan.rehearse else 107_500
        loads[f"long outputs, {few[3]} tokens"] = _workload(plan, *few, pool)
    if "again" in plan.loads:
        # Last: it says how far two runs of the first one differ, and may be cut off.
        loads["ample again"] = ample
    return budget, buffer, loads


def _workload(
    plan: Plan, requests: int, shared: int, own: int, output_len: int, buffer: int, pool: int = 0
) -> Workload:
    """Prompts of random tokens, the same in every process; `pool` in tokens, 0 is all there is."""
    draw = random.Random(7)
    prefix = [draw.randrange(10, 900) for _ in range(shared)]
    prompts = [prefix + [draw.randrange(10, 900) for _ in range(own)] for _ in range(requests)]
    return Workload(
        model=plan.model,
        prompts=tuple(prompts),
        prompt_lens=(shared + own,) * requests,
        probe_lens=(1,),
        output_lens=(output_len,) * requests,
        buffer=buffer,
        pool_tokens=pool,
        block_size=REHEARSAL_BLOCK_SIZE if plan.rehearse else GPU_BLOCK_SIZE,
        bytes_per_token=0,
        element_bytes=0,
        dtype="float32" if plan.rehearse else "bfloat16",
        seed=0,
        request_rate=float("inf"),
        max_concurrency=None,
    )


def _load(workload: Workload) -> Document:
    load = {"prompts": workload.prompts, "output_lens": workload.output_lens, "priorities": ()}
    return load | ({"pool_blocks": workload.pool_blocks} if workload.pool_tokens else {})


def _ratio(
    label: str, workload: Workload, results: list[Document], rehearse: bool, seconds: float
) -> Document:
    """One load on both sides; no ratio where the runs cannot be compared."""
    stock, ours = results
    problems = failed_checks(workload, results)
    ratio = None if problems else ours["tokens_per_s"] / stock["tokens_per_s"]
    if not rehearse and ratio is not None and label.startswith("ample"):
        if ratio < AMPLE_AIM:
            problems.append(f"ratio {ratio:.3f}, aim {AMPLE_AIM}")
        if ours["flush_share"] > SHARE_AIM:
            problems.append(f"compaction takes {ours['flush_share']:.1%} of the run, aim 2 %")
    lists = ("prompt_lens", "output_lens", "probe")
    runs = [{key: value for key, value in run.items() if key not in lists} for run in results]
    return _document(label, problems, {"ratio": ratio, "stock": runs[0], "rkv": runs[1]}, seconds)


def _document(name: str, problems: list[str], numbers: Document, seconds: float) -> Document:
    return {
        "name": name,
        "ok": not problems,
        "problems": problems,
        "numbers": numbers,
        "seconds": round(seconds, 1),
    }


def _skipped(name: str, reason: str) -> Document:
    return {"name": name, "ok": SKIPPED, "reason": reason, "numbers": {}, "seconds": 0.0}


Phase = Callable[[Launcher, Plan], Iterator[Document]]
# In the order in which they are run: the cheapest and most telling first. Seconds below which a
# phase is not begun.
PHASES: dict[str, tuple[Phase, float]] = {
    "kernels": (kernels, 30),
    "equality": (equality, 90),
    "timings": (timings, 30),
    "serving": (serving, 250),
    "sanitizer": (sanitizer, 30),
}
