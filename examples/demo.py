"""Serve SmolLM2 with a bounded KV cache, chat with it over HTTP, and show what each chat cost.

`make demo` runs it. The server is the real command, `vllm serve MODEL --kv-compression rkv`, in a
process group of its own that ends with this script, however the script ends. The numbers come from
the server's workers, through vLLM's development endpoint POST /collective_rpc.
"""

import asyncio
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import requests
import typer
from openai import APIError, AsyncOpenAI
from rich import box
from rich.console import Console
from rich.table import Table

DEFAULT_MODEL = Path(__file__).resolve().parent.parent / ".models" / "SmolLM2-135M-Instruct"
LOG_FILE = Path("demo.log")
LOG_TAIL_LINES = 40
BLOCK_SIZE = 32
PROMPT_ROOM = 256
POOL_BYTES = 256 << 20
START_SECONDS = 300
STOP_SECONDS = 10
CLEAN_UP_SECONDS = 5
# The first question is the one whose answer is shown while it is written.
QUESTIONS = (
    "Tell me a long story about a lighthouse keeper who finds a message in a bottle.",
    "Explain step by step how a bicycle stays upright, with an example for every step.",
    "Describe a week of a baker in a small town, day by day.",
    "Write a detailed guide to growing tomatoes on a balcony.",
    "What happens when water freezes? Explain it to a curious child, in detail.",
    "Compare travelling by train and by ship, with ten reasons for each.",
)

console = Console(highlight=False)


@dataclass(frozen=True)
class Chat:
    """One finished chat: its question, the response's id, the answer's length in tokens."""

    question: str
    response_id: str
    output_tokens: int


def demo(
    model: Annotated[Path, typer.Option(help="Folder of the model to serve.")] = DEFAULT_MODEL,
    budget: Annotated[int, typer.Option(help="Tokens a compaction keeps per request.")] = 128,
    buffer: Annotated[int, typer.Option(help="Tokens between two compactions.")] = 64,
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.", min=1)] = 350,
    port: Annotated[int, typer.Option(help="Port to serve on; 0 picks a free one.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Of weights and cache; float32 is faster on CPUs without bf16.")
    ] = "bfloat16",
    keep: Annotated[bool, typer.Option("--keep", help="Go on serving until Ctrl-C.")] = False,
) -> None:
    """Serve a model with KV cache compression, chat with it, and show the books."""
    if not (model / "config.json").is_file():
        raise SystemExit(f"--model {model} holds no model; run `make model` or name a folder")
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _exit_on_signal)
    # A shell starts background jobs with SIGINT ignored; it must end the demo there as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    port = port or free_port()
    base_url = f"http://127.0.0.1:{port}"
    command = serve_command(model, port, budget, buffer, max_tokens, dtype)
    console.print(f"[bold]$ {' '.join(command)}[/bold]", soft_wrap=True)
    with process_group(command) as server:
        wait_until_healthy(server, base_url)
        started = time.monotonic()
        try:
            chats = asyncio.run(hold_chats(base_url, str(model), max_tokens))
        except APIError as error:
            fail_with_log(f"a chat failed: {error}")
        seconds = time.monotonic() - started
        reports = worker_numbers(base_url, "kv_compression_requests")
        stats = worker_numbers(base_url, "kv_compression_stats")
        show_chats([(chat, report_of(chat, reports)) for chat in chats])
        show_totals(stats, sum(chat.output_tokens for chat in chats), seconds)
        if stats["compactions"] == 0:
            raise SystemExit(
                f"no compaction happened: the chats stayed below {budget} + {buffer} tokens; "
                "raise --max-tokens or lower --budget"
            )
        if keep:
            serve_on(server, base_url)


def _exit_on_signal(signum: int, _: Any) -> None:
    raise SystemExit(128 + signum)


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def serve_command(
    model: Path, port: int, budget: int, buffer: int, max_tokens: int, dtype: str
) -> list[str]:
    """The command line of the server; the first two lines of flags are what compression needs."""
    return [
        str(Path(sys.executable).with_name("vllm")),
        *("serve", str(model), "--kv-compression", "rkv"),
        *("--kv-budget", str(budget), "--kv-buffer", str(buffer)),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--enforce-eager"),
        *("--max-model-len", str(PROMPT_ROOM + max_tokens), "--block-size", str(BLOCK_SIZE)),
        *("--max-num-seqs", str(len(QUESTIONS)), "--kv-cache-memory-bytes", str(POOL_BYTES)),
    ]


@contextmanager
def process_group(command: list[str]) -> Iterator[subprocess.Popen]:
    """Runs the command in a process group of its own and ends the whole group afterwards."""
    environment = {
        "VLLM_LOG_STATS_INTERVAL": "2",
        "VLLM_NO_USAGE_STATS": "1",
        # Left to itself vLLM keeps one core free of computation, half of a small machine.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        **os.environ,
        "VLLM_SERVER_DEV_MODE": "1",
    }
    with LOG_FILE.open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    try:
        yield process
    finally:
        end_group(process)


