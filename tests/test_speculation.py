"""Drafts are verified against a compacted cache, and the text is that of explicit eviction."""

from random import Random

import pytest
import torch
from vllm.platforms import current_platform

import rkv_vllm
from rkv_vllm.options import ServerOptions
from tests import speculation
from tests.engine import running_engine
from tests.models import random_prompt
from tests.speculation import (
    DRAFTS,
    NGRAM,
    DraftLog,
    InterpretedNgram,
    Oracle,
    OracleV2,
    assert_compacted_when_due,
    assert_equals_explicit_eviction,
)

pytestmark = pytest.mark.engine

# Few words: some n-grams come twice, and some of them go on alike.
VOCAB = 150


@pytest.fixture(autouse=True)
def nothing_is_compiled():
    """vLLM compiles parts of its rejection sampler even in eager engines, for every batch size."""
    with torch._dynamo.config.patch(disable=True):
        yield


def speculate_with(monkeypatch, speculator: type) -> None:
    """Let the V2 runner draft with a class of the tests where it is told "ngram"."""
    monkeypatch.setattr(
        "vllm.v1.worker.gpu.spec_decode.ngram.speculator.NgramGPUSpeculator", speculator
    )


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("runner", "num_tokens"),
    [
        ("v1", 200),
        ("v2", 110),
        ("v2-async", 110),
    ],
    indirect=["runner"],
)
def test_ngram_drafts_accepted_and_rejected_leave_the_text_of_explicit_eviction(
    random_model_dir, monkeypatch, runner, num_tokens
):
    if not current_platform.is_cuda():
        speculate_with(monkeypatch, InterpretedNgram)
    model = random_model_dir("llama", 3, vocab=VOCAB)
    config = ServerOptions(budget=48, buffer=16)
    # With seed 3 two scores of the fifth compaction are 7e-7 apart: a GPU keeps the other token.
    prompts = {
        f"r{i}": random_prompt(40 + 7 * i, seed=seed, vocab=VOCAB)
        for i, seed in enumerate((0, 1, 2, 13))
    }
    options = rkv_vllm.engine_args(budget=config.budget, buffer=config.buffer)
    with running_engine(model, speculative_config=NGRAM, **options) as engine:
        log = DraftLog(engine)
        for req_id, prompt in prompts.items():
            engine.add(req_id, prompt, num_tokens)
        engine.run()
        stats = engine.stats()
        engine.assert_pool_is_empty()
    assert_equals_explicit_eviction(engine, log, model, prompts, num_tokens, config)
    assert_compacted_when_due(log, prompts, config, num_tokens)
    assert stats["compactions"] >= 4 * (num_tokens - 40) // 20
    assert stats["deferred"] == 0
    # Real ones of either kind.
    assert sum(step.accepted for step in log.steps) > 10
    assert log.acceptance() < 0.9


class ErrsEverywhere(Oracle):
    """Any number of right drafts, as likely as any other."""

    def num_right(self, name: str, step: int) -> int:
        return Random(f"{name}, step {step}").randint(0, DRAFTS)


@pytest.mark.parametrize(
    "runner",
    [
        "v1",
        pytest.param("v2", marks=pytest.mark.nightly),
        pytest.param("v2-async", marks=pytest.mark.nightly),
    ],
    indirect=True,
)
def test_drafts_are_rejected_at_every_place_around_a_compaction(
    random_model_dir, monkeypatch, runner
):
    speculate_with(monkeypatch, OracleV2)
    model = random_model_dir("llama", 3)
    config = ServerOptions(budget=24, buffer=9, window=4)
    num_tokens = 90
    oracle = ErrsEverywhere()
    oracle.model_dir, oracle.config = model, config
    oracle.prompts = {f"r{i}": random_prompt(20 + 3 * i, seed=i) for i in range(5)}
    monkeypatch.setattr(speculation, "ORACLE", [oracle])
    custom = {"method": "custom_class", "model": "tests.speculation.OracleV1"}
    drafter = NGRAM if runner.use_v2 else custom | {"num_speculative_tokens": DRAFTS}
    options = rkv_vllm.engine_args(budget=24, buffer=9, window=4)
    with running_engine(model, speculative_config=drafter, **options) as engine:
        oracle.engine, log = engine, DraftLog(engine)
        for req_id, prompt in oracle.prompts.items():
            engine.add(req_id, prompt, num_tokens)
        engine.run()
        stats = engine.stats()
        engine.assert_pool_is_empty()
    assert_equals_explicit_eviction(engine, log, model, oracle.prompts, num_tokens, config)
    assert_compacted_when_due(log, oracle.prompts, config, num_tokens)
    assert stats["compactions"] >= 5 * 6
    assert stats["deferred"] == 0
    # The oracle is right as often as it means to: its mistakes alone are rejected.
    counts = [sum(step.accepted == n for step in log.steps) for n in range(DRAFTS + 1)]
    assert min(counts) > 10
    places = set()
    for req_id, prompt in oracle.prompts.items():
        due = max(config.budget, len(prompt)) + config.buffer
        for compaction in log.compactions[req_id]:
            places.add((compaction.settled_len - due, compaction.accepted))
            due = compaction.settled_len + config.buffer
    assert {late for late, _ in places} == {accepted for _, accepted in places} == {0, 1, 2, 3}
    assert len(places) >= 10
