"""An evaluation against running servers: any OpenAI endpoint, asked as its users ask it.

Sides are options of requests to one server of ours, or two servers as they are. A server tells
nobody how often one request was compacted: the sums come from the differences of its /metrics, so
nobody else may use it meanwhile. Next: report.py.
"""

import asyncio
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import openai
import requests

from rkv_vllm.bench.samples import Scrape
from rkv_vllm.bench.server import HTTP_SECONDS, POLL_SECONDS
from rkv_vllm.bench.sides import STOCK
from rkv_vllm.eval.plan import Asked, EvalPlan
from rkv_vllm.eval.question import prompt_of
from rkv_vllm.eval.session import Show, graded, problems_of, progress_of
from rkv_vllm.eval.sides import EvalSide
from rkv_vllm.eval.store import COUNTS, RUN, SPEED, Line, ResultStore
from rkv_vllm.request_options import OFF, SWITCH_KEY
from rkv_vllm.scheduling.repetition import tail_repeats

_COUNTED = ("compactions", "evicted", "num_requests")
_COMPACTIONS = "vllm:kv_compression_compactions_total"
_EVICTED = "vllm:kv_compression_evicted_tokens_total"
# Of one answer; a queue in front of it included.
_ANSWER_SECONDS = 6 * 3600
_LOCAL = ("localhost", "127.0.0.1", "::1")


class ServerError(Exception):
    """A server that cannot be measured, in one line."""


@dataclass(frozen=True)
class Endpoint:
    """A server that answers.

    Attributes:
        flag: that named it, for errors.
        url: without a trailing slash and without "/v1".
        model: name that requests give.
        is_vllm: whether it has vLLM's /metrics.
        is_compressing: whether it counts compactions.
    """

    flag: str
    url: str
    model: str
    is_vllm: bool
    is_compressing: bool

    @classmethod
    def find(cls, flag: str, url: str, model: str) -> "Endpoint":
        """Looks at a server.

        Args:
            flag: that named it.
            url: with or without "/v1".
            model: name that requests will give.

        Raises:
            ServerError: nothing answers, it does not know the model, or wants a key.
        """
        url = url.rstrip("/").removesuffix("/v1")
        served = _served_models(flag, url)
        if model not in served:
            raise ServerError(
                f"MODEL: got {model!r}, wanted one that {url} serves: {', '.join(served)}; write "
                "its name as it is there"
            )
        try:
            metrics = _get(url, "/metrics")
        except requests.RequestException:
            metrics = ""
        return cls(flag, url, model, "vllm:" in metrics, _COMPACTIONS in metrics)

    def require_compression(self) -> None:
        """Raise ServerError where no compaction is counted: nothing would be known of it."""
        if not self.is_compressing:
            raise ServerError(
                f"{self.flag}: got {self.url}, whose /metrics has no {_COMPACTIONS}, wanted a "
                "server that compresses; start it as: vllm serve MODEL --kv-compression rkv"
            )

    def scrape(self) -> Scrape:
        """Its counters, once its last step is in them.

        Raises:
            ServerError: it does not answer.
        """
        try:
            for _ in range(25):
                scrape = Scrape.parse(_get(self.url, "/metrics"))
                if scrape.running == 0:
                    break
                time.sleep(POLL_SECONDS)
        except requests.RequestException as error:
            raise _unreachable(self.flag, self.url, error) from error
        return scrape


def _get(url: str, path: str) -> str:
    with requests.Session() as session:
        # No proxy leads to this machine.
        session.trust_env = urlsplit(url).hostname not in _LOCAL
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        answer = session.get(url + path, timeout=HTTP_SECONDS, headers=headers)
        answer.raise_for_status()
        return answer.text


