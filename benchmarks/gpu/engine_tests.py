"""Runs the engine tests of tests/ on a GPU: real kernels, FULL graphs, vLLM's V2 model runner.

Needs vLLM for CUDA, pytest, pytest-timeout and pytest-xdist; this checkout is put on the path as it
lies here. Further arguments go to pytest. Served tests are left out (they start servers with
options of a CPU), and so is what vLLM itself does not serve in float32, or in FULL graphs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from site_folder import ROOT, make_site_folder

LEFT_OUT = ("served", "e5m2", "attn_head", "llama4", "latents", "with_every_kernel")
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # The tests set what is not set here as a CPU needs it.
    "TRITON_INTERPRET": "0",
    # Products of float32 nearly as good as the reference's.
    "TRITON_F32_DEFAULT": "tf32x3",
}
OPTIONS = ("-o", "pythonpath=.", "-p", "no:cacheprovider", "-m", "engine", "--timeout=150", "-v")
LEFT_OUT_PLACES = (
    *("cli", "eval", "fit", "gpu_lab", "trace"),
    # They start servers, commands and ranks with options of a CPU, or want a downloaded model.
    *("test_benchmarks.py", "test_examples.py", "test_faults.py", "test_medley.py"),
    *("test_metrics.py", "test_ranks.py", "test_real_models.py", "test_recorded.py"),
    "test_third_party_method.py",
)


def main() -> int:
    """Exit code of pytest."""
    epilog = "further arguments go to pytest, say -n 14; its -k replaces ours"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=epilog)
    _, further = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        site = make_site_folder(Path(folder) / "site")
        for path in ROOT.iterdir():
            # Files that tests read.
            if not path.name.startswith(".") and not (site / path.name).exists():
                (site / path.name).symlink_to(path)
        path = ":".join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
        chosen = ["-k", " and ".join(f"not {name}" for name in LEFT_OUT)]
        chosen += [f"--ignore=tests/{name}" for name in LEFT_OUT_PLACES]
        command = [sys.executable, "-m", "pytest", *OPTIONS, *chosen, *further]
        return subprocess.call(
            command, cwd=site, env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path}
        )


if __name__ == "__main__":
    sys.exit(main())
