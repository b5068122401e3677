"""Given tokens are decoded by both of vLLM's runners, and compactions change the odds they had."""

import numpy as np
import pytest

import rkv_vllm
from rkv_vllm.eval.forced import (
    NUM_LOGPROBS,
    PROCESSOR,
    ForcedPass,
    compare,
    forced_params,
    kl_bound,
)
from tests.engine import running_engine
from tests.models import random_prompt

pytestmark = [pytest.mark.engine, pytest.mark.nightly]

PROMPTS = [random_prompt(40 + 9 * i, seed=i) for i in range(2)]
# No text that the model would write by itself.
FORCED = [random_prompt(60, seed=10 + i) for i in range(2)]


def passes(engine, traces, extra):
    params = [forced_params(token_ids, 0, extra, traces) for token_ids in FORCED]
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = engine.llm.generate(prompts, params, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == FORCED
    return [ForcedPass.of(output.outputs[0].logprobs) for output in outputs]


@pytest.mark.parametrize("runner", ["v1", "v2", "v2-async"], indirect=True)
def test_given_tokens_are_decoded_while_the_cache_is_compacted(random_model_dir, runner):
    traces = runner.use_v2
    forcing = {"enable_trace_replay": True} if traces else {"logits_processors": [PROCESSOR]}
    options = rkv_vllm.engine_args(budget=48, buffer=16)
    with running_engine(
        random_model_dir("qwen3", 2), max_logprobs=NUM_LOGPROBS, **forcing, **options
    ) as engine:
        whole = passes(engine, traces, {"kv_compression": "off"})
        assert engine.stats()["compactions"] == 0
        again = passes(engine, traces, {"kv_compression": "off"})
        compacted = passes(engine, traces, {})
        assert engine.stats()["compactions"] >= 4
    for stock, same, side, forced in zip(whole, again, compacted, FORCED, strict=True):
        assert stock.token_ids.shape == (60, 1 + NUM_LOGPROBS)
        np.testing.assert_array_equal(stock.token_ids[:, 0], forced)
        assert np.all(np.diff(stock.logprobs[:, 1:], axis=1) <= 0)
        assert compare(stock, same, 0)["kl"] == pytest.approx(0, abs=1e-4)
        # The odds of the model itself: what is forced is as unlikely as it was.
        assert stock.logprobs[:, 0].mean() < -3
        # The first compaction comes with the buffer's last token, and one more is in flight.
        first = 16 + 2 + runner.unprocessed_steps
        sums = compare(stock, side, first)
        assert sums["all_kl"] - sums["kl"] == pytest.approx(0, abs=1e-3)
        assert sums["kl"] > 1
        assert kl_bound(stock, side)[first] > 1e-4