def _served_models(flag: str, url: str) -> list[str]:
    try:
        answer = json.loads(_get(url, "/v1/models"))
        return [each["id"] for each in answer["data"]]
    except requests.HTTPError as error:
        cure = "correct the URL"
        if error.response.status_code in (401, 403):
            cure = "put its key into the environment variable OPENAI_API_KEY"
        raise ServerError(
            f"{flag}: got {url}, which answers /v1/models with status "
            f"{error.response.status_code}, wanted an OpenAI endpoint; {cure}"
        ) from error
    except requests.RequestException as error:
        raise _unreachable(flag, url, error) from error
    except (ValueError, TypeError, LookupError) as error:
        raise ServerError(
            f"{flag}: got {url}, whose /v1/models is no list of models, wanted an OpenAI "
            "endpoint; correct the URL"
        ) from error


def _unreachable(flag: str, url: str, error: Exception) -> ServerError:
    return ServerError(
        f"{flag}: got {url}, where nothing answers ({type(error).__name__}), wanted a running "
        "server; start it or correct the URL"
    )


def run_served_eval(
    plan: EvalPlan, store: ResultStore, endpoints: Mapping[str, Endpoint], concurrency: int
) -> None:
    """Ask for what is left of an evaluation.

    Args:
        plan: the evaluation.
        store: takes each result as soon as it is there.
        endpoints: by name of side; of two servers, each is measured as it is.
        concurrency: requests that are open at the same time.

    Raises:
        ServerError: a server refused a request or stopped answering; none is tried after it.
    """
    urls = {endpoint.url for endpoint in endpoints.values()}
    with progress_of(plan, store) as show:
        for number in range(plan.rounds):
            for _, sides in plan.engines_of_round(number, is_stock_first=True):
                for side in sides:
                    for name in plan.sets:
                        asked = [a for a in plan.in_round(number) if a.problem.set == name]
                        names = {"side": side.name, "set": name, "round": number + 1}
                        endpoint = endpoints[side.name]
                        batch = _Batch(plan, store, side, endpoint, names, len(urls) > 1)
                        batch.run(asked, concurrency, show)


def with_counts(lines: Sequence[Line]) -> list[Line]:
    """The lines of a store, each request with its side's mean number of compactions.

    Args:
        lines: those of servers say None for compactions and evicted tokens.
    """
    sums: dict[tuple[str, str], dict[str, float]] = {}
    for line in lines:
        if line["kind"] == COUNTS:
            total = sums.setdefault((line["side"], line["set"]), dict.fromkeys(_COUNTED, 0.0))
            for name in _COUNTED:
                total[name] += line[name]
    found = []
    for line in lines:
        if line["kind"] == RUN and line["compactions"] is None:
            total = sums.get((line["side"], line["set"]), dict.fromkeys(_COUNTED, 0.0))
            requests_counted = total["num_requests"] or 1
            means = {n: total[n] / requests_counted for n in ("compactions", "evicted")}
            line = {**line, **means}
        found.append(line)
    return found


