"""The prompts of a benchmark: short tasks whose answers are written out step by step."""

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASKS = (
    "A baker sells rolls at 3 for 2 euros and loaves at 4 euros each. On Monday she takes 96 euros "
    "and sells twice as many loaves as packs of rolls. How many loaves does she sell?",
    "Find all integers n for which n squared plus 5n plus 6 is divisible by 12. Explain each step.",
    "A train leaves at 8:15 and travels 210 km at 84 km/h, waits 25 minutes, and returns at 70 "
    "km/h. When is it back?",
    "Prove that among any seven whole numbers there are two whose difference is divisible by six.",
    "How many four-digit numbers have digits that add up to nine? Count them in two ways.",
    "A rectangle's sides are whole numbers and its area equals its perimeter. Find all of them.",
    "Explain how the sieve of Eratosthenes works and list the primes below one hundred with it.",
    "Three dice are thrown. What is the probability that the largest number shown is exactly five?",
)
# Answered one at a time before the load, and never long enough to be compacted.
PROBES = (
    "The lighthouse keeper opened the bottle and read",
    "To keep a bicycle upright, a rider",
    "Water freezes when",
)


def own_prompts(count: int, seed: int) -> list[str]:
    """Returns `count` tasks, all different; the seed decides their order."""
    tasks = [f"Exercise {i + 1}. {TASKS[i % len(TASKS)]}" for i in range(count)]
    random.Random(seed).shuffle(tasks)
    return tasks


def filled(task: str, num_tokens: int, count_tokens: Callable[[str], int], seed: int) -> str:
    """Returns the task behind notes that have nothing to do with it.

    Args:
        task: of `own_prompts`.
        num_tokens: that both have together, at most; a longer task stays as it is.
        count_tokens: of a text.
        seed: of the notes.
    """
    draw, room = random.Random(seed), num_tokens - count_tokens(task)
    notes = ""
    for number in itertools.count(1):
        note = f"Note {number}: shelf {draw.randrange(1000)} holds {draw.randrange(1000)} bolts.\n"
        # Counted by itself: a few tokens more than in the whole, whose counts would take long.
        room -= count_tokens(note)
        if room < 0:
            return notes + task
        notes += note


def read_prompts(path: Path, count: int) -> list[str]:
    """Returns the first `count` prompts of a file.

    Args:
        path: one JSON object per line with the text under "prompt", as for `vllm bench serve
            --dataset-name custom`.
        count: prompts wanted.

    Raises:
        ValueError: no such file, a line of another form, or too few lines.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--dataset-path: got {error}, wanted a file of text; correct the path"
        ) from error
    if len(lines) < count:
        raise ValueError(
            f"--dataset-path: got {len(lines)} prompts, wanted at least --num-prompts = {count}; "
            "lower it or add prompts (repeated ones would share their cache)"
        )
    prompts = []
    for number, line in enumerate(lines[:count], start=1):
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, TypeError, KeyError):
            prompt = None
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(
                f"--dataset-path: got {line[:60]!r} as prompt {number} of {path}, wanted a JSON "
                'object such as {"prompt": "Count to ten."}; correct the line'
            )
        prompts.append(prompt)
    return prompts


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Returns the tokenizer of a checkpoint.

    Args:
        folder: of the checkpoint; nothing is looked up on the network.

    Raises:
        ValueError: there is none.
    """
    # Only now: it imports torch.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # Where the files are missing, transformers makes one without any tokens.
        if not tokenizer(PROBES[0]).input_ids:
            raise ValueError("it has no tokens")
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"MODEL: got {str(folder)!r}, whose tokenizer cannot be read ({reason}), wanted a "
            "complete checkpoint; download it again"
        ) from error
    return tokenizer


def make_renderer(folder: Path) -> tuple[Callable[[str], str], Callable[[str], int]]:
    """Returns how a task becomes the text of a prompt, and how many tokens a text has.

    A task is put into the model's chat template where it has one.

    Args:
        folder: of a checkpoint; nothing is looked up on the network.

    Raises:
        ValueError: there is no tokenizer.
    """
    tokenizer = load_tokenizer(folder)

    def render(task: str) -> str:
        if not tokenizer.chat_template:
            return task
        message = {"role": "user", "content": task}
        return tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)

    # As a server counts a prompt that it gets as text.
    return render, lambda text: len(tokenizer(text).input_ids)
