"""`--kv-when pressure` on real engines: stock's text with room, explicit eviction without."""

from pathlib import Path

import pytest

import rkv_vllm
from rkv_vllm.options import ServerOptions
from tests.engine import BLOCK_SIZE, Engine, running_engine
from tests.models import assert_varied, random_prompt
from tests.reference import generate_reference

pytestmark = pytest.mark.engine

CONFIG = ServerOptions(budget=64, buffer=32)
OPTIONS = rkv_vllm.engine_args(budget=64, buffer=32, when="pressure")
LOGPROB_TOLERANCE = 1e-3
PROMPTS = {f"r{i}": random_prompt(30 + 11 * i, seed=i) for i in range(6)}


class CompactionWatch:
    """Sees where each request was compacted: settled logical lengths."""

    def __init__(self, engine: Engine) -> None:
        self.lengths: dict[str, list[int]] = {}
        self._flush = engine.model_runner.compactor.flush
        engine.model_runner.compactor.flush = self._watched_flush

    def _watched_flush(self, *args):
        done = self._flush(*args)
        for directive in done:
            req_id = directive.req_id.rsplit("-", 1)[0]
            self.lengths.setdefault(req_id, []).append(directive.settled_logical_len)
            assert directive.reason == "pressure"
        return done


def serve(model: Path, num_blocks: int, num_tokens: int, **options):
    """Run all prompts; returns the engine, where its requests were compacted, its stats."""
    with running_engine(model, num_blocks=num_blocks, max_model_len=512, **options) as engine:
        watch = CompactionWatch(engine) if options.get("additional_config") else None
        for req_id, prompt in PROMPTS.items():
            engine.add(req_id, prompt, num_tokens)
        engine.run()
        stats = engine.stats() if watch else {}
        engine.assert_pool_is_empty()
    return engine, watch.lengths if watch else {}, stats


@pytest.mark.parametrize(
    ("runner", "num_tokens", "num_blocks"),
    [
        ("v1", 200, 23),
        pytest.param("v2", 130, 21, marks=pytest.mark.nightly),
        ("v2-async", 120, 21),
    ],
    indirect=["runner"],
)
def test_short_pool_equals_explicit_eviction_at_the_same_places(
    random_model_dir, runner, num_tokens, num_blocks
):
    model = random_model_dir("llama", 3)
    engine, lengths, stats = serve(model, num_blocks, num_tokens, **OPTIONS)
    assert engine.preempted_at == {}
    # More than the pool holds whole, at the same time.
    whole = sum(-(-(len(prompt) + num_tokens) // BLOCK_SIZE) for prompt in PROMPTS.values())
    assert whole > num_blocks
    assert engine.max_running >= 5
    assert stats["compactions"] == sum(map(len, lengths.values())) >= 4
    for req_id, prompt in PROMPTS.items():
        reference = generate_reference(
            model,
            prompt,
            num_tokens,
            CONFIG,
            unprocessed_steps=runner.unprocessed_steps,
            compacted_at=lengths.get(req_id, ()),
        )
        output = engine.outputs[req_id]
        assert output.token_ids == reference.token_ids, req_id
        gaps = [abs(a - b) for a, b in zip(output.logprobs, reference.logprobs, strict=True)]
        assert max(gaps) < LOGPROB_TOLERANCE
        assert_varied(output.token_ids)


def test_ample_pool_says_what_stock_says(random_model_dir):
    model = random_model_dir("llama", 3)
    stock, _, _ = serve(model, 128, 100)
    ours, lengths, stats = serve(model, 128, 100, **OPTIONS)
    assert lengths == {}
    assert stats["compactions"] == 0
    assert {r: o.token_ids for r, o in ours.outputs.items()} == {
        r: o.token_ids for r, o in stock.outputs.items()
    }
    assert {r: o.logprobs for r, o in ours.outputs.items()} == {
        r: o.logprobs for r, o in stock.outputs.items()
    }
