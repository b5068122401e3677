"""Public failures of vLLM under pressure, re-enacted with compression, every step audited.

docs/tests.md says what went wrong; the scheduler's part of it runs daily in
scheduling/test_bugs_of_others.py.
"""

import json
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

import rkv_vllm
from rkv_vllm.options import ServerOptions
from tests.block_audit import BlockAudit, audited_engine
from tests.engine import Engine, Output
from tests.models import assert_varied, random_prompt
from tests.reference import generate_reference
from tests.test_bugs_of_ports import assert_all_equal_restarting_ones
from tests.test_equality import LOGPROB_TOLERANCE

pytestmark = [pytest.mark.engine, pytest.mark.nightly, pytest.mark.timeout(1800)]

CONFIG = ServerOptions(budget=64, buffer=16)
OPTIONS = rkv_vllm.engine_args(budget=64, buffer=16)
RUNNERS = pytest.mark.parametrize("runner", ["v1", "v2-async"], indirect=True)
SMOLLM2 = Path(__file__).parent.parent / ".models" / "SmolLM2-135M-Instruct"


def run_within(engine: Engine, num_steps: int) -> int:
    """Run to the end, or fail where stock hung; returns the fewest free blocks."""
    least_free = engine.pool.num_gpu_blocks
    for _ in range(num_steps):
        if not engine.llm.llm_engine.has_unfinished_requests():
            return least_free
        engine.step()
        least_free = min(least_free, engine.pool.get_num_free_blocks())
    raise AssertionError(f"requests are still unfinished after {num_steps} steps")