class _Batch:
    """The requests of one side, set and round."""

    def __init__(
        self,
        plan: EvalPlan,
        store: ResultStore,
        side: EvalSide,
        endpoint: Endpoint,
        names: dict[str, Any],
        is_as_it_is: bool,
    ) -> None:
        self._plan, self._store, self._side, self._endpoint = plan, store, side, endpoint
        self._is_as_it_is = is_as_it_is
        self._names = names
        self._problems = problems_of(plan)
        self._num_tokens = self._num_done = 0

    def run(self, asked: Sequence[Asked], concurrency: int, show: Show) -> None:
        """Ask for all that is not there yet."""
        places = list(self._open(asked))
        if not places:
            return
        self._show = lambda: show(f"{self._side.name}, {self._names['set']}", 0.0)
        self._show()
        before = self._endpoint.scrape() if self._endpoint.is_compressing else None
        started = time.perf_counter()
        try:
            asyncio.run(self._ask_all(places, concurrency))
        finally:
            # Also of a batch that was interrupted: its requests are in the file.
            if self._num_done:
                self._write_sums(time.perf_counter() - started, before)

    def _open(self, asked: Sequence[Asked]) -> Iterator[tuple[Asked, int]]:
        for each in asked:
            for sample in range(self._plan.samples):
                place = each.problem.set, each.problem.id, sample
                if self._store.get(RUN, self._side.name, *place) is None:
                    yield each, sample

    def _write_sums(self, seconds: float, before: Scrape | None) -> None:
        speed = {"seconds": seconds, "output_tokens": self._num_tokens}
        count = {"num_requests": self._num_done}
        self._store.append({"kind": SPEED, **self._names, **speed, **count})
        if before is not None:
            after = self._endpoint.scrape()
            sums = {
                "compactions": int(after.values[_COMPACTIONS] - before.values[_COMPACTIONS]),
                "evicted": int(after.values[_EVICTED] - before.values[_EVICTED]),
            }
            self._store.append({"kind": COUNTS, **self._names, **sums, **count})

    async def _ask_all(self, places: Sequence[tuple[Asked, int]], concurrency: int) -> None:
        is_local = urlsplit(self._endpoint.url).hostname in _LOCAL
        http = openai.DefaultAsyncHttpxClient(
            trust_env=not is_local, limits=openai.DEFAULT_CONNECTION_LIMITS
        )
        async with openai.AsyncOpenAI(
            base_url=f"{self._endpoint.url}/v1",
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=_ANSWER_SECONDS,
            http_client=http,
        ) as client:
            queue = iter(places)

            async def ask_one_after_the_other() -> None:
                for asked, sample in queue:
                    line = await self._ask(client, asked, sample)
                    # math-verify may take seconds, and answers go on coming.
                    line = await asyncio.to_thread(graded, line, self._problems)
                    self._num_tokens += line["output_len"]
                    self._num_done += 1
                    self._store.append(line)
                    self._show()

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(concurrency, len(places))):
                        group.create_task(ask_one_after_the_other())
            except* ServerError as errors:
                # One says enough; the other requests were cancelled.
                raise errors.exceptions[0] from None

    async def _ask(self, client: openai.AsyncOpenAI, asked: Asked, sample: int) -> Line:
        plan, problem = self._plan, asked.problem
        extra: dict[str, Any] = {"return_token_ids": True} if self._endpoint.is_vllm else {}
        if options := self._options(problem.set, problem.id, sample):
            extra["vllm_xargs"] = options
        where = f"{self._side.name}, problem {problem.id}"
        try:
            answer = await client.chat.completions.create(
                model=self._endpoint.model,
                messages=[{"role": "user", "content": prompt_of(problem)}],
                max_tokens=plan.max_tokens,
                seed=plan.seed + sample,
                extra_body=extra,
                **plan.sampling,
            )
        except openai.APIConnectionError as error:
            raise _unreachable(self._endpoint.flag, self._endpoint.url, error) from error
        except openai.APIStatusError as error:
            raise ServerError(
                f"{where}: {self._endpoint.url} refuses it: {error.message}"
            ) from error
        if answer.usage is None:
            raise ServerError(
                f"{where}: got an answer without usage from {self._endpoint.url}, wanted its "
                "numbers of tokens; use an endpoint that counts them"
            )
        choice = answer.choices[0]
        token_ids = (choice.model_extra or {}).get("token_ids") or []
        return {
            "kind": RUN,
            "side": self._side.name,
            "set": problem.set,
            "problem": problem.id,
            "sample": sample,
            "seed": plan.seed + sample,
            "prompt_len": answer.usage.prompt_tokens,
            "output_len": answer.usage.completion_tokens,
            "finish": choice.finish_reason,
            "compactions": None if self._endpoint.is_compressing else 0,
            "evicted": None if self._endpoint.is_compressing else 0,
            "is_looping": tail_repeats(token_ids) if token_ids else None,
            "token_ids": token_ids,
            "text": choice.message.content or "",
        }

    def _options(self, *place: Any) -> dict[str, Any]:
        if self._is_as_it_is:
            return {}
        if self._side.budget is None:
            return {SWITCH_KEY: OFF}
        # How long the prompt is, in the server's template, its answer to stock's request said.
        stock = self._store.get(RUN, STOCK, *place)
        return self._side.served_options(stock["prompt_len"], self._plan.common)
