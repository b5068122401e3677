"""The checks of verify.py. Each returns one or more documents: name, ok, numbers, problems."""

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from children import HERE, ROOT, Child, Launcher
from comparisons import compare_outputs, compare_runs, compare_with_reference

Document = dict[str, Any]
# What stands for `ok` where a check could not be made; `reason` says why.
SKIPPED = "skipped"

# Attention backend and dtype of the equality checks; FLASH_ATTN has no float32.
BACKENDS = (
    ("TRITON_ATTN", "float32"),
    ("FLASH_ATTN", "bfloat16"),
    ("FLASHINFER", "bfloat16"),
    ("TRITON_ATTN", "bfloat16"),
)
GRAPH_MODES = ("full", "piecewise", "default")

# What vLLM takes by default for FLASH_ATTN, and the least that CPU_ATTN takes.
GPU_BLOCK_SIZE, REHEARSAL_BLOCK_SIZE = 16, 32

AMPLE_AIM, FLOOR_AIM, BATCHED_AIM, SHARE_AIM = 0.98, 3.0, 5.0, 0.02


@dataclass(frozen=True)
class Plan:
    """What the command line asked for.

    Attributes:
        rehearse: in miniature on a CPU.
        jobs: tiny engines at the same time.
        model: folder of the 8B-shaped model.
        pools: tokens, of the starved phase.
        requests: of the ample and starved phases.
        output_len: of the ample and starved phases.
        fresh_engines: one engine per pool size.
        long_scale: divides lengths, budgets and pool of the long phase.
        long_requests: of the long phase.
        long_pool: tokens at scale 1.
    """

    rehearse: bool
    jobs: int
    model: str
    pools: list[int]
    requests: int
    output_len: int
    fresh_engines: bool
    long_scale: int
    long_requests: int
    long_pool: int


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
    problems = [child.problem for child in children if child.problem]
    passed = 0
    for child in children:
        if child.result:
            problems += child.result["failures"]
            passed += child.result["passed"]
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
    missing = [name for name, _ in backends if name == "FLASHINFER" and not _has_flashinfer()]
    backends = [pair for pair in backends if pair[0] not in missing]
    modes = {backend: _modes(backend, plan) for backend, _ in backends}
    runs = {}
    for backend, dtype in backends:
        for mode in ("eager", *modes[backend]):
            runs[f"{backend or 'cpu'}-{dtype}-{mode}"] = (mode, backend, dtype)
    with ThreadPoolExecutor(plan.jobs) as pool:
        futures = {n: pool.submit(_engine, launcher, plan, n, *run) for n, run in runs.items()}
        children = {name: future.result() for name, future in futures.items()}
        explicit = pool.map(lambda pair: _explicit(launcher, *pair, children), backends)
        documents = dict(zip(backends, explicit, strict=True))
    for backend, dtype in backends:
        prefix = f"{backend or 'cpu'}-{dtype}"
        for mode in modes[backend]:
            pair = children[f"{prefix}-{mode}"], children[f"{prefix}-eager"]
            yield _equal(f"equality {prefix} {mode} = eager", *pair, dtype, plan.rehearse)
        yield documents[backend, dtype]
    for name in missing:
        yield _skipped(f"equality {name}", "flashinfer is not installed")


def _modes(backend: str, plan: Plan) -> tuple[str, ...]:
    if plan.rehearse:
        return ("full",)
    # vLLM's own check that no step waits for the device concerns our code, not the backend's.
    return (*GRAPH_MODES, "unsynced") if backend == "FLASH_ATTN" else GRAPH_MODES


def _engine(
    launcher: Launcher, plan: Plan, name: str, mode: str, backend: str, dtype: str
) -> Child:
    args = ["--mode", mode, "--dtype", dtype, "--model", str(launcher.folder / "random-model")]
    args += ["--backend", backend] if backend else []
    env = {"VLLM_GPU_SYNC_CHECK": "error"} if mode == "unsynced" else {}
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


def _explicit(launcher: Launcher, backend: str, dtype: str, children: dict[str, Child]) -> Document:
    prefix = f"{backend or 'cpu'}-{dtype}"
    engine = children[f"{prefix}-eager"]
    name = f"equality {prefix} eager = explicit eviction"
    if engine.problem:
        return _document(name, [engine.problem], {}, engine.seconds)
    args = ["--mode", "reference", "--dtype", dtype, "--forced", str(engine.file)]
    args += ["--model", str(launcher.folder / "random-model")]
    child = launcher.run(f"equality-{prefix}-reference", HERE / "one_engine.py", args, 120)
    if child.problem:
        return _document(name, [child.problem], {}, child.seconds)
    numbers = compare_with_reference(engine.result, child.result)
    return _document(name, numbers.pop("problems"), numbers, child.seconds)


def _has_flashinfer() -> bool:
    from importlib.util import find_spec

    return find_spec("flashinfer") is not None


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
        document = child.result
        problems = list(document["failed_checks"])
        for case in document["cases"]:
            problems += [] if plan.rehearse else _missed_aims(case)
        yield _document(f"timings {name}", problems, document, child.seconds)


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


