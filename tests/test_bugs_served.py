"""Public failures as clients and operators of SmolLM2 see them; see docs/tests.md."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.server import Server, serving
from tests.test_bugs_of_vllm import SMOLLM2
from tests.test_pressure_served import settled_metrics

pytestmark = [pytest.mark.engine, pytest.mark.nightly, pytest.mark.timeout(1200)]

BUDGET, BUFFER = 64, 16
# Any text of so many characters ends before --max-tokens, whatever its tokens.
SCHEMA = {
    "type": "object",
    "properties": {"story": {"type": "string", "minLength": 400, "maxLength": 400}},
    "required": ["story"],
    "additionalProperties": False,
}
MIN_TOKENS = 200
STOP = "."
# What the prompt asks to be told of.
BAD_WORD = " river"


def ask(server: Server, number: int, prompt: str, **options: Any) -> Any:
    extra = {"return_token_ids": True, "vllm_xargs": {"kv_report": True}}
    return server.client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": prompt}],
        temperature=0.8,
        seed=number,
        extra_body={**extra, **options.pop("extra_body", {})},
        **options,
    )


def ask_for_json(server: Server, number: int) -> Any:
    schema = {"name": "story", "schema": SCHEMA, "strict": True}
    return ask(
        server,
        number,
        f"Tell me story number {number}.",
        max_tokens=440,
        response_format={"type": "json_schema", "json_schema": schema},
    )


def ask_for_text(server: Server, number: int) -> Any:
    return ask(
        server,
        number,
        "Tell me a long story about a fox and a river.",
        max_tokens=400,
        stop=[STOP],
        extra_body={"min_tokens": MIN_TOKENS, "bad_words": [BAD_WORD]},
    )


def assert_ends_where_it_may(tokenizer: Any, choice: Any) -> None:
    """No forbidden token; cut exactly at the first stop string behind the least length."""
    token_ids, text = choice.token_ids, choice.message.content
    (forbidden,) = tokenizer.encode(BAD_WORD, add_special_tokens=False)
    assert forbidden not in token_ids
    assert len(token_ids) >= MIN_TOKENS
    said = tokenizer.decode(token_ids)
    assert said.startswith(text)
    start = len(tokenizer.decode(token_ids[:MIN_TOKENS]))
    assert STOP in text[:start], "no stop string before the least length: that shows nothing"
    assert STOP not in text[start:]
    if choice.finish_reason == "stop":
        assert said[len(text) :].startswith(STOP)


def answers_across_resets(server: Server, pool: ThreadPoolExecutor) -> tuple[list[Any], list[Any]]:
    """Four answers of each kind, while all that run are preempted twice by an operator."""
    of_json = [pool.submit(ask_for_json, server, number) for number in range(4)]
    of_text = [pool.submit(ask_for_text, server, number) for number in range(4)]
    for num_tokens in (250, 450):
        deadline = time.monotonic() + 120
        while server.metrics()["generation_tokens_total"] < num_tokens:
            assert time.monotonic() < deadline, f"{num_tokens} tokens took too long"
            time.sleep(0.2)
        server.running.ask("POST", "/reset_prefix_cache?reset_running_requests=true")
    return [f.result() for f in of_json], [f.result() for f in of_text]


def test_schemas_stops_and_least_lengths_hold_in_a_starved_pool():
    """The grammar, or what a logits processor keeps, was another one after a preemption.

    https://github.com/vllm-project/vllm/pull/30916, pull/31955, issues/42619 and issues/29045.
    """
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    flags = [
        "--kv-compression=rkv",
        f"--kv-budget={BUDGET}",
        f"--kv-buffer={BUFFER}",
        "--max-model-len=512",
        # Without vLLM's gate on whole prompts nothing is reserved for growth: requests crowd in.
        "--no-scheduler-reserve-full-isl",
    ]
    # One whole text and little more, for eight requests that grow to 81 tokens.
    with serving(SMOLLM2, *flags, num_blocks=18) as server, ThreadPoolExecutor(8) as pool:
        of_json, of_text = answers_across_resets(server, pool)
        metrics, stats = settled_metrics(server), server.stats()
        assert server.health() == 200
    for answer in of_json:
        (choice,) = answer.choices
        assert choice.finish_reason == "stop"
        story = json.loads(choice.message.content)
        assert list(story) == ["story"]
        assert len(story["story"]) == 400
    for answer in of_text:
        assert_ends_where_it_may(tokenizer, answer.choices[0])
    assert "stop" in {answer.choices[0].finish_reason for answer in of_text}
    of_each = [
        [answer.kv_transfer_params["kv_report"] for answer in some] for some in (of_json, of_text)
    ]
    for reports in of_each:
        assert sum(report["preemptions"] for report in reports) >= 2
    reported = sum(report["compactions"] for reports in of_each for report in reports)
    # The engine goes on for a few steps behind a stop string, which the front end finds.
    assert reported <= stats["compactions"] <= reported + len(of_text)
    assert reported >= 4 * 2 + 4 * 7
    assert stats["compactions"] == metrics["kv_compression_compactions_total"]
    assert metrics["kv_cache_usage_perc"] == 0


def test_a_budget_beyond_all_texts_compacts_nothing_and_says_so():
    """Nothing was compacted, and nothing said so; a budget that is all window is refused.

    https://github.com/WeianMao/triattention/issues/24
    """
    flags = ["--kv-compression=rkv", "--kv-buffer=128"]
    with serving(SMOLLM2, *flags, "--kv-budget=1024", num_blocks=64) as server:
        server.complete("Once upon a time", 300)
        metrics = settled_metrics(server)
        assert server.stats()["compactions"] == metrics["kv_compression_compactions_total"] == 0
        # --max-model-len is 1024.
        assert metrics["kv_compression_first_due_tokens"] == 1024 + 128
        assert "no request will ever be compacted" in server.log
    refused = pytest.raises(AssertionError, match=r"--kv-budget .*got 8, .*--kv-window .* = 8; ")
    with refused, serving(SMOLLM2, *flags, "--kv-budget=8"):
        pass
