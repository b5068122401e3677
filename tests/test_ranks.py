"""Several ranks: each compacts what it holds by the same directives and says what one rank says.

A tensor-parallel rank holds some heads of every layer, a pipeline stage some layers, a
data-parallel engine some requests. The ranks exchange nothing about compaction.
"""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import requests
import torch
from ray._private import ray_constants
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2
from vllm.v1.worker.worker_base import WorkerWrapperBase

import rkv_vllm
from rkv_vllm.options import ServerOptions
from tests.engine import BLOCK_SIZE, Engine, Output, running_engine
from tests.models import assert_varied, kv_cache_bytes, random_model, random_prompt
from tests.reference import generate_reference
from tests.server import Server, serving

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

CONFIG = ServerOptions(budget=64, buffer=32)
OPTIONS = rkv_vllm.engine_args(budget=64, buffer=32)
LOGPROB_TOLERANCE = 1e-3
NUM_BLOCKS = 64
# Two blocks that all requests share.
SHARED = random_prompt(64, seed=1)
CHUNK = 64
ABORTED = "aborted"


@dataclass(frozen=True)
class Chat:
    """One request of the scenario: when it arrives, what it asks for."""

    arrives_at: int
    prompt: list[int]
    max_tokens: int


# Ranks add up in another order than one rank does, so two scores that differ by less than rounding
# may swap at the cut and the kept sets part. With these seeds every cut is wider than that.
CHATS = {
    "first": Chat(0, [*SHARED, *random_prompt(7, seed=2)], 90),
    "second": Chat(0, [*SHARED, *random_prompt(20, seed=3)], 70),
    ABORTED: Chat(0, [*SHARED, *random_prompt(3, seed=4)], 90),
    "chunked": Chat(5, random_prompt(2 * CHUNK + 8, seed=5), 75),
    "late": Chat(25, [*SHARED, *random_prompt(1, seed=6)], 70),
}
ABORTED_AFTER_TOKENS = 50


@dataclass(frozen=True)
class Run:
    """What an engine said and counted.

    Attributes:
        outputs: by request.
        stats: what `rkv_vllm.stats` answers.
        per_rank: the counters of every rank.
        reports: per rank, what it reports of each request, by request.
    """

    outputs: dict[str, Output]
    stats: dict[str, int]
    per_rank: list[dict[str, int]]
    reports: list[dict[str, dict[str, int | str]]]


def run_chats(engine: Engine) -> Run:
    """Runs the scenario: arrivals in between, one request aborted while it is compressed."""
    step, waiting = 0, dict(CHATS)
    while waiting or engine.llm.llm_engine.has_unfinished_requests():
        for req_id in [r for r, chat in waiting.items() if chat.arrives_at <= step]:
            chat = waiting.pop(req_id)
            engine.add(req_id, chat.prompt, chat.max_tokens)
        engine.step()
        step += 1
        aborted = engine.outputs[ABORTED]
        if len(aborted.token_ids) >= ABORTED_AFTER_TOKENS and not aborted.finished:
            engine.llm.llm_engine.abort_request([ABORTED])
            aborted.finished = True
    return Run(
        outputs={r: output for r, output in engine.outputs.items() if r != ABORTED},
        stats=engine.stats(),
        per_rank=engine.llm.collective_rpc("kv_compression_stats"),
        reports=[by_request(r) for r in engine.llm.collective_rpc("kv_compression_requests")],
    )


def by_request(reports: list[dict[str, int | str]]) -> dict[str, dict[str, int | str]]:
    """Reports by the id that the test gave; vLLM appends a random part."""
    return {report["req_id"].rsplit("-", 1)[0]: report for report in reports}


def assert_same_outputs(run: Run, expected: dict[str, Output]) -> None:
    assert run.outputs.keys() == expected.keys()
    for req_id, output in expected.items():
        assert run.outputs[req_id].token_ids == output.token_ids, req_id
        pairs = zip(run.outputs[req_id].logprobs, output.logprobs, strict=True)
        assert max(abs(a - b) for a, b in pairs) < LOGPROB_TOLERANCE, req_id


