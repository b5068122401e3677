"""Every check that needs a GPU, in one call; the last line of its output is one JSON document.

Needs vLLM, this checkout, and neither pip nor a network: the package is put on the path as it lies
here. Each check runs in a child process with its own time limit and log, so one crash loses nothing
else. `--rehearse` runs all of it in miniature on a CPU. README.md beside this file says how to call
it; phases.py has the checks.
"""

import argparse
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

# The checkout itself: what starts the children needs neither torch nor the kernels.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from children import Launcher
from phases import LOADS, PHASES, SKIPPED, Plan
from site_folder import make_site_folder

from rkv_vllm.bench.card import make_card, printed
from rkv_vllm.fit.versions import installed_version
from rkv_vllm.options import ServerOptions

DISTRIBUTIONS = ("triton", "flashinfer-python")
REHEARSAL_ENV = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
}


def main() -> None:
    """Run the phases; the exit code is 1 when a check fails."""
    args = parse()
    started = time.monotonic()
    out = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    folder = Path(tempfile.mkdtemp(prefix="verify-"))
    launcher = Launcher(folder, _environment(folder, args), started + args.budget_s)
    document: dict[str, Any] = {"card": _card(args), "checks": []}
    for name in args.phases:
        phase, least = PHASES[name]
        if launcher.seconds_left < (5 if args.rehearse else least):
            reason = f"{launcher.seconds_left:.0f} s left, it takes {least:.0f} or more"
            document["checks"].append({"name": name, "ok": SKIPPED, "reason": reason})
            continue
        tell(f"{name}: {launcher.seconds_left:.0f} s left")
        try:
            for check in phase(launcher, plan_of(args, folder)):
                document["checks"].append(check)
                report(check)
        except Exception as error:
            # The phases after this one are worth having all the same.
            problem = f"{type(error).__name__}: {error}"
            document["checks"].append({"name": name, "ok": False, "problems": [problem]})
            report(document["checks"][-1])
        document["seconds"] = round(time.monotonic() - started, 1)
        save(document, launcher, out)
    save(document, launcher, out)
    if out is None:
        tell(f"logs in {folder}")
    else:
        shutil.rmtree(folder)
    # A lent machine returns the last 12,000 characters of output only.
    print(json.dumps(document if out is None else summary(document)))
    sys.exit(any(check["ok"] is False for check in document["checks"]))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python3 benchmarks/gpu/verify.py --phases kernels,equality",
    )
    add = parser.add_argument
    names = lambda text: text.split(",")  # noqa: E731
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    add("--phases", type=names, default=list(PHASES), help=f"of {','.join(PHASES)}; default all")
    add("--budget-s", type=float, default=560, help="seconds for everything (default: 560)")
    add("--rehearse", action="store_true", help="in miniature on a CPU")
    add("--commit", default="", help="of the checkout, where there is no git to ask")
    add("--jobs", type=int, default=8, help="tiny engines at the same time (default: 8)")
    add("--model", default="/tmp/kit/models/llama8b", help="8B-shaped folder; weights are random")
    add("--requests", type=int, default=256, help="ample and starved (default: 256)")
    add("--output-len", type=int, default=1024, help="ample and starved, tokens (default: 1024)")
    add("--pools", type=numbers, default=[134_000, 60_000], help="tokens, of the starved loads")
    add("--loads", type=names, default=[], help=f"of serving: {','.join(LOADS)}; default all")
    add("--when", type=names, default=[ServerOptions.when], help="--kv-when of serving's sides")
    add("--modes", type=names, default=[], help="of the equality checks, beside eager; default all")
    args = parser.parse_args()
    if unknown := set(args.phases) - set(PHASES):
        parser.error(f"--phases: got {', '.join(sorted(unknown))}, wanted some of {list(PHASES)}")
    if unknown := set(args.loads) - set(LOADS):
        parser.error(f"--loads: got {', '.join(sorted(unknown))}, wanted some of {list(LOADS)}")
    return args


def plan_of(args: argparse.Namespace, folder: Path) -> Plan:
    """What the phases have to know of the command line."""
    if args.rehearse:
        model = str(folder / "random-model")
        plan = Plan(True, jobs=1, model=model, pools=[2048, 1024], requests=8, output_len=80)
    else:
        sizes = args.pools, args.requests, args.output_len
        plan = Plan(False, args.jobs, args.model, *sizes, modes=tuple(args.modes))
    return replace(plan, loads=tuple(args.loads) or LOADS, whens=tuple(args.when))


def _environment(folder: Path, args: argparse.Namespace) -> dict[str, str]:
    site = make_site_folder(folder / "site")
    # Both sides run in one process, so that scheduler and compactor can be watched.
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    # Several children at a time must not each take all CPUs.
    env["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // max(args.jobs, 1)))
    env["PYTHONPATH"] = ":".join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    return {**env, **(REHEARSAL_ENV if args.rehearse else {})}


def _card(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on."""
    card = {**make_card(args.model), "argv": sys.argv[1:]}
    query = "--query-gpu=name,driver_version,memory.total"
    card["gpu"] = printed("nvidia-smi", query, "--format=csv,noheader") or "unknown"
    card["commit"] = args.commit or card.get("commit", "unknown")
    return {**card, **{name: installed_version(name) or "missing" for name in DISTRIBUTIONS}}


def report(check: dict[str, Any]) -> None:
    """One line per check while the rest is running."""
    verdict = {True: "ok", False: "FAILED"}.get(check["ok"], check["ok"])
    reasons = "; ".join([*check.get("problems", []), check.get("reason", "")]).strip("; ")
    ratio = check.get("numbers", {}).get("ratio")
    tell(f"{verdict:8} {check['name']}" + (f" ratio {ratio:.3f}" if ratio else ""))
    if reasons:
        tell(f"         {reasons[:600]}")


def tell(message: str) -> None:
    """Progress, beside the document."""
    print(message, file=sys.stderr, flush=True)


def summary(document: dict[str, Any]) -> dict[str, Any]:
    """The document without its numbers, but for ratios and what failed."""
    names = ("name", "ok", "reason", "problems", "seconds")
    checks = []
    for check in document["checks"]:
        found = {name: check[name] for name in names if check.get(name) not in (None, [], "")}
        checks.append({**found, "ratio": check.get("numbers", {}).get("ratio")})
    return {**document, "checks": checks}


def save(document: dict[str, Any], launcher: Launcher, out: Path | None) -> None:
    """Write what is known so far, and the logs, in two files: a lent machine returns only eight."""
    if out is None:
        return
    (out / "verify.json").write_text(json.dumps(document, indent=1))
    with tarfile.open(out / "logs.tgz", "w:gz") as archive:
        for log in launcher.logs:
            archive.add(log, log.name)


if __name__ == "__main__":
    main()
