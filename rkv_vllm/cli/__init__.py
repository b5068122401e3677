"""The `rkv-vllm` command: what stands beside `vllm serve`, one file per subcommand.

Importing this module imports neither torch nor vLLM, so that `--help` answers at once; a command
imports them when it runs. What several commands need: `errors.py`, `checkpoint.py`, `sizes.py`.
"""

import typer

from rkv_vllm.cli.bench import run_benchmark
from rkv_vllm.cli.calibrate import calibrate_model
from rkv_vllm.cli.doctor import show_diagnosis
from rkv_vllm.cli.errors import full_disk_errors
from rkv_vllm.cli.eval import run_evaluation
from rkv_vllm.cli.plan import show_plan
from rkv_vllm.cli.trace import show_trace
from rkv_vllm.cli.version import show_version

app = typer.Typer(
    name="rkv-vllm",
    help="R-KV cache eviction for vLLM. To serve: vllm serve MODEL --kv-compression rkv",
    no_args_is_help=True,
    add_completion=False,
    # Wraps the paragraphs of docstrings and keeps the lines of code blocks.
    rich_markup_mode="markdown",
)
app.command("version")(show_version)
app.command("doctor")(show_diagnosis)
app.command("plan")(show_plan)
app.command("bench")(run_benchmark)
app.command("eval")(run_evaluation)
app.command("calibrate")(calibrate_model)
app.command("trace")(show_trace)


def main() -> None:
    """Run the command line; the console script `rkv-vllm` starts here."""
    with full_disk_errors():
        app()