def assert_same_compactions(run: Run, expected: Run) -> None:
    """Every rank compacted every request as often, and by as much, as the one rank did."""
    assert expected.stats["compactions"] > 0
    for per_rank, reports in zip(run.per_rank, run.reports, strict=True):
        assert per_rank == run.stats
        for req_id, report in expected.reports[0].items():
            assert report["compactions"] > 0
            for name in ("compactions", "evicted_tokens"):
                if req_id != ABORTED:
                    assert reports[req_id][name] == report[name], (req_id, name)


def num_compactions(chat: Chat) -> int:
    """Compactions of a request that never waits (SPEC section 3)."""
    first_due = max(CONFIG.budget, len(chat.prompt)) + CONFIG.buffer
    settled = len(chat.prompt) + chat.max_tokens - 2
    return (settled - first_due) // CONFIG.buffer + 1


@contextmanager
def ranks_engine(model: Path, share: float, **options: Any) -> Iterator[Engine]:
    """An engine of several processes; what they leave in shared memory is removed.

    Args:
        model: folder of a model.
        share: part of the model's KV cache that the fullest rank holds.
        options: further arguments of `LLM`.
    """
    pool = round(kv_cache_bytes(model, NUM_BLOCKS * BLOCK_SIZE) * share)
    defaults = {"distributed_executor_backend": "mp", "max_num_batched_tokens": CHUNK}
    idents: set[str] = set()
    try:
        with running_engine(
            model,
            NUM_BLOCKS,
            **{**defaults, **OPTIONS, "kv_cache_memory_bytes": pool, **options},
        ) as engine:
            idents.update(engine.llm.collective_rpc(dist_ident))
            yield engine
    finally:
        # vLLM itself leaves the segments of its collectives behind, 8 MiB per engine.
        for ident in idents:
            for segment in Path("/dev/shm").glob(f"{ident}-*"):
                segment.unlink()


def dist_ident(worker: WorkerWrapperBase) -> str:
    """Name under which a rank shares memory; runs in the worker."""
    return os.environ["VLLM_DIST_IDENT"]


@pytest.fixture(scope="module")
def model(random_model_dir) -> Path:
    """Three layers: the stages of a pipeline hold one and two."""
    return random_model_dir("qwen3", 3, layers=3)


@pytest.fixture(scope="module")
def one_rank(model) -> Run:
    """What a single rank says; its tokens are those of explicit eviction."""
    with running_engine(model, NUM_BLOCKS, max_num_batched_tokens=CHUNK, **OPTIONS) as engine:
        run = run_chats(engine)
        engine.assert_pool_is_empty()
    for req_id, output in run.outputs.items():
        chat = CHATS[req_id]
        reference = generate_reference(model, chat.prompt, chat.max_tokens, CONFIG)
        assert output.token_ids == reference.token_ids, req_id
        assert_varied(output.token_ids)
        assert run.reports[0][req_id]["compactions"] == len(reference.compactions) > 0
    return run


@pytest.mark.nightly
def test_more_ranks_than_kv_heads_compact_their_own_copies(tmp_path):
    """A rank judges a replicated head by its own query heads, as if every rank had a head."""
    model = random_model(tmp_path / "one", num_kv_heads=1, num_heads=4, layers=2)
    chats = [Chat(0, random_prompt(50 + 30 * i, seed=i), 90) for i in range(2)]
    with ranks_engine(model, 1, tensor_parallel_size=2) as engine:
        for i, chat in enumerate(chats):
            engine.add(str(i), chat.prompt, chat.max_tokens)
        engine.run()
        stats = engine.stats()
    assert stats["compactions"] == sum(map(num_compactions, chats)) > 0
    two_heads = copy_kv_head(model, tmp_path / "two")
    for i, chat in enumerate(chats):
        reference = generate_reference(two_heads, chat.prompt, chat.max_tokens, CONFIG)
        assert engine.outputs[str(i)].token_ids == reference.token_ids
        one_head = generate_reference(model, chat.prompt, chat.max_tokens, CONFIG)
        assert reference.logprobs != pytest.approx(one_head.logprobs, abs=0.01)


def copy_kv_head(model: Path, directory: Path) -> Path:
    """The same model with every KV head twice: it says the same as long as nothing is evicted."""
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = AutoConfig.from_pretrained(model)
    config.num_key_value_heads *= 2
    weights = {
        name: weight.repeat(2, 1) if name.endswith(("k_proj.weight", "v_proj.weight")) else weight
        for name, weight in original.state_dict().items()
    }
    copied = type(original)(config).float()
    copied.load_state_dict(weights)
    copied.save_pretrained(directory)
    return directory


