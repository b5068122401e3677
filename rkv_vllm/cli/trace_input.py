"""From the arguments of `rkv-vllm trace` to a request: refuses what would show no compaction.

Runs before the engine is loaded. Next: `rkv_vllm/trace/capture.py`.
"""

from pathlib import Path
from typing import Any

from rkv_vllm.cli.errors import REFUSED, CommandError
from rkv_vllm.options import ServerOptions
from rkv_vllm.policy import EveryBuffer, Terms
from rkv_vllm.trace.capture import TracedRequest
from rkv_vllm.whole_file import what_is_missing

# Output tokens beyond the due date within which a compaction is carried out: the step that
# compacts, one more in flight with asynchronous scheduling, the next one, which moves the
# survivors, and the last token, which is never computed.
_STEPS_TO_COMPACT = 4


def check_output(path: Path) -> None:
    """Raise CommandError unless the page can be written: found out by trying."""
    wanted = None
    if path.suffix.lower() not in (".html", ".htm"):
        wanted = "a file that ends in .html"
    else:
        wanted = what_is_missing(path)
    if wanted is not None:
        raise CommandError(f"--output: got {str(path)!r}, wanted {wanted}; change the path")


def check_temperature(temperature: float) -> None:
    """Raise CommandError for a temperature that vLLM does not take, NaN included."""
    if not 0 <= temperature <= 2:
        raise CommandError(
            f"--temperature: got {temperature}, wanted a number from 0 to 2; change it"
        )


def load_tokenizer(folder: str) -> Any:
    """Returns the tokenizer that vLLM takes for a model.

    Raises:
        CommandError: there is none.
    """
    from vllm.tokenizers import get_tokenizer

    try:
        return get_tokenizer(folder)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CommandError(
            f"MODEL: got {folder!r} without a usable tokenizer ({reason}), wanted one; download "
            "the whole checkpoint",
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


def first_due_at(prompt_len: int, config: ServerOptions) -> int:
    """Tokens of a text at which its first compaction is due."""
    return EveryBuffer(config.window).first_due_at(Terms(config.budget, config.buffer), prompt_len)


def check_lengths(request: TracedRequest, config: ServerOptions, context: int | None) -> None:
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
    due_after = first_due_at(prompt_len, config) - prompt_len
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
