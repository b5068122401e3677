"""Inside one child process: an engine that serves some sides, one after the other.

`python -m rkv_vllm.eval.engine FOLDER` reads `job.json` there, appends each finished request to
`results.jsonl` at once, and writes `progress` while it works. The outside is session.py. Next:
forced.py, what it makes of forced text.
"""

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm import SamplingParams
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.request import RequestStatus

from rkv_vllm.bench.counts import PROGRESS_SECONDS, forget_prompts
from rkv_vllm.bench.offline import read_engine_args
from rkv_vllm.eval.forced import NUM_LOGPROBS, PROCESSOR, ForcedPass, compare, forced_params
from rkv_vllm.eval.plan import JOB, PROGRESS, RESULTS
from rkv_vllm.eval.store import FORCED, RUN, SPEED, Line
from rkv_vllm.scheduling.directive import STEP_PLAN_ATTRIBUTE, EvictionDirective
from rkv_vllm.scheduling.repetition import tail_repeats

if TYPE_CHECKING:
    from vllm import LLM


class CompactionCounts:
    """Compactions of each request of an engine in this process, from the plans of its scheduler.

    Attributes:
        first: by request, index of the first output token that was decoded after a compaction.
        decoded: steps by request.
        num_deferred: compactions of the batch that were due and began to wait.
    """

    def __init__(self, llm: "LLM", is_compressed: bool) -> None:
        self._scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self._schedule = self._scheduler.schedule
        self._is_compressed = is_compressed
        self._planned: list[EvictionDirective] = []
        self._num_groups = 1
        self.reset()
        self._scheduler.schedule = self._count_step

    def reset(self) -> None:
        """Forget all requests."""
        self._evicted: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        self.first: dict[str, int] = {}
        self.decoded: dict[str, int] = defaultdict(int)
        self._preemptions: dict[str, int] = {}
        self.num_deferred = 0

    def of(self, req_id: str) -> dict[str, int]:
        """What happened to a request.

        Returns:
            `compactions`; `evicted` tokens per layer and head; `preemptions`, after each of which
            its whole text was computed again; `deferred`, compactions of its batch that had to
            wait until now.
        """
        # Groups of layers are compacted on their own, down to budgets of their own.
        groups = list(self._evicted[req_id].values())
        evicted = sum(map(sum, groups)) // self._num_groups
        return {
            "compactions": max(map(len, groups), default=0),
            "evicted": evicted,
            "preemptions": self._preemptions.get(req_id, 0),
            "deferred": self.num_deferred,
        }

    def _count_step(self, *args: Any, **kwargs: Any) -> Any:
        output = self._schedule(*args, **kwargs)
        for internal_id in output.num_scheduled_tokens:
            req_id = _own_id(internal_id)
            self.decoded[req_id] += 1
            self._preemptions[req_id] = self._scheduler.requests[internal_id].num_preemptions
        if self._is_compressed:
            # The workers carry out what was planned one step ago, but for requests that left.
            for directive in self._planned:
                request = self._scheduler.requests.get(directive.req_id)
                if request is not None and request.status == RequestStatus.RUNNING:
                    self._count(directive)
            plan = getattr(output, STEP_PLAN_ATTRIBUTE)
            self._planned = plan.directives
            self.num_deferred += plan.num_deferred
            # Every compressed group has its own requests to watch, be they none.
            self._num_groups = len(plan.watched)
        return output

    def _count(self, directive: EvictionDirective) -> None:
        req_id = _own_id(directive.req_id)
        self._evicted[req_id][directive.group_id].append(directive.num_evict)
        # The step's own output, whose index is its length less the prompt, saw the whole cache.
        after = directive.total_len + directive.num_evicted_before - directive.prompt_len + 1
        self.first.setdefault(req_id, after)


def _own_id(internal_id: str) -> str:
    """A request's id without what vLLM appends to it."""
    return internal_id.rpartition("-")[0]