class Session:
    """A streaming-input session of an engine: vLLM's offline interface has none."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name
        self.internal_id: str | None = None

    def send(self, token_ids: list[int]) -> int:
        """One input of the session; returns the one token that follows it."""
        self._add(token_ids, resumable=True)
        self.engine.outputs[self.name] = output = Output()
        for _ in range(20):
            # Between two inputs the scheduler alone knows the session: no rows to compare.
            self.engine._step()
            if output.token_ids:
                return output.token_ids[0]
        raise AssertionError("the session got no answer")

    def close(self) -> None:
        self._add([0], resumable=False)
        for _ in range(3):
            self.engine._step()

    def _add(self, token_ids: list[int], resumable: bool) -> None:
        llm = self.engine.llm.llm_engine
        params = SamplingParams(
            max_tokens=1,
            temperature=0,
            logprobs=0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        request = llm.input_processor.process_inputs(
            self.internal_id or self.name,
            {"prompt_token_ids": list(token_ids)},
            params,
            supported_tasks=("generate",),
            resumable=resumable,
        )
        if self.internal_id is None:
            llm.input_processor.assign_request_id(request)
            self.internal_id = request.request_id
        request.external_req_id = self.name
        # Both append to the prompt; in a server they live in two processes.
        shown = copy(request)
        shown.prompt_token_ids = list(token_ids)
        llm.output_processor.add_request(shown, None, None, 0)
        llm.engine_core.add_request(request)


def assert_as_without_prefix_caching(model, engine: Engine, req_id: str, prompt) -> None:
    engine.add(req_id, prompt, 1)
    engine.run()
    expected = generate_reference(model, prompt, 1, None)
    assert engine.outputs[req_id].token_ids == expected.token_ids
    assert engine.outputs[req_id].logprobs == pytest.approx(expected.logprobs, abs=1e-3)


@pytest.mark.parametrize(
    ("runner", "is_trained"),
    [("v1", False), ("v1", True), ("v2-async", False)],
    indirect=["runner"],
)
def test_a_session_leaves_no_stale_hash_and_neither_does_a_compaction(
    random_model_dir, runner, is_trained
):
    """A rebuilt session published its block under what it had said before.

    https://github.com/vllm-project/vllm/issues/49449, with its fixture, on its model too. What it
    says first is 29 on a CPU, 28 where the report was made.
    """
    model = SMOLLM2 if is_trained else random_model_dir("qwen3", 3)
    prompt, second, third = [10] * 15, 11, 13
    # Before its second compaction a row has one block more than the text had at its first.
    options = {
        **rkv_vllm.engine_args(budget=80, buffer=8),
        "max_model_len": 128,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 2,
    }
    with audited_engine(model, 40, **options) as (engine, _):
        session = Session(engine, "session")
        first = session.send(prompt)
        assert first != second
        session.send([second])
        session.close()
        # Its block of 16 is that of the text as it became.
        assert_as_without_prefix_caching(model, engine, "stale", [*prompt, first, third])
        assert engine.num_cached_tokens("stale") == 0
        assert_as_without_prefix_caching(model, engine, "right", [*prompt, second, third])
        assert engine.num_cached_tokens("right") == 16
        assert engine.stats()["compactions"] == 0

        engine.add("compacted", random_prompt(15, seed=3), 100)
        engine.run()
        text = [*random_prompt(15, seed=3), *engine.outputs["compacted"].token_ids]
        assert engine.stats()["compactions"] == 4
        assert_as_without_prefix_caching(model, engine, "behind", [*text[:112], third])
        # Five full blocks at the first compaction.
        assert engine.num_cached_tokens("behind") == 80
        assert engine.stats()["compactions"] == 4


@pytest.mark.parametrize("runner", ["v2-async"], indirect=True)
def test_pressure_and_a_reset_in_flight_end_no_engine(random_model_dir, runner):
    """A preempted step in flight ended the engine; victims that gave nothing back fell in a row.

    https://github.com/vllm-project/vllm/pull/48245 (47900, 46066) and
    https://github.com/vllm-project/vllm/issues/49674 (vllm-ascend 16315).
    """
    model = random_model_dir("qwen3", 3)
    requests = {f"r{i}": (random_prompt(30 + 12 * i, seed=i), 200) for i in range(6)}
    options = {
        **OPTIONS,
        "enable_prefix_caching": False,
        "max_model_len": 300,
        # Without vLLM's gate on whole prompts nothing is reserved for growth: requests crowd in.
        "scheduler_reserve_full_isl": False,
    }
    with audited_engine(model, 24, poison=True, **options) as (engine, audit):
        for req_id, (prompt, max_tokens) in requests.items():
            engine.add(req_id, prompt, max_tokens)
        for _ in range(60):
            engine.step()
        by_pressure = len(audit.freed)
        in_flight = sum(request.num_in_flight_tokens for request in engine.scheduler.running)
        assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
        run_within(engine, 2000)
        stats = engine.stats()
    assert by_pressure >= 1
    assert in_flight >= 1
    assert min(audit.freed) >= 1
    assert audit.idle_steps == 0
    assert all(output.finished for output in engine.outputs.values())
    assert_all_equal_restarting_ones(model, engine, audit, requests, CONFIG, 1)
    assert stats["compactions"] >= 6 * 5


def test_nobody_is_preempted_again_and_again_in_his_prefill(random_model_dir):
    """Resumed, a chunk prefilled, preempted again, for ever.

    https://github.com/vllm-project/vllm/issues/25538 and 37307. 53 blocks are the fewest with which
    vLLM starts; where prompts are compressed it starts with fewer.
    """
    model = random_model_dir("qwen3", 3)
    requests = {f"r{i}": (random_prompt(512, seed=i), 300) for i in range(3)}
    loads = ((53, {}, 54), (18, {"compress_prompt": True, "prompt_chunk": 64}, 72))
    for num_blocks, more, least in loads:
        config = ServerOptions(budget=64, buffer=16, **more)
        options = {
            **rkv_vllm.engine_args(budget=64, buffer=16, **more),
            "enable_prefix_caching": False,
            "max_model_len": 832,
            "max_num_batched_tokens": 64,
            "max_num_seqs": 3,
            "scheduler_reserve_full_isl": False,
        }
        with audited_engine(model, num_blocks, poison=True, **options) as (engine, audit):
            for req_id, (prompt, max_tokens) in requests.items():
                engine.add(req_id, prompt, max_tokens)
            run_within(engine, 1000)
            stats = engine.stats()
        assert engine.preempted_at, "nobody was preempted"
        assert max(map(len, engine.preempted_at.values())) <= 2
        assert audit.idle_steps == 0
        assert_all_equal_restarting_ones(model, engine, audit, requests, config)
        # Those that were preempted before they were compacted for good may count one more.
        assert least <= stats["compactions"] <= least + 8


def test_a_request_that_fills_the_pool_ends_beside_another(random_model_dir):
    """Fits into max_model_len and not into the pool: the scheduler hung.

    https://github.com/vllm-project/vllm/issues/39734. Here one request takes all blocks for itself,
    another has to wait for it.
    """
    model = random_model_dir("qwen3", 3)
    budgets = {"one": 64, "fills": 490, "two": 64}
    requests = {name: (random_prompt(20, seed=i), 490) for i, name in enumerate(budgets)}
    options = {**OPTIONS, "max_model_len": 512, "enable_prefix_caching": False}
    with audited_engine(model, 33, poison=True, **options) as (engine, audit):
        for req_id, (prompt, max_tokens) in requests.items():
            own = {"kv_budget": budgets[req_id]}
            engine.add(req_id, prompt, max_tokens, extra_args=own)
        least_free = run_within(engine, 2000)
        stats = engine.stats()
    assert least_free == 0
    assert audit.idle_steps == 0
    for req_id, asked in requests.items():
        config = replace(CONFIG, budget=budgets[req_id])
        assert_all_equal_restarting_ones(model, engine, audit, {req_id: asked}, config)
    assert stats["compactions"] >= 2 * 27 + 1


SCHEMA = {
    "type": "object",
    "properties": {"text": {"type": "string", "minLength": 620, "maxLength": 620}},
    "required": ["text"],
    "additionalProperties": False,
}


@RUNNERS
def test_what_a_request_may_say_holds_across_preemptions(random_model_dir, runner):
    """The grammar, or what a logits processor keeps, was another one after a preemption.

    https://github.com/vllm-project/vllm/pull/30916, pull/31955, issues/42619 and issues/29045.
    """
    model = random_model_dir("qwen3", 3)
    tokenizer = AutoTokenizer.from_pretrained(model)
    steps = runner.unprocessed_steps
    prompt = random_prompt(40, seed=5)
    free = generate_reference(model, prompt, 300, CONFIG, unprocessed_steps=steps).token_ids
    bad_word = tokenizer.decode([free[30]])
    options = {**OPTIONS, "enable_prefix_caching": False, "max_model_len": 512}
    with audited_engine(model, 120, poison=True, **options) as (engine, audit):
        params = {"detokenize": True, "min_tokens": 200}
        # vLLM's kernel that applies a grammar is none that Triton's interpreter can run.
        with_json = not runner.use_v2
        if with_json:
            schema = StructuredOutputsParams(json=SCHEMA)
            engine.add("json", prompt, 450, structured_outputs=schema, ignore_eos=False, **params)
        # "e" is said every few tokens, long before the 200th.
        engine.add("free", prompt, 300, stop=["e"], bad_words=[bad_word], **params)
        engine.add("newline", prompt, 300, stop=["\n\n"], **params)
        texts: dict[str, str] = {}
        _keep_texts(engine, texts)
        preempted_after = {req_id: [80, 150] for req_id in engine.outputs}
        while engine.llm.llm_engine.has_unfinished_requests():
            engine.step()
            running = {r.request_id.rsplit("-", 1)[0] for r in engine.scheduler.running}
            for req_id, lengths in preempted_after.items():
                if (
                    req_id in running
                    and lengths
                    and len(engine.outputs[req_id].token_ids) >= lengths[0]
                ):
                    del lengths[0]
                    engine.preempt(req_id)
        stats = engine.stats()
    assert {len(lengths) for lengths in audit.resumed_at.values()} == {2}
    if with_json:
        # A token has three letters at most.
        assert 200 <= len(engine.outputs["json"].token_ids) < 450
        assert list(json.loads(texts["json"])) == ["text"]
        assert len(json.loads(texts["json"])["text"]) == 620
    said = engine.outputs["free"].token_ids
    assert free[30] not in said
    assert free[30] in engine.outputs["newline"].token_ids
    pieces = [tokenizer.decode([token_id]) for token_id in said]
    assert "e" in "".join(pieces[:200]), "the stop string occurs too late to show anything"
    assert 200 < len(said) < 300
    assert "e" not in "".join(pieces[200:-1])
    assert "e" in pieces[-1]
    assert texts["free"] == "".join(pieces)[: len("".join(pieces[:-1])) + pieces[-1].index("e")]
    assert_varied(said)
    assert len(engine.outputs["newline"].token_ids) >= 200
    for req_id in engine.outputs:
        gaps = _log_probability_gaps(model, engine, audit, req_id, prompt, steps)
        assert min(gaps) > -LOGPROB_TOLERANCE, req_id
        # What the grammar forbids has no part in the sum of the others.
        assert (max(gaps) < LOGPROB_TOLERANCE) == (req_id != "json"), req_id
    assert stats["compactions"] >= 5 * len(engine.outputs)


def _keep_texts(engine: Engine, texts: dict[str, str]) -> None:
    """Note the detokenised text of each request, as a client gets it."""
    step = engine.llm.llm_engine.step

    def noting():
        items = step()
        texts.update((item.request_id, item.outputs[0].text) for item in items)
        return items

    engine.llm.llm_engine.step = noting


def _log_probability_gaps(
    model, engine: Engine, audit: BlockAudit, req_id: str, prompt, unprocessed_steps: int
) -> list[float]:
    """By how much each token was likelier than the reference says, which is made to say the same.

    Whatever made a request say it, its cache was right: raw log-probabilities are the reference's.
    """
    output = engine.outputs[req_id]
    reference = generate_reference(
        model,
        prompt,
        len(output.token_ids),
        CONFIG,
        forced_ids=output.token_ids,
        recompute_at=audit.resumed_at[req_id],
        unprocessed_steps=unprocessed_steps,
    )
    return [a - b for a, b in zip(output.logprobs, reference.logprobs, strict=True)]