def test_dummy_batches_of_an_idle_rank_change_nothing(model, one_rank):
    """Data-parallel ranks of MoE models run them while others work; here between all steps."""
    with running_engine(model, NUM_BLOCKS, max_num_batched_tokens=CHUNK, **OPTIONS) as engine:
        step = engine.step
        runner = engine.model_runner
        windows_in_use = []

        def step_with_dummy() -> None:
            step()
            before = runner._ring_memory.elements.clone()
            engine.llm.collective_rpc("execute_dummy_batch")
            assert runner._ring_memory.elements.equal(before)
            (track,) = engine.scheduler._tracks
            windows_in_use.append(track.planner.num_seats_in_use)

        engine.step = step_with_dummy
        run = run_chats(engine)
    assert max(windows_in_use) > 1
    assert_same_outputs(run, one_rank.outputs)
    assert_same_compactions(run, one_rank)


@contextmanager
def local_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray cluster on the loopback interface that takes a CPU for what vLLM calls a device.

    vLLM names no Ray resource for its CPU platform and refuses there; with a name its Ray executor
    runs as on a GPU. The cluster announces two such devices, which nobody looks for.
    """
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
    monkeypatch.setattr(CpuPlatform, "ray_device_key", "GPU")

    def name_device() -> None:
        from vllm.platforms.cpu import CpuPlatform

        CpuPlatform.ray_device_key = "GPU"

    # Not tmp_path: names of Ray's sockets may have 107 characters.
    directory = tempfile.mkdtemp(prefix="ray-")
    ray.init(
        num_cpus=2,
        num_gpus=2,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        _temp_dir=directory,
        runtime_env={
            "worker_process_setup_hook": name_device,
            "env_vars": {"PYTHONPATH": str(Path(__file__).parents[1])},
        },
    )
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(directory)


def home(worker: WorkerWrapperBase) -> tuple[str, str, str]:
    """Runs in the worker: its class, its runner's class, the Ray actor it lives in."""
    actor = ray.get_runtime_context().get_actor_name()
    return type(worker.worker).__name__, type(worker.model_runner).__name__, actor


@pytest.mark.nightly
def test_ray_actors_say_what_one_rank_says(model, one_rank, monkeypatch):
    with (
        local_ray(monkeypatch),
        ranks_engine(
            model, 1 / 2, tensor_parallel_size=2, distributed_executor_backend="ray"
        ) as engine,
    ):
        executor = engine.llm.llm_engine.engine_core.engine_core.model_executor
        homes = engine.llm.collective_rpc(home)
        run = run_chats(engine)
        engine.assert_pool_is_empty()
    assert type(executor) is RayExecutorV2
    assert [(worker, runner) for worker, runner, _ in homes] == [
        ("CompressionCPUWorker", "CompressionCPUModelRunner")
    ] * 2
    assert len({actor for *_, actor in homes if actor}) == 2
    assert_same_outputs(run, one_rank.outputs)
    assert_same_compactions(run, one_rank)


def wait_for_compactions(server: Server, count: int) -> None:
    """/metrics adds up both engines; the news of the last steps may arrive after the answers."""
    deadline = time.monotonic() + 10
    while (seen := server.metrics()["kv_compression_compactions_total"]) != count:
        assert time.monotonic() < deadline, f"/metrics says {seen} compactions, wanted {count}"
        time.sleep(0.2)