class SideRunner:
    """Serves the tasks of a job with one engine.

    Args:
        job: `engine_flags`, `is_compressed`, `is_forced`, `sampling`, `at_once`, `tasks`; see
            session.py.
        write: takes each line of the results.
        show: takes what is being done, and the requests done so far, those under way in part.
    """

    def __init__(
        self, job: dict[str, Any], write: Callable[[Line], None], show: Callable[[str, float], None]
    ) -> None:
        self._llm, self._traces = make_eval_engine(job["engine_flags"], job["is_forced"])
        self._counts = CompactionCounts(self._llm, job["is_compressed"])
        self._sampling = job["sampling"]
        # Sides that share the engine have no speeds of their own.
        self._at_once = job["at_once"]
        self._write, self._show = write, show
        self._num_done, self._shown_at = 0.0, 0.0
        # What stock says here, to be forced through it afterwards.
        self._said: dict[tuple[str, str, int], list[int]] = {}

    def run(self, tasks: list[dict[str, Any]]) -> None:
        """Serve the requests of some tasks of one kind, all at once, and write what they bring.

        Args:
            tasks: each with `kind`, `side`, `set`, `round`, and `requests`, each with `problem`,
                `sample`, `seed`, `prompt` (token ids), `max_tokens`, `extra` (its `extra_args`),
                `forced` (token ids; None: those that this engine said) and `passes`, the file of
                stock's forced pass.
        """
        engine = self._llm.llm_engine
        forget_prompts(self._llm)
        self._counts.reset()
        all_requests = [(task, request) for task in tasks for request in task["requests"]]
        waiting = {str(number): each for number, each in enumerate(all_requests)}
        num_tokens, started = 0, time.perf_counter()
        for req_id, (task, request) in waiting.items():
            if task["kind"] == FORCED and request["forced"] is None:
                request["forced"] = self._said[_place(task, request)]
            prompt = {"prompt_token_ids": request["prompt"]}
            engine.add_request(req_id, prompt, self._params(task["kind"], request))
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    task, request = waiting.pop(output.request_id)
                    num_tokens += len(output.outputs[0].token_ids)
                    self._write(self._line(task, request, output))
                    self._num_done += 1
            self._show_progress(tasks, waiting)
        seconds = time.perf_counter() - started
        task = tasks[0]
        if task["kind"] == RUN and not self._at_once:
            speed = {"seconds": seconds, "output_tokens": num_tokens}
            names = {name: task[name] for name in ("side", "set", "round")}
            num_requests = len(task["requests"])
            self._write({"kind": SPEED, **names, **speed, "num_requests": num_requests})

    def _params(self, kind: str, request: dict[str, Any]) -> SamplingParams:
        if kind == RUN:
            return SamplingParams(
                max_tokens=request["max_tokens"],
                seed=request["seed"],
                output_kind=RequestOutputKind.FINAL_ONLY,
                extra_args=request["extra"] or None,
                **self._sampling,
            )
        return forced_params(request["forced"], request["seed"], request["extra"], self._traces)

    def _line(self, task: dict[str, Any], request: dict[str, Any], output: RequestOutput) -> Line:
        req_id, completion = output.request_id, output.outputs[0]
        token_ids = list(completion.token_ids)
        names = {name: task[name] for name in ("kind", "side", "set")}
        names |= {name: request[name] for name in ("problem", "sample")}
        counts = self._counts.of(req_id)
        if task["kind"] == FORCED:
            return {**names, **self._judge_forced(request, output), **counts}
        self._said[_place(task, request)] = token_ids
        return {
            **names,
            "seed": request["seed"],
            "prompt_len": len(request["prompt"]),
            "output_len": len(token_ids),
            "finish": completion.finish_reason,
            **counts,
            "is_looping": tail_repeats(token_ids),
            "token_ids": token_ids,
            "text": completion.text,
        }

    def _judge_forced(self, request: dict[str, Any], output: RequestOutput) -> dict[str, float]:
        completion = output.outputs[0]
        if list(completion.token_ids) != request["forced"]:
            raise RuntimeError(
                f"problem {request['problem']}: vLLM decoded other tokens than those forced on it"
            )
        here = ForcedPass.of(completion.logprobs)
        path = Path(request["passes"])
        if request["is_stock"]:
            here.save(path)
            sums = compare(here, here, None)
            if self._sampling["temperature"] == 0:
                # With what it said when it was free: what another batch alone changes.
                # By probability: logits of 16 bits have ties, which no order decides.
                sums["all_num_agree"] = int((here.logprobs[:, 0] >= here.logprobs[:, 1]).sum())
            return sums
        return compare(ForcedPass.load(path), here, self._counts.first.get(output.request_id))

    def _show_progress(
        self,
        tasks: list[dict[str, Any]],
        waiting: dict[str, tuple[dict[str, Any], dict[str, Any]]],
    ) -> None:
        if time.monotonic() < self._shown_at + PROGRESS_SECONDS:
            return
        self._shown_at = time.monotonic()
        decoded = self._counts.decoded
        under_way = (
            min(1.0, decoded[req_id] / len(request["forced"] or range(request["max_tokens"])))
            for req_id, (_, request) in waiting.items()
            if req_id in decoded
        )
        task = tasks[0]
        forced = ", forced" if task["kind"] == FORCED else ""
        what = f"{task['side']}{forced}, {task['set']}, round {task['round']}"
        if len(tasks) > 1:
            what = f"{len(tasks)} sides and sets{forced}, round {task['round']}"
        self._show(what, self._num_done + sum(under_way))


