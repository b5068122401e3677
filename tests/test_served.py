"""What clients of `vllm serve --kv-compression rkv` see: the real command, flags, plain HTTP."""

import asyncio
import json
import re
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import openai
import pytest
import requests

from rkv_vllm.bench.samples import Scrape
from rkv_vllm.options import ServerOptions
from tests import medley
from tests.models import assert_varied, random_prompt
from tests.reference import ReferenceResult, generate_reference
from tests.server import BLOCK_SIZE, Server, serving

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

CONFIG = ServerOptions(budget=64, buffer=32)
FLAGS = ("--kv-compression=rkv", "--kv-budget=64", "--kv-buffer=32")
OFF = {"kv_compression": "off"}
MAX_MODEL_LEN = 512
NUM_BLOCKS = 49
LOGPROB_TOLERANCE = 1e-3
PROMPT = random_prompt(70, seed=3)
NUM_TOKENS = 180
CLIENTS = 48


@pytest.fixture(scope="module")
def model(random_model_dir) -> Path:
    return random_model_dir("qwen3", 3)


@pytest.fixture(scope="module")
def reference(model) -> ReferenceResult:
    return generate_reference(model, PROMPT, NUM_TOKENS, CONFIG)


@pytest.fixture(scope="module")
def server(model):
    flags = (*FLAGS, f"--max-model-len={MAX_MODEL_LEN}", "--max-num-seqs=64")
    env = {"VLLM_LOG_STATS_INTERVAL": "1"}
    with serving(model, *flags, num_blocks=NUM_BLOCKS, env=env) as server:
        yield server


