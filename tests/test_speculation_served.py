"""Over HTTP: drafts in a crowd, with preemptions and bad input."""

import asyncio
import json

import pytest

from tests.models import assert_varied, random_prompt
from tests.server import serving
from tests.speculation import DRAFTS, NGRAM
from tests.test_pressure_served import settled_metrics
from tests.test_speculation import VOCAB
from tests.test_windows_served import FLAGS, assert_everybody_got_what_he_asked_for, crowd

pytestmark = [pytest.mark.engine, pytest.mark.nightly]

NUM_BLOCKS = 24


def test_a_crowd_with_drafts_in_a_starved_pool(random_model_dir):
    model = random_model_dir("llama", 3, vocab=VOCAB)
    flags = [*FLAGS, f"--speculative-config={json.dumps(NGRAM)}"]
    with serving(model, *flags, num_blocks=NUM_BLOCKS) as server:
        assert_everybody_got_what_he_asked_for(asyncio.run(crowd(server, vocab=VOCAB)))
        metrics, stats = settled_metrics(server), server.stats()
        assert metrics["num_preemptions_total"] > 0
        assert stats["compactions"] == metrics["kv_compression_compactions_total"] >= 10
        assert metrics["kv_cache_usage_perc"] == 0
        drafted, accepted = (
            metrics[f"spec_decode_num_{kind}_tokens_total"] for kind in ("draft", "accepted")
        )
        assert 0 < accepted < drafted
        assert drafted <= DRAFTS * metrics["spec_decode_num_drafts_total"]
        # What is left of the crowd changes no answer: asked twice, it says the same.
        prompt = random_prompt(60, seed=3, vocab=VOCAB)
        first, second = (server.complete(prompt, 200).choices[0].token_ids for _ in range(2))
        assert first == second
        assert_varied(first)
        assert server.stats()["compactions"] >= stats["compactions"] + 2 * 4
        assert server.health() == 200