def _place(task: dict[str, Any], request: dict[str, Any]) -> tuple[str, str, int]:
    return task["set"], request["problem"], request["sample"]


def make_eval_engine(flags: list[str], is_forced: bool) -> tuple["LLM", bool]:
    """Returns the engine that flags of `vllm serve` describe.

    Args:
        flags: as for `vllm serve`.
        is_forced: whether it has to decode given tokens.

    Returns:
        The engine, and whether it forces tokens by trace replay (runner V2) and not by
        `ForceTokens`.
    """
    from vllm import LLM

    engine_args = read_engine_args(flags)
    traces = False
    if is_forced:
        engine_args.max_logprobs = max(engine_args.max_logprobs, NUM_LOGPROBS)
        traces = engine_args.create_engine_config().use_v2_model_runner
        if traces:
            engine_args.enable_trace_replay = True
        else:
            engine_args.logits_processors = [*(engine_args.logits_processors or ()), PROCESSOR]
    return LLM.from_engine_args(engine_args), traces


def batches(tasks: list[dict[str, Any]], at_once: bool) -> Iterator[list[dict[str, Any]]]:
    """Yields the tasks that are served together: each by itself, or all of a kind."""
    if not at_once:
        yield from ([task] for task in tasks)
        return
    # Stock's texts are forced through it as soon as they are there.
    for kind in (RUN, FORCED):
        if together := [task for task in tasks if task["kind"] == kind]:
            yield together


def main() -> None:
    """Do the job in the folder named on the command line."""
    folder = Path(sys.argv[1])
    job = json.loads((folder / JOB).read_text())
    with (folder / RESULTS).open("a", encoding="utf-8") as results:

        def write(line: Line) -> None:
            results.write(json.dumps(line, allow_nan=False) + "\n")
            results.flush()

        def show(what: str, num_done: float) -> None:
            # Renamed into place: the reader never sees half of it.
            (folder / f"{PROGRESS}.new").write_text(json.dumps([what, num_done]))
            os.replace(folder / f"{PROGRESS}.new", folder / PROGRESS)

        runner = SideRunner(job, write, show)
        for tasks in batches(job["tasks"], job["at_once"]):
            runner.run(tasks)


if __name__ == "__main__":
    main()