def end_group(process: subprocess.Popen) -> None:
    """Ends the process, lets its children clean up, and kills what is left of the group."""
    # A second Ctrl-C must not leave the job half done.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    deadline = time.monotonic() + CLEAN_UP_SECONDS
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_until_healthy(server: subprocess.Popen, base_url: str) -> None:
    """Waits for /health and shows the time; a server that ends or hangs shows its log's tail."""
    started = time.monotonic()
    reported = 0
    with console.status("") as status:
        while (seconds := time.monotonic() - started) < START_SECONDS:
            if server.poll() is not None:
                break
            with suppress(requests.ConnectionError):
                if requests.get(f"{base_url}/health", timeout=5).status_code == 200:
                    console.print(f"serving at {base_url} after {seconds:.0f} s, log: {LOG_FILE}")
                    return
            status.update(f"the server starts ... {seconds:.0f} s")
            if not console.is_terminal and seconds >= reported + 10:
                reported = int(seconds)
                console.print(f"the server starts ... {reported} s")
            time.sleep(0.2)
    fail_with_log("vllm serve did not come up")


def fail_with_log(problem: str) -> NoReturn:
    """Prints the tail of the server's log and ends the program with exit code 1."""
    tail = "\n".join(LOG_FILE.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
    console.print(tail, markup=False)
    raise SystemExit(f"{problem}; the server's log, {LOG_FILE}, ends as above")


async def hold_chats(base_url: str, model: str, max_tokens: int) -> list[Chat]:
    """Asks all questions at once and shows the first answer while it is written."""
    async with AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as client:
        request = {"model": model, "max_tokens": max_tokens, "temperature": 0.7, "seed": 1}
        others = [asyncio.create_task(ask(client, q, request)) for q in QUESTIONS[1:]]
        chats = [await ask_aloud(client, QUESTIONS[0], request)]
        with console.status(f"waiting for the other {len(others)} answers ..."):
            return chats + await asyncio.gather(*others)


async def ask(client: AsyncOpenAI, question: str, request: dict[str, Any]) -> Chat:
    """Asks one question and waits for the whole answer."""
    messages = [{"role": "user", "content": question}]
    answer = await client.chat.completions.create(messages=messages, **request)
    return Chat(question, answer.id, answer.usage.completion_tokens)


async def ask_aloud(client: AsyncOpenAI, question: str, request: dict[str, Any]) -> Chat:
    """Asks one question and prints the answer as it arrives."""
    console.print(f"\n[bold cyan]{question}[/bold cyan]")
    stream = await client.chat.completions.create(
        messages=[{"role": "user", "content": question}],
        stream=True,
        stream_options={"include_usage": True},
        **request,
    )
    async for chunk in stream:
        for choice in chunk.choices:
            console.out(choice.delta.content or "", end="")
        if chunk.usage is not None:
            output_tokens = chunk.usage.completion_tokens
    console.print("\n")
    return Chat(question, chunk.id, output_tokens)


def worker_numbers(base_url: str, method: str) -> Any:
    """What the first worker's method returns."""
    answer = requests.post(f"{base_url}/collective_rpc", json={"method": method}, timeout=60)
    answer.raise_for_status()
    return answer.json()["results"][0]


def report_of(chat: Chat, reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The worker's report about a chat; vLLM appends a suffix to the response's id."""
    return next(report for report in reports if report["req_id"].startswith(chat.response_id))


def show_chats(rows: list[tuple[Chat, dict[str, Any]]]) -> None:
    """Prints one line per chat, as its worker saw it when it finished."""
    table = Table(
        title="Each chat when it finished: tokens, and blocks of the KV cache",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    table.add_column("chat", max_width=16, no_wrap=True)
    for column in ("prompt", "output", "logical", "physical", "compac-\ntions", "evicted"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("blocks\nheld", justify="right", no_wrap=True, style="green")
    table.add_column("stock\nholds", justify="right", no_wrap=True, style="red")
    for chat, report in rows:
        names = ("prompt_tokens", "output_tokens", "logical_len", "physical_len", "compactions")
        numbers = [report[name] for name in (*names, "evicted_tokens", "blocks_held")]
        stock = math.ceil(report["logical_len"] / report["block_size"])
        table.add_row(chat.question, *map(str, [*numbers, stock]))
    console.print(table)


def show_totals(stats: dict[str, int], output_tokens: int, seconds: float) -> None:
    """Prints what the server did in all."""
    console.print(
        f"{stats['compactions']} compactions of {stats['requests_compacted']} requests evicted "
        f"{stats['evicted_tokens']} tokens and gave {stats['freed_blocks']} blocks back; "
        f"{stats['deferred']} had to wait. Now {stats['free_blocks']} of {stats['total_blocks']} "
        f"blocks are free. {output_tokens} tokens in {seconds:.1f} s."
    )


def serve_on(server: subprocess.Popen, base_url: str) -> None:
    """Leaves the server running until Ctrl-C."""
    console.print(f"{base_url} goes on serving; Ctrl-C ends it")
    with suppress(KeyboardInterrupt):
        raise SystemExit(server.wait())


if __name__ == "__main__":
    typer.run(demo)