def ample(launcher: Launcher, plan: Plan) -> Iterator[Document]:
    """All the memory there is: compression can only cost."""
    workload = _shared_prefix(plan, [0])
    documents = list(_serve(launcher, plan, "ample", workload))
    for document in documents:
        run = document["numbers"].get("rkv", {})
        ratio = document["numbers"].get("ratio")
        if not plan.rehearse and ratio is not None and ratio < AMPLE_AIM:
            document["problems"].append(f"ratio {ratio:.3f}, aim {AMPLE_AIM}")
        if not plan.rehearse and run.get("flush_share", 0.0) > SHARE_AIM:
            share = run["flush_share"]
            document["problems"].append(f"compaction takes {share:.1%} of the run, aim 2 %")
        document["ok"] = not document["problems"]
    yield from documents


def starved(launcher: Launcher, plan: Plan) -> Iterator[Document]:
    """The same requests in smaller and smaller pools."""
    pools = sorted(plan.pools, reverse=True)
    if not plan.fresh_engines:
        yield from _serve(launcher, plan, "starved", _shared_prefix(plan, pools))
        return
    for pool in pools:
        workload = _shared_prefix(plan, [0])
        # One block more than that, vLLM's null block.
        blocks = pool // (REHEARSAL_BLOCK_SIZE if plan.rehearse else GPU_BLOCK_SIZE) + 1
        workload["engine"]["num_gpu_blocks_override"] = blocks
        yield from _serve(launcher, plan, f"starved-{pool}", workload)


def long(launcher: Launcher, plan: Plan) -> Iterator[Document]:
    """Outputs of 16K from short prompts, at two budgets; the stock side is run once."""
    scale = plan.long_scale
    base = {
        "model": plan.model,
        "num_requests": plan.long_requests,
        "shared_len": 0,
        "own_len": max(16, 128 // scale),
        "output_len": 16384 // scale,
        "pools": [plan.long_pool // scale],
        "engine": _engine_options(plan, 16384 // scale + 256),
    }
    stock = None
    for budget, share in ((1024, 0.5), (1638, 1.0)):
        lengths = {"budget": budget // scale, "buffer": max(8, 128 // scale)}
        workload = {**base, **lengths}
        stock = stock or _side(launcher, plan, "long-stock", workload, 0.5)
        ours = _side(launcher, plan, f"long-{budget}-rkv", workload, share)
        yield from _pairs(f"long budget {budget} / scale {scale}", stock, ours)


def _shared_prefix(plan: Plan, pools: list[int]) -> Document:
    """Prompts of about 700 tokens of which 512 are shared, or of 70 in a rehearsal."""
    shared, own, budget, buffer = (48, 22, 32, 16) if plan.rehearse else (512, 188, 256, 128)
    return {
        "model": plan.model,
        "num_requests": plan.requests,
        "shared_len": shared,
        "own_len": own,
        "output_len": plan.output_len,
        "budget": budget,
        "buffer": buffer,
        "pools": pools,
        "engine": _engine_options(plan, shared + own + plan.output_len + 16),
    }


def _engine_options(plan: Plan, max_model_len: int) -> Document:
    """The same on both sides; all else is vLLM's default."""
    if not plan.rehearse:
        return {"dtype": "bfloat16", "max_model_len": max(2048, max_model_len)}
    # A few megabytes: 4096 tokens of the random model.
    pool = {"kv_cache_memory_bytes": 4096 * 4 * 2 * 2 * 64 * 4}
    return {
        "dtype": "float32",
        "max_model_len": max_model_len,
        "enforce_eager": True,
        "max_num_seqs": 16,
        "block_size": REHEARSAL_BLOCK_SIZE,
        **pool,
    }


def _serve(launcher: Launcher, plan: Plan, name: str, workload: Document) -> Iterator[Document]:
    """Both sides, each with at most half of the time that is left."""
    stock = _side(launcher, plan, f"{name}-stock", workload, 0.5)
    ours = _side(launcher, plan, f"{name}-rkv", workload, 1.0)
    yield from _pairs(name, stock, ours)


def _side(launcher: Launcher, plan: Plan, name: str, workload: Document, share: float) -> Child:
    side = name.rsplit("-", 1)[1]
    args = ["--side", side, "--workload", json.dumps(workload)]
    args += ["--make-model"] if plan.rehearse else []
    return launcher.run(name, HERE / "one_server.py", args, share * launcher.seconds_left)


def _pairs(name: str, stock: Child, ours: Child) -> Iterator[Document]:
    """One document per pool that both sides served."""
    seconds = stock.seconds + ours.seconds
    problems = [child.problem for child in (stock, ours) if child.problem]
    runs = [child.result["runs"] if child.result else [] for child in (stock, ours)]
    served = list(zip(*runs, strict=False))
    for pair in served:
        numbers = compare_runs(*pair)
        label = f"{name}, pool of {pair[0]['pool_tokens']} tokens"
        yield _document(label, numbers.pop("problems"), numbers, seconds)
    if problems or not served:
        yield _document(f"{name}, both sides to the end", problems or ["no run"], {}, seconds)


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
    "timings": (timings, 40),
    "sanitizer": (sanitizer, 30),
    "ample": (ample, 150),
    "starved": (starved, 200),
    "long": (long, 200),
}
