"""From the options of `rkv-vllm bench` to a workload: refuses what cannot be measured.

Runs before any process starts. Next: `rkv_vllm/bench/workload.py`.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rkv_vllm.bench.prompts import PROBES, make_renderer, own_prompts, read_prompts
from rkv_vllm.bench.workload import Scenario, Workload
from rkv_vllm.cli.checkpoint import Decoder, check_dtype, find_config, read_config, read_decoder
from rkv_vllm.cli.errors import CommandError, check_plot, require_package
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


def read_budgets(texts: Sequence[str]) -> tuple[int, ...] | None:
    """The budgets of all `--budget` options; None when there is none."""
    parts = [part.strip() for text in texts for part in text.split(",")]
    try:
        budgets = tuple(map(int, parts))
    except ValueError as error:
        raise CommandError(
            f"--budget: got {', '.join(texts)!r}, wanted whole numbers of tokens; write it like "
            "--budget 128,256"
        ) from error
    twice = sorted({budget for budget in budgets if budgets.count(budget) > 1})
    if twice:
        raise CommandError(
            f"--budget: got {twice[0]} more than once, wanted a side for each budget; name it once"
        )
    return budgets or None


def check_options(load: Scenario, compression: dict[str, Any], request_rate: float) -> None:
    """Refuse what needs neither the model nor its tokenizer to be seen as wrong."""
    if not request_rate > 0:
        raise CommandError(
            f"--request-rate: got {request_rate}, wanted more than 0 requests per second; leave it "
            "out to send all at once"
        )
    check_dtype(load.dtype)
    for budget in load.budgets:
        ServerOptions(**{"budget": budget, "buffer": load.buffer, **compression})


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
    if dataset_path is None:
        tasks = own_prompts(load.num_prompts, seed)
    else:
        tasks = read_prompts(dataset_path, load.num_prompts)
    render, count_tokens = make_renderer(config.parent)
    prompts = tuple(map(render, tasks))
    workload = Workload(
        model=model,
        prompts=prompts,
        prompt_lens=tuple(map(count_tokens, prompts)),
        probe_lens=tuple(map(count_tokens, PROBES)),
        output_len=load.output_len,
        buffer=load.buffer,
        pool_tokens=load.pool_tokens,
        block_size=load.block_size,
        bytes_per_token=decoder.elements_per_token * decoder.dtype_bytes(load.dtype),
        dtype=load.dtype,
        seed=seed,
        request_rate=request_rate,
        max_concurrency=max_concurrency,
        protect=load.protect,
    )
    _check_context(workload, decoder)
    workload.check(load.budgets)
    return workload


def _check_context(workload: Workload, decoder: Decoder) -> None:
    """Refuse requests longer than the model; vLLM would, after it has been imported."""
    context = decoder.max_positions
    rope = decoder.fields.get("rope_parameters") or decoder.fields.get("rope_scaling") or {}
    # vLLM knows how far each kind of scaling stretches the context, and obeys this variable.
    is_stretched = rope.get("factor") or os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN") == "1"
    if context is not None and workload.max_model_len > context and not is_stretched:
        raise CommandError(
            f"--output-len: got {workload.output_len} for prompts of up to "
            f"{max(workload.prompt_lens)} tokens, wanted both together within the model's context "
            f"of {context}; lower it"
        )
