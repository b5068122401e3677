"""The run behind `rkv-vllm trace`: one prompt, its lengths checked, through an engine.

Knows vLLM only inside its functions. Next: trace/capture.py, which looks on.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rkv_vllm.cli.checkpoint import Decoder
from rkv_vllm.cli.environment import quieten_vllm
from rkv_vllm.cli.errors import REFUSED, CommandError
from rkv_vllm.config import KVCompressionConfig
from rkv_vllm.request_options import RequestOptions

if TYPE_CHECKING:
    from rkv_vllm.trace.capture import Capture

# Output tokens beyond the due date within which a compaction is carried out: the step that
# compacts, one more in flight with asynchronous scheduling, the next one, which moves the
# survivors, and the last token, which is never computed.
_STEPS_TO_COMPACT = 4

# Tokens of the cache beside the request's own: fresh blocks for a compaction whose old ones can be
# found by a prefix, vLLM's empty block, and blocks that are not full.
_SPARE_TOKENS = 1024

# Seconds between two lines about progress where stderr is no terminal.
_LOG_INTERVAL = 10


@dataclass(frozen=True)
class Request:
    """What is to be generated.

    Attributes:
        prompt_ids: the prompt.
        max_tokens: output tokens at most.
        temperature: 0 takes the likeliest token.
        ignore_eos: go on when the model ends.
    """

    prompt_ids: list[int]
    max_tokens: int
    temperature: float
    ignore_eos: bool

    @property
    def max_len(self) -> int:
        """Tokens of prompt and output at most."""
        return len(self.prompt_ids) + self.max_tokens


def prepare_vllm() -> None:
    """One process, quiet and offline; vLLM reads these variables when it is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    quieten_vllm()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Left to itself vLLM keeps one core free of computation, half of a small machine.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # Of vLLM's own imports; nobody here can act on them.
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")


def load_tokenizer(folder: str) -> Any:
    """Returns the tokenizer that vLLM takes for a model.

    Raises:
        CommandError: there is none.
    """
    with _status("Importing vLLM ..."):
        from vllm.tokenizers import get_tokenizer

        try:
            return get_tokenizer(folder)
        except (OSError, ValueError) as error:
            raise CommandError(
                f"MODEL: got {folder!r} without a usable tokenizer ({_one_line(error)}), wanted "
                "one; download the whole checkpoint",
                REFUSED,
            ) from error


def encode(tokenizer: Any, prompt: str, chat: bool | None) -> list[int]:
    """Returns the tokens of a prompt.

    Args:
        tokenizer: of the model.
        prompt: as the user wrote it.
        chat: whether it goes into the chat template; None: if there is one.

    Raises:
        CommandError: no prompt, or no template.
    """
    if not prompt.strip():
        raise CommandError("PROMPT: got nothing, wanted a text; write one in quotes")
    has_template = bool(tokenizer.chat_template)
    if chat and not has_template:
        raise CommandError(
            "--chat: got a model without a chat template, wanted one that has it; use --raw"
        )
    if chat is False or not has_template:
        return list(tokenizer.encode(prompt))
    message = {"role": "user", "content": prompt}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    # The template writes the special tokens itself.
    return list(tokenizer.encode(text, add_special_tokens=False))


def check_lengths(request: Request, config: KVCompressionConfig, context: int | None) -> None:
    """Raise CommandError where the text does not fit the model, or nothing would be evicted.

    Args:
        request: what is to be generated.
        config: what is kept, and when the rest is evicted.
        context: tokens that the model was made for, None if not known.
    """
    prompt_len = len(request.prompt_ids)
    if context is not None and prompt_len >= context:
        raise CommandError(
            f"PROMPT: got {prompt_len} tokens, wanted less than the model's context of {context}; "
            "shorten it",
            REFUSED,
        )
    due_after = _first_due_at(prompt_len, config) - prompt_len
    smallest = due_after + _STEPS_TO_COMPACT
    if request.max_tokens < smallest:
        raise CommandError(
            f"--max-tokens: got {request.max_tokens}, wanted at least {smallest}: the first "
            f"compaction is due {due_after} tokens after a prompt of {prompt_len} (--budget "
            f"{config.budget}, --buffer {config.buffer}), and without one nothing is evicted; "
            "raise it or lower the budget"
        )
    if context is not None and request.max_len > context:
        raise CommandError(
            f"--max-tokens: got {request.max_tokens}, wanted at most {context - prompt_len}: the "
            f"prompt's {prompt_len} tokens and the output must fit into the model's context of "
            f"{context}; lower it"
        )


