"""Serve a model with a bounded KV cache, chat with it over HTTP, and show what each chat cost.

`make demo` runs it with SmolLM2, `make demo MODEL=Gemma3-270M` with another one. The server is the
real command, `vllm serve MODEL --kv-compression rkv`; it ends with this script, however the script
ends. What each chat holds comes from the server's workers (vLLM's development endpoint POST
/collective_rpc), the pool from /metrics.
"""

import asyncio
import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from openai import APIError, AsyncOpenAI
from rich import box
from rich.console import Console
from rich.table import Table

from rkv_vllm.bench.processes import ChildError, InterruptedBySignal, ended_by_signals
from rkv_vllm.bench.samples import Scrape
from rkv_vllm.bench.server import Server, serving

DEFAULT_MODEL = Path(__file__).resolve().parent.parent / ".models" / "SmolLM2-135M-Instruct"
LOG_FILE = Path("demo.log")
BLOCK_SIZE = 32
PROMPT_ROOM = 256
# The first question is the one whose answer is shown while it is written.
QUESTIONS = (
    "Tell me a long story about a lighthouse keeper who finds a message in a bottle.",
    "Explain step by step how a bicycle stays upright, with an example for every step.",
    "Describe a week of a baker in a small town, day by day.",
    "Write a detailed guide to growing tomatoes on a balcony.",
    "What happens when water freezes? Explain it to a curious child, in detail.",
    "Compare travelling by train and by ship, with ten reasons for each.",
)
# What vLLM gets for a model that was not trained to chat.
PLAIN_CHAT = "{{ bos_token }}Question: {{ messages[-1]['content'] }}{{ '\\n' }}Answer:"
COLUMNS = ("prompt_tokens", "output_tokens", "logical_len", "physical_len", "compactions")

console = Console(highlight=False)


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
    flags = [str(model), "--kv-compression=rkv", f"--kv-budget={budget}", f"--kv-buffer={buffer}"]
    flags += [f"--dtype={dtype}", "--enforce-eager", f"--max-model-len={PROMPT_ROOM + max_tokens}"]
    flags += [f"--block-size={BLOCK_SIZE}", f"--max-num-seqs={len(QUESTIONS)}"]
    flags += [f"--kv-cache-memory-bytes={256 << 20}"]
    if not (model / "chat_template.jinja").is_file():
        flags.append(f"--chat-template={PLAIN_CHAT}")
    console.print(f"[bold]$ vllm serve {' '.join(flags)}[/bold]", soft_wrap=True)
    environment = {"VLLM_LOG_STATS_INTERVAL": "2", "VLLM_SERVER_DEV_MODE": "1"}
    console.print(f"the server starts, log: {LOG_FILE}")
    started = time.monotonic()
    try:
        with ended_by_signals(), serving(flags, LOG_FILE, environment, port) as server:
            console.print(f"serving at {server.url} after {time.monotonic() - started:.0f} s")
            compactions = chat_and_show(server, str(model), max_tokens)
            if compactions == 0:
                raise SystemExit(
                    f"no compaction happened: the chats stayed below {budget} + {buffer} tokens; "
                    "raise --max-tokens or lower --budget"
                )
            if keep:
                console.print(f"{server.url} goes on serving; Ctrl-C ends it")
                with suppress(InterruptedBySignal):
                    raise SystemExit(server.process.wait())
    except (ChildError, APIError) as error:
        tail = ChildError("", LOG_FILE).log_tail
        console.print("\n".join(tail), markup=False)
        raise SystemExit(f"{error}; the server's log, {LOG_FILE}, ends as above") from error
    except InterruptedBySignal as interruption:
        raise SystemExit(interruption.exit_code) from None


def chat_and_show(server: Server, model: str, max_tokens: int) -> int:
    """Holds the chats and prints the books; returns the number of compactions."""
    started = time.monotonic()
    chats = asyncio.run(hold_chats(server.url, model, max_tokens))
    seconds = time.monotonic() - started
    reports = worker_numbers(server, "kv_compression_requests")
    stats = worker_numbers(server, "kv_compression_stats")
    titles = [name.removesuffix("_tokens").removesuffix("_len") for name in COLUMNS]
    table = Table("chat", *titles, "evicted", "held", "stock", box=box.SIMPLE_HEAD, padding=0)
    table.title = "Each chat when it finished: tokens, blocks held and blocks that stock holds"
    table.columns[0].max_width = 16
    for column in table.columns:
        column.no_wrap, column.justify = True, "left" if column.header == "chat" else "right"
    for response_id, question in chats.items():
        # vLLM appends a suffix to the response's id.
        report = next(each for each in reports if each["req_id"].startswith(response_id))
        numbers = [report[name] for name in (*COLUMNS, "evicted_tokens", "blocks_held")]
        stock = math.ceil(report["logical_len"] / report["block_size"])
        table.add_row(question, *map(str, [*numbers, stock]))
    console.print(table)
    page = Scrape.of(server)
    console.print(
        f"{stats['compactions']} compactions of {stats['requests_compacted']} requests evicted "
        f"{stats['evicted_tokens']} tokens and gave {stats['freed_blocks']} blocks back; "
        f"{stats['deferred']} had to wait. Now {page.pool_blocks - page.held_blocks} of "
        f"{page.pool_blocks} blocks are free. {page.generated_tokens:.0f} tokens in "
        f"{seconds:.1f} s."
    )
    return stats["compactions"]


async def hold_chats(url: str, model: str, max_tokens: int) -> dict[str, str]:
    """Asks all questions at once, shows the first answer while it is written; id -> question."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        request = {"model": model, "max_tokens": max_tokens, "temperature": 0.7, "seed": 1}
        asked = [asyncio.create_task(ask(client, q, request)) for q in QUESTIONS[1:]]
        console.print(f"\n[bold cyan]{QUESTIONS[0]}[/bold cyan]")
        messages = [{"role": "user", "content": QUESTIONS[0]}]
        chunks = await client.chat.completions.create(messages=messages, stream=True, **request)
        async for chunk in chunks:
            console.out(chunk.choices[0].delta.content or "", end="")
        with console.status(f"\nwaiting for the other {len(asked)} answers ..."):
            ids = [chunk.id, *await asyncio.gather(*asked)]
        console.print("\n")
        return dict(zip(ids, QUESTIONS, strict=True))


async def ask(client: AsyncOpenAI, question: str, request: dict[str, Any]) -> str:
    """Asks one question, waits for the whole answer and returns its id."""
    messages = [{"role": "user", "content": question}]
    return (await client.chat.completions.create(messages=messages, **request)).id


def worker_numbers(server: Server, method: str) -> Any:
    """What the first worker's method returns."""
    answer = server.ask("POST", "/collective_rpc", json={"method": method})
    return answer.json()["results"][0]


if __name__ == "__main__":
    typer.run(demo)