def num_compactions(num_prompt: int, num_output: int) -> int:
    """Compactions of a request that never waits and is never preempted (SPEC section 3)."""
    first_due = max(CONFIG.budget, num_prompt) + CONFIG.buffer
    # The last step computes the token before the last one; its own token is not settled yet.
    settled = num_prompt + num_output - 2
    return max(0, (settled - first_due) // CONFIG.buffer + 1)


def assert_says_what_the_reference_says(served: Server, reference: ReferenceResult) -> None:
    before = served.stats()
    response = served.complete(PROMPT, NUM_TOKENS, logprobs=0)
    (choice,) = response.choices
    assert choice.token_ids == reference.token_ids
    assert_varied(choice.token_ids)
    pairs = zip(choice.logprobs.token_logprobs, reference.logprobs, strict=True)
    assert max(abs(a - b) for a, b in pairs) < LOGPROB_TOLERANCE
    after, report = served.stats(), served.report(response.id)
    assert len(reference.compactions) >= 3
    assert report["compactions"] == len(reference.compactions)
    assert after["compactions"] - before["compactions"] == len(reference.compactions)
    assert report["logical_len"] == len(PROMPT) + NUM_TOKENS
    assert report["evicted_tokens"] == sum(c.evicted for c in reference.compactions)
    assert report["physical_len"] == report["logical_len"] - report["evicted_tokens"]


def test_completion_equals_explicit_eviction(server, reference):
    assert num_compactions(len(PROMPT), NUM_TOKENS) == len(reference.compactions)
    assert_says_what_the_reference_says(server, reference)


@dataclass(frozen=True)
class Chat:
    """One client: what it asks for, and after how many tokens it hangs up (None: never)."""

    prompt: list[int]
    max_tokens: int
    hangs_up_after: int | None = None


@dataclass
class Crowd:
    """What the clients and an onlooker saw.

    Attributes:
        num_streamed: tokens received, by index of the client.
        finish_reasons: of the clients that stayed.
        health: status codes of /health.
        metrics: snapshots of /metrics.
    """

    num_streamed: dict[int, int] = field(default_factory=dict)
    finish_reasons: list[str] = field(default_factory=list)
    health: list[int] = field(default_factory=list)
    metrics: list[Counter[str]] = field(default_factory=list)


def crowd_of_chats() -> list[Chat]:
    """48 clients: a third shares a prefix, another third hangs up midway."""
    shared = random_prompt(96, seed=100)
    chats = []
    for i in range(CLIENTS):
        length = 5 + 59 * i % 296
        prompt = random_prompt(length, seed=i)
        if i % 3 == 1:
            prompt = [*shared, *prompt[: length // 2 + 1]]
        max_tokens = 30 + 37 * i % 150
        hangs_up_after = 10 + max_tokens // 2 if i % 3 == 0 else None
        chats.append(Chat(prompt, max_tokens, hangs_up_after))
    return chats


async def stream_chat(
    client: openai.AsyncOpenAI, model: str, index: int, chat: Chat, crowd: Crowd
) -> None:
    stream = await client.completions.create(
        model=model,
        prompt=chat.prompt,
        max_tokens=chat.max_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    num_streamed, finish_reason = 0, None
    async for chunk in stream:
        for choice in chunk.choices:
            num_streamed += len(choice.token_ids or ())
            finish_reason = choice.finish_reason or finish_reason
        if chat.hangs_up_after is not None and num_streamed >= chat.hangs_up_after:
            await stream.close()
            break
    crowd.num_streamed[index] = num_streamed
    if chat.hangs_up_after is None:
        crowd.finish_reasons.append(finish_reason)


async def look_on(server: Server, crowd: Crowd, everybody_left: asyncio.Event) -> None:
    while not everybody_left.is_set():
        crowd.health.append(await asyncio.to_thread(server.health))
        crowd.metrics.append(await asyncio.to_thread(server.metrics))
        await asyncio.sleep(0.2)


async def run_crowd(server: Server, chats: list[Chat]) -> Crowd:
    crowd, everybody_left = Crowd(), asyncio.Event()
    onlooker = asyncio.create_task(look_on(server, crowd, everybody_left))
    async with server.async_client() as client:
        streams = [stream_chat(client, server.model, i, c, crowd) for i, c in enumerate(chats)]
        await asyncio.gather(*streams)
    everybody_left.set()
    await onlooker
    return crowd


def wait_until_idle(server: Server) -> Counter[str]:
    """The first metrics without requests; hanging up reaches the engine a moment later."""
    deadline = time.monotonic() + 30
    while True:
        metrics = server.metrics()
        if metrics["num_requests_running"] == metrics["num_requests_waiting"] == 0:
            return metrics
        assert time.monotonic() < deadline, f"still busy: {metrics}"
        time.sleep(0.2)


def test_crowd_with_a_third_hanging_up_leaves_an_empty_pool(server):
    chats = crowd_of_chats()
    stays = [chat for chat in chats if chat.hangs_up_after is None]
    before, metrics_before = server.stats(), server.metrics()
    crowd = asyncio.run(run_crowd(server, chats))
    metrics, after = wait_until_idle(server), server.stats()

    assert crowd.finish_reasons == ["length"] * len(stays)
    for i, chat in enumerate(chats):
        if chat.hangs_up_after is None:
            assert crowd.num_streamed[i] == chat.max_tokens
        else:
            assert chat.hangs_up_after <= crowd.num_streamed[i] < chat.max_tokens
    assert len(stays) == 2 * CLIENTS // 3
    assert len(crowd.health) > 1
    assert set(crowd.health) == {200}

    # The prompts alone fill the pool more than twice, whatever they share.
    own_blocks = sum(len(chat.prompt) // BLOCK_SIZE for i, chat in enumerate(chats) if i % 3 != 1)
    pool = Scrape.of(server.running)
    assert own_blocks > 2 * pool.pool_blocks

    assert metrics["kv_cache_usage_perc"] == 0
    assert (pool.held_blocks, pool.pool_blocks) == (0, NUM_BLOCKS - 1)
    assert metrics["prefix_cache_hits_total"] > metrics_before["prefix_cache_hits_total"]
    for counter in ("compactions", "evicted_tokens", "freed_blocks", "deferred"):
        shown = [
            m[f"kv_compression_{counter}_total"] for m in (metrics_before, *crowd.metrics, metrics)
        ]
        assert shown == sorted(shown)
        assert shown[-1] == after[counter]
    # Whoever is preempted or has to wait loses one compaction at most; nobody gains one.
    preempted = metrics["num_preemptions_total"] - metrics_before["num_preemptions_total"]
    waited = after["deferred"] - before["deferred"]
    least = sum(num_compactions(len(chat.prompt), chat.max_tokens) for chat in stays)
    most = sum(num_compactions(len(chat.prompt), chat.max_tokens) for chat in chats)
    assert least >= 2 * len(stays)
    assert least - preempted - waited <= after["compactions"] - before["compactions"] <= most


def test_progress_line_per_interval_in_the_log(server):
    server.complete(PROMPT, 60)
    time.sleep(1.1)
    server.complete(PROMPT, 2)
    lines = re.findall(r"INFO .*KV compression: (\d+) compactions so far, (\d+) tokens", server.log)
    stats = server.stats()
    assert tuple(map(int, lines[-1])) == (stats["compactions"], stats["evicted_tokens"])
    assert stats["compactions"] > 0


def test_prompt_beyond_max_model_len_gets_400_and_the_server_lives_on(server):
    with pytest.raises(openai.BadRequestError, match=f"maximum context length is {MAX_MODEL_LEN}"):
        server.complete(random_prompt(MAX_MODEL_LEN + 1, seed=0), 1)
    broken = requests.post(
        f"{server.base_url}/v1/completions",
        data="{oops",
        headers={"content-type": "application/json"},
        timeout=60,
    )
    assert broken.status_code == 400
    assert server.health() == 200
    assert server.complete(PROMPT, 3).usage.completion_tokens == 3


TEXTS = {
    "completions": {"prompt": "x"},
    "chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "responses": {"input": "x"},
    "messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
}
BAD_OPTIONS = [
    ("kv_budget", 8),
    ("kv_budget", "64"),
    ("kv_budget", True),
    ("kv_buffer", 1),
    ("kv_compression", "on"),
    ("kv_window", 4),
    ("kv_protect", "all"),
    ("kv_option", "lam=2"),
    ("kv_option", ["threshold=0", "strength=3"]),
]
# Each value at one endpoint, and each endpoint with one value.
REFUSED = [("completions", *option) for option in BAD_OPTIONS]
REFUSED += [(endpoint, "kv_budget", 8) for endpoint in TEXTS if endpoint != "completions"]


def post(server: Server, endpoint: str, **fields: object) -> requests.Response:
    body = {"model": server.model, **TEXTS[endpoint], **fields}
    return requests.post(f"{server.base_url}/v1/{endpoint}", json=body, timeout=60)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("endpoint", "key", "value"), REFUSED)
def test_a_bad_request_option_gets_400_with_its_name_and_is_not_run(
    server, endpoint, key, value, stream
):
    before, log_before = server.metrics()["request_success_total"], server.log
    answer = post(server, endpoint, stream=stream, vllm_xargs={key: value})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == key
    assert error["message"].startswith(f"{key}: got {value!r}, wanted ")
    metrics = server.metrics()
    assert metrics["request_success_total"] == before
    assert metrics["num_requests_running"] == metrics["num_requests_waiting"] == 0
    logged = server.log[len(log_before) :]
    assert "400 Bad Request" in logged
    assert "ERROR" not in logged
    assert "Traceback" not in logged


def test_beam_search_runs_without_options_and_refuses_them_by_name(server):
    beams = {"use_beam_search": True, "n": 2, "max_tokens": 3}
    answer = post(server, "completions", **beams)
    assert len(answer.json()["choices"]) == 2
    answer = post(server, "completions", **beams, vllm_xargs={"kv_budget": 64})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "kv_budget"
    assert "use_beam_search" in answer.json()["error"]["message"]


def test_a_request_sets_its_own_budget_or_keeps_its_whole_cache(server, model):
    small = replace(CONFIG, budget=40, buffer=20)
    for own, config in (({"kv_budget": 40, "kv_buffer": 20}, small), (OFF, None)):
        before = server.stats()["compactions"]
        response = server.complete(PROMPT, 100, extra_body={"vllm_xargs": own})
        expected = generate_reference(model, PROMPT, 100, config)
        assert response.choices[0].token_ids == expected.token_ids
        compactions = server.stats()["compactions"] - before
        assert compactions == len(expected.compactions) == (0 if config is None else 4)


def test_a_compacted_request_in_a_loop_is_counted_and_logged_and_another_is_not(server):
    says_one_token = {"logit_bias": {"7": 100}}
    for own, params, looping in (
        ({}, {}, 0),
        ({}, says_one_token, 1),
        (OFF, says_one_token, 0),
    ):
        before, metrics_before, log_before = server.stats(), wait_until_idle(server), server.log
        extra = {"vllm_xargs": own} if own else {}
        response = server.complete(PROMPT, NUM_TOKENS, extra_body=extra, **params)
        assert (set(response.choices[0].token_ids) == {7}) == bool(params)
        compactions = server.stats()["compactions"] - before["compactions"]
        assert compactions == (0 if own else num_compactions(len(PROMPT), NUM_TOKENS))
        name = "kv_compression_looping_requests_total"
        assert wait_until_idle(server)[name] - metrics_before[name] == looping
        lines = re.findall(r"request (\S+) began to repeat", server.log[len(log_before) :])
        assert len(lines) == looping
        assert all(response.id in line for line in lines)


def test_a_request_that_asks_gets_its_numbers_or_finds_them_in_the_log(server):
    asks = {"extra_body": {"vllm_xargs": {"kv_report": True}}}
    before = server.log
    whole = server.complete(PROMPT, NUM_TOKENS, **asks)
    report, of_worker = whole.kv_transfer_params["kv_report"], server.report(whole.id)
    assert report["compactions"] == of_worker["compactions"] >= 3
    assert report["evicted_tokens"] == of_worker["evicted_tokens"]
    # The worker counts the last token, whose key nobody computed.
    assert report["kept_tokens"] == of_worker["physical_len"] - 1
    assert report["preemptions"] == 0

    text = whole.choices[0].text
    start = next(i for i in range(2 * len(text) // 3, len(text)) if text.find(text[i : i + 5]) == i)
    stopped = server.complete(PROMPT, NUM_TOKENS, stop=[text[start : start + 5]], **asks)
    assert stopped.choices[0].finish_reason == "stop"
    stopped_report = stopped.kv_transfer_params["kv_report"]
    done = stopped.usage.completion_tokens
    assert stopped_report["compactions"] == num_compactions(len(PROMPT), done) >= 1

    two = list(server.complete(PROMPT, 110, n=2, temperature=0.8, seed=5, stream=True, **asks))
    assert {choice.index for chunk in two for choice in chunk.choices} == {0, 1}
    assert server.complete(PROMPT, 3).kv_transfer_params is None
    wait_until_idle(server)
    found = re.findall(r"kv_report: ({.*})", server.log[len(before) :])
    lines = {line["request_id"]: line for line in map(json.loads, found)}
    assert len(found) == len(lines) == 4
    assert lines[report["request_id"]] == {**report, "finish_reason": "length"}
    # It ended in the API server, which then called it off.
    assert lines[stopped_report["request_id"]]["finish_reason"] == "abort"
    choices = [line for req_id, line in lines.items() if two[0].id in req_id]
    assert [line["compactions"] for line in choices] == [num_compactions(len(PROMPT), 110)] * 2


def test_every_route_has_a_place_for_the_report(server):
    asks = {"model": server.model, "temperature": 0, "vllm_xargs": {"kv_report": True}}
    chat = {"messages": [{"role": "user", "content": "tell me something"}], "max_tokens": 120}
    for route, body in (
        ("chat/completions", chat),
        ("messages", chat),
        ("responses", {"input": "tell me something", "max_output_tokens": 120}),
    ):
        before = server.stats()["compactions"]
        answer = requests.post(f"{server.base_url}/v1/{route}", json={**asks, **body}, timeout=60)
        assert answer.status_code == 200, answer.text
        report = answer.json()["kv_transfer_params"]["kv_report"]
        assert report["compactions"] == server.stats()["compactions"] - before >= 1, route


def test_two_choices_of_one_prompt_are_both_compacted(server):
    before = server.stats()
    response = server.complete(PROMPT, 120, n=2, temperature=0.8, seed=5)
    first, second = response.choices
    assert len(first.token_ids) == len(second.token_ids) == 120
    assert first.token_ids != second.token_ids
    after = server.stats()
    assert after["compactions"] - before["compactions"] == 2 * num_compactions(len(PROMPT), 120)
    assert after["requests_compacted"] - before["requests_compacted"] == 2


def test_stop_string_ends_a_compacted_request(server):
    text = server.complete(PROMPT, 150).choices[0].text
    # Late in the text, so that the request is compacted before, and nowhere earlier.
    start = next(i for i in range(2 * len(text) // 3, len(text)) if text.find(text[i : i + 5]) == i)
    stop = text[start : start + 5]
    before = server.stats()
    response = server.complete(PROMPT, 150, stop=[stop])
    assert response.choices[0].finish_reason == "stop"
    assert response.choices[0].text == text[:start]
    done = response.usage.completion_tokens
    assert 90 <= done < 150
    compactions = server.stats()["compactions"] - before["compactions"]
    assert compactions == num_compactions(len(PROMPT), done) >= 1


def test_sampling_with_a_seed_repeats_itself_across_compactions(server):
    before = server.stats()
    texts = [
        server.complete(PROMPT, 120, temperature=0.8, seed=seed).choices[0].text
        for seed in (7, 7, 8)
    ]
    assert texts[0] == texts[1] != texts[2]
    compactions = server.stats()["compactions"] - before["compactions"]
    assert compactions == 3 * num_compactions(len(PROMPT), 120) > 0


def test_json_schema_holds_across_compactions(server):
    schema = {
        "type": "object",
        "properties": {"text": {"type": "string", "minLength": 300, "maxLength": 300}},
        "required": ["text"],
        "additionalProperties": False,
    }
    before = server.stats()
    response = server.client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": "tell me something"}],
        temperature=0,
        max_tokens=400,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "something", "schema": schema, "strict": True},
        },
    )
    assert response.choices[0].finish_reason == "stop"
    answer = json.loads(response.choices[0].message.content)
    assert list(answer) == ["text"]
    assert len(answer["text"]) == 300
    used = response.usage
    compactions = server.stats()["compactions"] - before["compactions"]
    assert compactions == num_compactions(used.prompt_tokens, used.completion_tokens) >= 1


@pytest.fixture(scope="module")
def other_server(model, tmp_path_factory):
    flags = ("--no-enforce-eager", "--api-server-count=2")
    # An own cache: what an earlier version of this package compiled must not answer.
    env = {"VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("cache"))}
    with serving(model, *FLAGS, *flags, env=env) as server:
        yield server


@pytest.mark.nightly
def test_compiled_and_behind_two_api_servers_it_says_the_same(other_server, reference):
    assert_says_what_the_reference_says(other_server, reference)
    assert "Started 2 API server processes" in other_server.log


@pytest.fixture(scope="module")
def limited_server(model, tmp_path_factory):
    """Started without a flag of ours, as in a container; a crowd does not fit into its pool."""
    file = tmp_path_factory.mktemp("config") / "serve.yaml"
    file.write_text("kv-budget: 64\nkv-max-request-tokens: 400\n")
    env = {"RKV_COMPRESSION": "rkv", "RKV_BUDGET": "96", "RKV_BUFFER": "32"}
    flags = ("--config", str(file), *medley.FLAGS, *medley.BY_PRIORITY)
    with serving(model, *flags, num_blocks=medley.NUM_BLOCKS, env=env) as server:
        yield server


def test_a_file_and_the_environment_start_what_flags_start(limited_server, reference):
    assert_says_what_the_reference_says(limited_server, reference)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_tokens", [304, 305])
def test_a_protected_prompt_counts_against_the_servers_limit(limited_server, num_tokens, stream):
    answer = requests.post(
        f"{limited_server.base_url}/v1/completions",
        json={
            "model": limited_server.model,
            "prompt": random_prompt(num_tokens, seed=1),
            "max_tokens": 1,
            "stream": stream,
            "vllm_xargs": {"kv_protect": "prompt"},
        },
        timeout=60,
    )
    assert answer.status_code == (200 if num_tokens + 64 + 32 <= 400 else 400)
    if answer.status_code == 400:
        assert answer.json()["error"]["param"] == "kv_protect"
        assert "not 305 protected + 64 + 32; lower it" in answer.json()["error"]["message"]


def test_two_hundred_requests_of_all_kinds_are_each_right(limited_server):
    random, alone = Random(1), medley.Alone(limited_server)
    found = medley.serve_crowd(
        limited_server, 200, alone, medley.texts(16, random, 44), random
    ).found
    assert found["whole"] + found["restarted"] > 200
    assert found["restarted"] >= 5, "the pool was meant to be too small"
    assert min(found["left"], found["sampled"], found["json"]) > 10
    assert found["stopped"] > 2
    assert found["tie"] <= 2
    assert found["late"] == 0