@pytest.mark.nightly
def test_two_engines_of_a_server_compact_their_requests(model):
    """Two engines behind one HTTP server; `collective_rpc` asks the first one only."""
    chats = [Chat(0, random_prompt(40 + 9 * i, seed=i), 80) for i in range(8)]
    flags = ("--kv-compression=rkv", "--kv-budget=64", "--kv-buffer=32")
    ranks = ("--data-parallel-size=2", "--api-server-count=1")
    with serving(model, *flags, *ranks) as server, ThreadPoolExecutor(len(chats)) as clients:
        responses = clients.map(lambda c: server.complete(c.prompt, c.max_tokens), chats)
        outputs = [response.choices[0].token_ids for response in responses]
        (first_engine,) = server.rpc("kv_compression_stats")
        wait_for_compactions(server, sum(map(num_compactions, chats)))
        metrics = requests.get(f"{server.base_url}/metrics", timeout=30).text
    for chat, output in zip(chats, outputs, strict=True):
        reference = generate_reference(model, chat.prompt, chat.max_tokens, CONFIG)
        assert output == reference.token_ids
        assert len(reference.compactions) == num_compactions(chat) > 0
    counts = re.findall(
        r'^vllm:request_success_total\{engine="(\d)",finished_reason="length".* (\d)', metrics, re.M
    )
    served = {int(engine): int(count) for engine, count in counts}
    assert sum(served.values()) == len(chats)
    assert min(served[0], served[1]) > 0
    # All requests are compacted, so the second engine compacted those that the first one did not.
    assert first_engine["requests_compacted"] == served[0]
    assert 0 < first_engine["compactions"] < sum(map(num_compactions, chats))


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("runner", "share", "ranks", "steps_ahead"),
    [
        pytest.param("v2", 1 / 2, {"tensor_parallel_size": 2}, 0, id="tensor-parallel-2"),
        pytest.param("v2-async", 2 / 3, {"pipeline_parallel_size": 2}, 2, id="pipeline-async"),
    ],
    indirect=["runner"],
)
def test_two_ranks_of_the_v2_runner_equal_explicit_eviction(
    model, runner, share, ranks, steps_ahead, monkeypatch
):
    # The workers are processes of their own and need the stub that lets V2 run on a CPU.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "triton_stub"))
    chats = [Chat(0, [*SHARED, *random_prompt(1 + 9 * i, seed=i)], 42) for i in range(2)]
    with ranks_engine(model, share, **ranks) as engine:
        batches = engine.llm.llm_engine.vllm_config.max_concurrent_batches
        for i, chat in enumerate(chats):
            engine.add(str(i), chat.prompt, chat.max_tokens)
        engine.run()
        per_rank = engine.llm.collective_rpc("kv_compression_stats")
        engine.assert_pool_is_empty()
    for i, chat in enumerate(chats):
        reference = generate_reference(
            model,
            chat.prompt,
            chat.max_tokens,
            CONFIG,
            unprocessed_steps=runner.unprocessed_steps,
        )
        assert engine.outputs[str(i)].token_ids == reference.token_ids
    assert batches == steps_ahead + 1
    assert [counted["compactions"] for counted in per_rank] == [2, 2]


# Last in this file: the engine of the last parameter lives until the end of the module.
@pytest.fixture(
    scope="module",
    params=[
        pytest.param((1 / 2, {"tensor_parallel_size": 2}), id="tensor-parallel-2"),
        pytest.param((2 / 3, {"pipeline_parallel_size": 2}), id="pipeline-parallel-2"),
    ],
)
def two_ranks(request, model) -> Iterator[Engine]:
    share, options = request.param
    with ranks_engine(model, share, **options) as engine:
        yield engine


def test_two_ranks_say_what_one_rank_says(one_rank, two_ranks):
    run = run_chats(two_ranks)
    two_ranks.assert_pool_is_empty()
    assert len(run.per_rank) == 2
    assert_same_outputs(run, one_rank.outputs)
    assert_same_compactions(run, one_rank)


def test_preemption_with_steps_in_flight_recomputes_on_all_ranks(model, two_ranks):
    """A pipeline has two steps under way when its running requests are preempted."""
    chats = {f"p{i}": Chat(0, random_prompt(40 + 11 * i, seed=20 + i), 110) for i in range(3)}
    before = two_ranks.stats()["compactions"]
    for req_id, chat in chats.items():
        two_ranks.add(req_id, chat.prompt, chat.max_tokens)
    while two_ranks.stats()["compactions"] < before + 4:
        two_ranks.step()
    assert two_ranks.llm.reset_prefix_cache(reset_running_requests=True)
    two_ranks.run()
    compactions = 0
    for req_id, chat in chats.items():
        (restart,) = two_ranks.preempted_at[req_id]
        reference = generate_reference(
            model, chat.prompt, chat.max_tokens, CONFIG, recompute_at=restart
        )
        assert two_ranks.outputs[req_id].token_ids == reference.token_ids
        compactions += len(reference.compactions)
    # A step under way may have compacted a request before its output was thrown away.
    counted = two_ranks.stats()["compactions"] - before
    assert 6 <= compactions <= counted <= compactions + len(chats)
    two_ranks.assert_pool_is_empty()
