"""A crowd of clients whose every answer is known beforehand: what they ask, and what is right.

The texts are few and come often, so that each is computed alone once; lengths, priorities, stop
strings, log-probabilities and the moment of hanging up are drawn anew for every client. Whoever was
preempted computed his text again and is compacted later from there on: he has to say what a client
does who sends prompt and text so far as a prompt. Knows HTTP alone. Next: test_medley.py.
"""

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import Any

import openai

from tests.models import random_prompt
from tests.server import Server

# Of a batch and of the same request alone; and of two tokens that either may choose.
LOGPROB_TOLERANCE = 1e-3
# Of a server in whose small pool a crowd is preempted.
FLAGS = (
    "--max-num-seqs=24",
    # Without vLLM's gate on whole prompts nothing is reserved for growth: requests crowd in.
    "--no-scheduler-reserve-full-isl",
    # A random model would fill a schema's text with blank lines.
    '--structured-outputs-config={"backend": "xgrammar", "disable_any_whitespace": true}',
    "--worker-extension-cls=tests.preemption_watch.PreemptionWatch",
)
# Beside prefix caching, priorities of vLLM 0.32 let one request read another's garbage.
BY_PRIORITY = ("--scheduling-policy=priority", "--no-enable-prefix-caching")
NUM_BLOCKS = 41
AT_ONCE = 48
GAUGES = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "kv_compression_logical_tokens",
    "kv_compression_physical_tokens",
    "kv_compression_seats_in_use",
    "kv_compression_swap_bytes",
)
SCHEMA = {
    "type": "object",
    "properties": {"text": {"type": "string", "minLength": 40, "maxLength": 40}},
    "required": ["text"],
    "additionalProperties": False,
}
OWN = (
    {},
    {"kv_budget": 24, "kv_buffer": 12},
    {"kv_budget": 16, "kv_buffer": 12},
    {"kv_protect": 8, "kv_budget": 20, "kv_buffer": 9},
    {"kv_option": "lam=0.4", "kv_budget": 24, "kv_buffer": 12},
)
OFF = {"kv_compression": "off"}