def _first_due_at(prompt_len: int, config: KVCompressionConfig) -> int:
    return RequestOptions(config.budget, config.buffer).first_due_at(prompt_len)


def run(
    folder: str,
    request: Request,
    config: KVCompressionConfig,
    decoder: Decoder,
    options: dict[str, Any],
) -> "Capture":
    """Generate in an engine of this process, with progress on stderr.

    Args:
        folder: of the model.
        request: what is to be generated.
        config: what is kept, and when the rest is evicted.
        decoder: the model's shape.
        options: further arguments of `LLM`.

    Raises:
        CommandError: vLLM refuses the start, or the text ended before the first compaction.
    """
    with _status("Importing the engine ..."):
        from vllm import SamplingParams

        from rkv_vllm.trace.capture import capture, running_engine
    sampling = SamplingParams(
        temperature=request.temperature,
        max_tokens=request.max_tokens,
        ignore_eos=request.ignore_eos,
        detokenize=False,
    )
    cache_bytes = _cache_bytes(request, decoder)
    with ExitStack() as stack:
        with _status("Loading the model ..."), _refusals_of_vllm(folder):
            engine = running_engine(folder, config, request.max_len, cache_bytes, **options)
            llm = stack.enter_context(engine)
        on_token = stack.enter_context(_progress(request.max_tokens))
        captured = capture(llm, config, request.prompt_ids, sampling, on_token)
    if captured.evictions is None:
        raise _ended_early(len(request.prompt_ids), len(captured.output_ids), config)
    return captured


def _ended_early(prompt_len: int, output_len: int, config: KVCompressionConfig) -> CommandError:
    return CommandError(
        f"MODEL: got the end of its text after {output_len} tokens, {prompt_len + output_len} with "
        f"the prompt, wanted more than {_first_due_at(prompt_len, config)}, where the first "
        "compaction is due; lower --budget or --buffer, or go on with --ignore-eos",
        REFUSED,
    )


def _cache_bytes(request: Request, decoder: Decoder) -> int:
    """Room for the request twice; elements of four bytes, which no supported dtype exceeds."""
    return (2 * request.max_len + _SPARE_TOKENS) * 4 * decoder.elements_per_token


@contextmanager
def _refusals_of_vllm(folder: str) -> Iterator[None]:
    """What vLLM or the plugin says about a model or an option, as one line."""
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        raise CommandError(
            f"MODEL: got {Path(folder).name!r}, which vLLM does not start with these options: "
            f"{_one_line(error)}; see rkv-vllm doctor {folder}",
            REFUSED,
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextmanager
def _status(text: str) -> Iterator[None]:
    """A spinner; a line where nobody would see it turn."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(text)
    with console.status(text):
        yield


@contextmanager
def _progress(max_tokens: int) -> Iterator[Callable[[int], None]]:
    """A bar over output tokens, and lines in a log; yields the function that moves it."""
    console = Console(stderr=True)
    columns = (TextColumn("Generating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=max_tokens)
        next_line = time.monotonic()

        def on_token(num_tokens: int) -> None:
            nonlocal next_line
            progress.update(task, completed=num_tokens)
            if not console.is_terminal and time.monotonic() >= next_line:
                console.print(f"Generating: {num_tokens} of {max_tokens} tokens")
                next_line += _LOG_INTERVAL

        yield on_token
