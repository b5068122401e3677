"""From the options of `rkv-vllm bench` to a workload: refuses what cannot be measured.

Runs before any process starts. Next: `rkv_vllm/bench/workload.py`.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from rkv_vllm.bench.prompts import PROBES, filled, make_renderer, own_prompts, read_prompts
from rkv_vllm.bench.sides import AUTO
from rkv_vllm.bench.workload import Scenario, Workload
from rkv_vllm.cli.checkpoint import Decoder, check_dtype, find_config, read_config, read_decoder
from rkv_vllm.cli.errors import CommandError, check_plot, require_package
from rkv_vllm.fit.refused_models import FP8_CACHES
from rkv_vllm.options import ServerOptions


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turns the ValueErrors of `rkv_vllm.bench` and of the options into the command's own."""
    try:
        yield
    except ValueError as error:
        raise CommandError(str(error)) from error


def override(preset: Scenario, **given: Any) -> Scenario:
    """The preset with the options that were given."""
    return replace(preset, **{name: value for name, value in given.items() if value is not None})


def read_numbers(flag: str, text: str | None, least: int | None = 0) -> tuple[int, ...] | None:
    """The numbers of an option, commas between; None where it was not given.

    Args:
        flag: its name.
        text: what was given.
        least: that is taken; None for any.
    """
    if text is None:
        return None
    try:
        numbers = tuple(map(int, text.split(",")))
        if least is not None and min(numbers) < least:
            raise ValueError(f"less than {least}")
    except ValueError as error:
        from_least = "" if least is None else f", {least} or more"
        raise CommandError(
            f"{flag}: got {text!r}, wanted whole numbers{from_least}; write it like {flag} 128,256"
        ) from error
    return numbers


def read_budgets(texts: Sequence[str]) -> tuple[int, ...] | None:
    """The budgets of all `--budget` options; None when there is none."""
    # What is too small is refused by name with the other options.
    budgets = read_numbers("--budget", ",".join(texts) or None, least=None)
    _refuse_twice("--budget", budgets or ())
    return budgets


def read_whens(texts: Sequence[str]) -> tuple[str, ...]:
    """The policies of all `--when` options."""
    whens = tuple(part.strip() for text in texts for part in text.split(","))
    _refuse_twice("--when", whens)
    return whens


def read_caches(texts: Sequence[str]) -> tuple[str, ...]:
    """The dtypes of all `--cache-dtype` options; "auto" when there is none."""
    caches = tuple(part.strip() for text in texts for part in text.split(","))
    _refuse_twice("--cache-dtype", caches)
    known = (AUTO, *FP8_CACHES)
    for cache in caches:
        if cache not in known:
            raise CommandError(
                f"--cache-dtype: got {cache!r}, wanted one of {', '.join(known)}; compression "
                "reads no others"
            )
    return caches or (AUTO,)


def _refuse_twice(flag: str, values: Sequence[int | str]) -> None:
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise CommandError(
            f"{flag}: got {twice[0]} more than once, wanted a side for each; name it once"
        )


def check_options(
    load: Scenario, whens: Sequence[str], modes: Sequence[str], request_rate: float
) -> None:
    """Refuse what needs neither the model nor its tokenizer to be seen as wrong."""
    if not request_rate > 0:
        raise CommandError(
            f"--request-rate: got {request_rate}, wanted more than 0 requests per second; leave it "
            "out to send all at once"
        )
    check_dtype(load.dtype)
    if load.priorities and "served" in modes:
        raise CommandError(
            "--priority: got it with --mode served, wanted --mode offline: vLLM's client gives all "
            "of its requests one priority; leave one of the two out"
        )
    for budget in load.budgets:
        for when in whens or (ServerOptions.when,):
            given = {"budget": budget, "buffer": load.buffer, "when": when}
            ServerOptions(**{**given, **load.compression})


def check_own_prompts(dataset_path: Path | None, prompt_len: Sequence[str] | None) -> None:
    """Refuse to fill up the user's prompts."""
    if dataset_path is not None and prompt_len:
        raise CommandError(
            "--prompt-len: got it with --dataset-path, wanted it with bench's own prompts; leave "
            "one of the two out"
        )


def check_packages(modes: Sequence[str], plot: Path | None) -> None:
    """Refuse what would fail at the end, for want of a package or of a place for the plot."""
    check_plot(plot)
    if "served" in modes:
        # vLLM's client reads prompts with it, and has it in an extra of its own.
        require_package("pandas", "--mode served")


def make_workload(
    model: str,
    load: Scenario,
    dataset_path: Path | None,
    seed: int,
    request_rate: float,
    max_concurrency: int | None,
) -> Workload:
    """The workload, checked against the model."""
    config = find_config(model)
    decoder = read_decoder(read_config(config))
    render, count_tokens = make_renderer(config.parent)
    if dataset_path is None:
        tasks = own_prompts(load.num_prompts, seed)
        template = count_tokens(render(tasks[0])) - count_tokens(tasks[0])
        lens = in_turn(load.prompt_lens, len(tasks))
        tasks = [
            filled(task, num_tokens - template, count_tokens, seed + number)
            for number, (task, num_tokens) in enumerate(zip(tasks, lens, strict=True))
        ]
    else:
        tasks = read_prompts(dataset_path, load.num_prompts)
    prompts = tuple(map(render, tasks))
    element_bytes = decoder.dtype_bytes(load.dtype)
    workload = Workload(
        model=model,
        prompts=prompts,
        prompt_lens=tuple(map(count_tokens, prompts)),
        probe_lens=tuple(map(count_tokens, PROBES)),
        output_lens=in_turn(load.output_lens, load.num_prompts),
        buffer=load.buffer,
        pool_tokens=load.pool_tokens,
        block_size=load.block_size,
        bytes_per_token=decoder.elements_per_token * element_bytes,
        element_bytes=element_bytes,
        dtype=load.dtype,
        seed=seed,
        request_rate=request_rate,
        max_concurrency=max_concurrency,
        priorities=in_turn(load.priorities, load.num_prompts),
        compression=load.compression,
    )
    _check_context(workload, decoder)
    workload.check(load.budgets)
    return workload


def in_turn(values: Sequence[int], count: int) -> tuple[int, ...]:
    """So many of them, from the start again after the last; none of none."""
    return tuple(islice(cycle(values), count))


def _check_context(workload: Workload, decoder: Decoder) -> None:
    """Refuse requests longer than the model; vLLM would, after it has been imported."""
    context = decoder.max_positions
    rope = decoder.fields.get("rope_parameters") or decoder.fields.get("rope_scaling") or {}
    # vLLM knows how far each kind of scaling stretches the context, and obeys this variable.
    is_stretched = rope.get("factor") or os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN") == "1"
    if context is not None and workload.max_model_len > context and not is_stretched:
        raise CommandError(
            f"--output-len: got {max(workload.output_lens)} for prompts of up to "
            f"{max(workload.prompt_lens)} tokens, wanted both together within the model's context "
            f"of {context}; lower it"
        )