@dataclass(frozen=True)
class Text:
    """What is asked for, the same for the crowd and alone.

    Attributes:
        number: of the text.
        kind: "greedy", "sampled" (several choices, with a seed) or "json" (greedy, of a schema).
        prompt: token ids.
        longest: tokens of the answer at most.
        own: options of compression.
    """

    number: int
    kind: str
    prompt: tuple[int, ...]
    longest: int
    own: tuple[tuple[str, Any], ...]

    def body(self, prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
        """The request, as JSON."""
        body = {
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        if self.own:
            body["vllm_xargs"] = dict(self.own)
        if self.kind == "sampled":
            body |= {"temperature": 0.8, "seed": self.number, "n": 2 + self.number % 2}
        if self.kind == "json":
            body |= {"ignore_eos": False, "structured_outputs": {"json": SCHEMA}}
        return body


@dataclass
class Said:
    """One choice of an answer.

    Attributes:
        req_id: of the response, None without one.
        token_ids: so far.
        text: so far.
        logprobs: of these tokens, where they were asked for.
        top: the likeliest tokens of each step with theirs, where they were asked for.
        finish_reason: None for whoever hung up.
    """

    req_id: str | None = None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    top: list[dict[str, float]] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, response_id: str, choice: Any) -> None:
        """Append what one chunk, or the whole answer, brings."""
        self.req_id = response_id
        self.token_ids += choice.token_ids or ()
        self.text += choice.text
        self.finish_reason = choice.finish_reason or self.finish_reason
        if choice.logprobs is not None:
            self.logprobs += choice.logprobs.token_logprobs
            self.top += choice.logprobs.top_logprobs or ()


@dataclass(frozen=True)
class Client:
    """One client of the crowd.

    Attributes:
        text: what it wants.
        max_tokens: of it.
        priority: for the scheduler.
        logprobs: alternatives wanted, None for no log-probabilities.
        streams: whether the answer comes in pieces.
        hangs_up_after: tokens; None: never.
        stop: a string that ends the text; None without one.
    """

    text: Text
    max_tokens: int
    priority: int
    logprobs: int | None
    streams: bool
    hangs_up_after: int | None
    stop: str | None


def texts(
    count: int, random: Random, longest: int, own_options: Sequence[Mapping[str, Any]] = OWN
) -> list[Text]:
    """Draw texts; a sixth are sampled, a twelfth follow a schema."""
    drawn = []
    for number in range(count):
        kind = {0: "sampled", 6: "sampled", 3: "json"}.get(number % 12, "greedy")
        prompt = tuple(random_prompt(random.randint(10, 90), seed=number))
        own = random.choice(own_options)
        drawn.append(Text(number, kind, prompt, longest, tuple(own.items())))
    return drawn


class Alone:
    """What a server says while nobody else asks."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.said = cache(self._said)

    def _said(self, text: Text, before: tuple[int, ...] = ()) -> list[Said]:
        """Every choice of a text.

        Args:
            text: what is asked for.
            before: tokens of the answer that are handed in behind the prompt.
        """
        body = text.body((*text.prompt, *before), text.longest - len(before))
        response = self._server.client.completions.create(
            model=self._server.model, prompt=body.pop("prompt"), logprobs=5, extra_body=body
        )
        choices = [Said() for _ in response.choices]
        for choice in response.choices:
            choices[choice.index].add(response.id, choice)
        return choices

    def after_restarts(self, text: Text, restarts: Sequence[int]) -> Said:
        """A greedy text that was computed again after so many tokens of it, once or more often."""
        whole = Said(finish_reason="length")
        for start, end in zip([0, *restarts], [*restarts, text.longest], strict=True):
            (part,) = self.said(text, tuple(whole.token_ids))
            for name in ("token_ids", "logprobs", "top"):
                getattr(whole, name).extend(getattr(part, name)[: end - start])
        return whole


def clients(count: int, alone: Alone, drawn: Sequence[Text], random: Random) -> list[Client]:
    """Draw clients for texts; a quarter hang up, a quarter of the others stop at a string."""
    crowd = []
    for _ in range(count):
        text = random.choice(drawn)
        max_tokens = text.longest if text.kind == "json" else random.randint(3, text.longest)
        leaves = random.random() < 0.25
        stop = None
        if text.kind == "greedy" and not leaves and random.random() < 0.25:
            (said,) = alone.said(text)
            first = random.randrange(len(said.text) // 2, len(said.text) - 4)
            stop = said.text[first : first + 4]
        crowd.append(
            Client(
                text,
                max_tokens,
                priority=random.randrange(4),
                logprobs=random.choice([None, None, 0, 3]),
                streams=leaves or random.random() < 0.3,
                hangs_up_after=random.randint(0, max_tokens - 2) if leaves else None,
                stop=stop,
            )
        )
    return crowd


async def answers(server: Server, crowd: Sequence[Client], at_once: int) -> list[list[Said]]:
    """Every choice of every client; so many ask at a time."""
    places = asyncio.Semaphore(at_once)
    async with server.async_client() as connection:

        async def take_turn(client: Client) -> list[Said]:
            async with places:
                return await _ask(connection, server.model, client)

        return await asyncio.gather(*map(take_turn, crowd))


async def _ask(connection: openai.AsyncOpenAI, model: str, client: Client) -> list[Said]:
    body = client.text.body(client.text.prompt, client.max_tokens)
    body["priority"] = client.priority
    if client.stop is not None:
        body["stop"] = [client.stop]
    choices = [Said() for _ in range(body.get("n", 1))]
    answer = await connection.completions.create(
        model=model,
        prompt=body.pop("prompt"),
        logprobs=client.logprobs,
        stream=client.streams,
        extra_body=body,
    )
    if not client.streams:
        for choice in answer.choices:
            choices[choice.index].add(answer.id, choice)
        return choices
    leaves_after = client.hangs_up_after
    async for chunk in answer:
        for choice in chunk.choices:
            choices[choice.index].add(chunk.id, choice)
        if leaves_after is not None and len(choices[0].token_ids) > leaves_after:
            await answer.close()
            break
    return choices


class Judge:
    """Compares what the crowd was told with what is said alone.

    Args:
        alone: of the same server, idle.
        restarts: by request id of the engine, after how many tokens it was computed again.
        most_late: compactions that came later than they would have come alone; a text may differ
            for each.

    Attributes:
        found: how many choices were looked at, by what they were: of a kind of `Text`, "whole" or
            "restarted", "left", "stopped", "tie" (two tokens were equally likely), "late".
    """

    def __init__(
        self, alone: Alone, restarts: Mapping[str, Sequence[int]], most_late: int = 0
    ) -> None:
        self._alone = alone
        self._restarts = restarts
        self._most_late = most_late
        self.found: Counter[str] = Counter()

    def check(self, client: Client, choices: Sequence[Said]) -> None:
        """Fail unless a client got all that it asked for, and nothing else."""
        for index, said in enumerate(choices):
            self._check(client, index, said, len(choices))

    def _check(self, client: Client, index: int, said: Said, num_choices: int) -> None:
        left = client.hangs_up_after is not None and said.finish_reason is None
        self.found["left"] += left
        assert left or said.finish_reason in ("stop", "length"), said
        if said.req_id is None:
            return
        restarts = self._restarts_of(said.req_id, index, num_choices)
        restarts = [after for after in restarts if after <= len(said.token_ids)]
        self.found["restarted" if restarts else "whole"] += 1
        self.found[client.text.kind] += 1
        expected, is_known_up_to = self._expected(client.text, index, restarts)
        same = self._compare(said, expected, min(is_known_up_to, len(said.token_ids)))
        if left:
            return
        if client.text.kind == "json":
            assert said.finish_reason == "stop"
            assert len(json.loads(said.text)["text"]) == 40
        elif client.stop is not None and said.finish_reason == "stop":
            self.found["stopped"] += 1
            assert client.stop not in said.text
            assert len(said.token_ids) <= client.max_tokens
            cut = self._alone.said(client.text)[0].text.find(client.stop)
            assert restarts or not same or len(said.text) == cut
        else:
            assert said.finish_reason == "length"
            assert len(said.token_ids) == client.max_tokens
            assert client.stop is None or client.stop not in said.text

    def _restarts_of(self, response_id: str, index: int, num_choices: int) -> Sequence[int]:
        # vLLM puts the number of the choice before the id of the response, where there are several.
        mine = [
            after
            for req_id, after in self._restarts.items()
            if response_id in req_id and (num_choices == 1 or req_id.startswith(f"{index}_"))
        ]
        assert len(mine) <= 1
        return mine[0] if mine else ()

    def _expected(self, text: Text, index: int, restarts: Sequence[int]) -> tuple[Said, int]:
        """What is right, and up to which token that is known."""
        if text.kind == "greedy":
            expected = self._alone.after_restarts(text, restarts)
            return expected, len(expected.token_ids)
        # A generator or a grammar in the middle of its way cannot be handed in with a prompt.
        expected = self._alone.said(text)[index]
        return expected, restarts[0] if restarts else len(expected.token_ids)

    def _compare(self, said: Said, expected: Said, length: int) -> bool:
        """Whether the first tokens are the same; fail where they part without a tie."""
        part = self._first_difference(said, expected, length)
        if part is None:
            return True
        # The first token after a late compaction may be the same, as likely as another one.
        if self.found["late"] < self._most_late:
            self.found["late"] += 1
            return False
        got, wanted, top = said.token_ids[part], expected.token_ids[part], expected.top[part]
        apart = top[f"token_id:{wanted}"] - top.get(f"token_id:{got}", float("-inf"))
        is_tie = got != wanted and abs(apart) < LOGPROB_TOLERANCE
        assert is_tie, (
            f"{said} differs from {expected} at {part}, where the tokens are {apart} apart"
        )
        self.found["tie"] += 1
        return False

    def _first_difference(self, said: Said, expected: Said, length: int) -> int | None:
        """The first place with another token, or with another log-probability of the same."""
        for place in range(length):
            if said.token_ids[place] != expected.token_ids[place]:
                return place
            logprobs = [each.logprobs[place : place + 1] for each in (said, expected)]
            if all(logprobs) and abs(logprobs[0][0] - logprobs[1][0]) >= LOGPROB_TOLERANCE:
                return place
        return None


def idle_metrics(server: Server) -> Counter[str]:
    """The metrics once every gauge is zero; hanging up reaches the engine a moment later."""
    deadline = time.monotonic() + 30
    while any((metrics := server.metrics())[gauge] for gauge in GAUGES):
        assert time.monotonic() < deadline, {gauge: metrics[gauge] for gauge in GAUGES}
        time.sleep(0.1)
    return metrics


def serve_crowd(server: Server, count: int, alone: Alone, drawn: list, random: Random) -> Judge:
    """Let so many clients ask, and judge what each was told; returns the judge."""
    crowd = clients(count, alone, drawn, random)
    server.rpc("watch_preemptions")
    before, log_before = server.stats(), server.log
    said = asyncio.run(answers(server, crowd, AT_ONCE))
    metrics, after = idle_metrics(server), server.stats()
    # A compaction that had to wait for the copy of a shared block came later than alone.
    judge = Judge(
        alone, server.rpc("preemptions")[0], most_late=after["deferred"] - before["deferred"]
    )
    for client, choices in zip(crowd, said, strict=True):
        judge.check(client, choices)
    assert metrics["kv_compression_compactions_total"] == after["compactions"]
    assert after["compactions"] - before["compactions"] > count // 2
    assert after["non_finite"] == 0
    complaints = re.findall(r".*(?:ERROR|Traceback).*", server.log[len(log_before) :])
    assert not complaints
    return judge
