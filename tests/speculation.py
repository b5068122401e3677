"""Drafts in tests: who makes them, what became of them, and what a request must say beside them.

`DraftLog` notes drafts and compactions of an engine; `generate_drafted_reference` replays those
compactions on `reference.py`, whose text must be the engine's. `Oracle` makes drafts that are right
up to a place that the test chooses. Knows the engine of `engine.py`, no runner's insides.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from vllm.platforms import current_platform
from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator

from rkv_vllm.options import ServerOptions
from tests.engine import Engine
from tests.models import SPECIAL_TOKENS, assert_varied, random_model
from tests.reference import ReferenceRequest, ReferenceResult, load_model, single_thread

DRAFTS = 3
LOGPROB_TOLERANCE = 1e-3
# Matches of single tokens: a text of random words has few others.
NGRAM = {
    # What the V2 runner takes; on a GPU the first one forbids asynchronous scheduling.
    "method": "ngram_gpu" if current_platform.is_cuda() else "ngram",
    "num_speculative_tokens": DRAFTS,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}


class Compaction(NamedTuple):
    """One compaction of a request in one group.

    Attributes:
        settled_len: logical; tokens before it were judged.
        computed_len: logical; tokens whose keys lay in the cache when it was carried out.
        accepted: drafts of the step that it followed which were accepted.
    """

    settled_len: int
    computed_len: int
    accepted: int


class Step(NamedTuple):
    """Drafts of one request that were verified in one step.

    Attributes:
        name: of the request.
        is_compacted: whether its cache was compacted before.
        is_outdated: whether it was compacted between the drafts and their verification.
        proposed: drafts.
        accepted: of these.
    """

    name: str
    is_compacted: bool
    is_outdated: bool
    proposed: int
    accepted: int


class DraftLog:
    """Notes what an engine does, request by request, while it steps.

    Attributes:
        compactions: in order, of the first compressed group.
        steps: in which drafts were verified.
    """

    def __init__(self, engine: Engine) -> None:
        self.compactions: dict[str, list[Compaction]] = {}
        self.steps: list[Step] = []
        # Those that a step's forward is followed by.
        self._compacted: set[str] = set()
        self._scheduler = engine.scheduler
        self._group_id = engine.scheduler._tracks[0].books.kv_cache_group_id
        self._update = engine.scheduler.update_from_output
        engine.scheduler.update_from_output = self._note

    def acceptance(self, is_compacted: bool | None = None) -> float:
        """Share of the verified drafts that were accepted, before or after compactions.

        Then without those that were made before a compaction and verified after it.
        """
        steps = self.steps
        if is_compacted is not None:
            steps = [s for s in steps if s.is_compacted == is_compacted and not s.is_outdated]
        return sum(step.accepted for step in steps) / sum(step.proposed for step in steps)

    def _note(self, output, result):
        sampled = dict(zip(result.req_ids, result.sampled_token_ids, strict=True))
        accepted = {}
        for req_id, drafts in output.scheduled_spec_decode_tokens.items():
            if sampled[req_id]:
                accepted[req_id] = len(sampled[req_id]) - 1
                name = req_id.rsplit("-", 1)[0]
                is_compacted, is_outdated = name in self.compactions, req_id in self._compacted
                self.steps.append(
                    Step(name, is_compacted, is_outdated, len(drafts), accepted[req_id])
                )
        self._compacted = {directive.req_id for directive in output.kv_compression.directives}
        done = self._update(output, result)
        for directive in output.kv_compression.directives:
            request = self._scheduler.requests.get(directive.req_id)
            if request is not None and directive.group_id == self._group_id:
                name = directive.req_id.rsplit("-", 1)[0]
                computed = request.num_computed_tokens - request.num_in_flight_tokens
                self.compactions.setdefault(name, []).append(
                    Compaction(
                        directive.settled_logical_len, computed, accepted.get(directive.req_id, 0)
                    )
                )
        return done


@single_thread()
def generate_drafted_reference(
    model_dir: Path,
    prompt: Sequence[int],
    num_tokens: int,
    config: ServerOptions,
    compactions: Sequence[Compaction],
) -> ReferenceResult:
    """What a request says that is compacted at these places.

    Raises:
        AssertionError: a compaction could not be carried out where it was.
    """
    request = reference_request(model_dir, config)
    logprobs = request.prefill(prompt)
    result, left = ReferenceResult(), list(compactions)
    for _ in range(num_tokens):
        token_id = int(logprobs.argmax())
        result.token_ids.append(token_id)
        result.logprobs.append(float(logprobs[token_id]))
        logprobs = request.forward([token_id])
        while left and left[0].computed_len == request.logical_len:
            evict(request, left.pop(0).settled_len)
    assert not left, f"never came to {left}"
    return result


def reference_request(model_dir: Path, config: ServerOptions) -> ReferenceRequest:
    """One that remembers the queries of as many tokens as drafts may be in flight."""
    model = load_model(Path(model_dir), torch.float32)
    return ReferenceRequest(model, config, unprocessed_steps=3 * (DRAFTS + 1))


def evict(request: ReferenceRequest, settled_logical_len: int) -> None:
    """Shrink what settled to the budget; what was computed behind it stays."""
    num_evicted = request.logical_len - request.physical_len
    request._evict(settled_logical_len - num_evicted, settled_logical_len)


def assert_equals_explicit_eviction(
    engine: Engine, log: DraftLog, model_dir: Path, prompts: dict, num_tokens: int, config
) -> None:
    """Every request says what explicit eviction at the same places says."""
    for req_id, prompt in prompts.items():
        compactions = log.compactions.get(req_id, ())
        reference = generate_drafted_reference(model_dir, prompt, num_tokens, config, compactions)
        output = engine.outputs[req_id]
        gaps = [abs(a - b) for a, b in zip(output.logprobs, reference.logprobs, strict=True)]
        assert output.token_ids == reference.token_ids, (req_id, compactions, gaps)
        assert max(gaps) < LOGPROB_TOLERANCE
        assert_varied(output.token_ids)


def assert_compacted_when_due(
    log: DraftLog, prompts: dict, config: ServerOptions, num_tokens: int
) -> None:
    """SPEC section 3, with tokens that settle up to `1 + DRAFTS` at a time."""
    assert log.compactions.keys() == prompts.keys()
    for req_id, prompt in prompts.items():
        due_at = max(config.budget, len(prompt)) + config.buffer
        for compaction in log.compactions[req_id]:
            assert due_at <= compaction.settled_len <= due_at + DRAFTS
            due_at = compaction.settled_len + config.buffer
        # One more would have fallen within the last steps.
        assert due_at > len(prompt) + num_tokens - 3 * (1 + DRAFTS)


class Oracle:
    """Drafts what the reference says next, and errs where the test wants it to.

    Attributes:
        engine: that it drafts for; set it before the first request.
        model_dir: its model.
        config: its compression.
        prompts: by name of the request.
        num_right: of a request's step, how many drafts are right before the first wrong one.
    """

    engine: Engine
    model_dir: Path
    config: ServerOptions
    prompts: dict[str, list[int]]

    def __init__(self) -> None:
        self._requests: dict[str, ReferenceRequest] = {}
        self._steps: dict[str, int] = {}

    def num_right(self, name: str, step: int) -> int:
        return DRAFTS

    @single_thread()
    def draft(self, req_id: str, tokens: list[int]) -> list[int]:
        """The next drafts of a request.

        Args:
            req_id: vLLM's.
            tokens: its text, the token that was just sampled included.
        """
        name = req_id.rsplit("-", 1)[0]
        if name not in self._requests:
            self._requests[name] = reference_request(self.model_dir, self.config)
            self._requests[name].prefill(self.prompts[name])
        request = self._requests[name]
        computed = tokens[request.logical_len : -1]
        if computed:
            request.forward(computed)
        for directive in self.engine.model_runner.compactor.pending:
            if directive.req_id == req_id:
                with torch.inference_mode():
                    evict(request, directive.settled_logical_len)
        step = self._steps[name] = self._steps.get(name, -1) + 1
        drafts = self._continue(request, tokens[-1])
        wrong = self.num_right(name, step)
        if wrong < DRAFTS:
            drafts[wrong] = len(SPECIAL_TOKENS) + (drafts[wrong] + 1) % 64
        return drafts

    def _continue(self, request: ReferenceRequest, token_id: int) -> list[int]:
        ahead = copy.copy(request)
        ahead.layer_caches = [copy.copy(cache) for cache in request.layer_caches]
        drafts = []
        for _ in range(DRAFTS):
            token_id = int(ahead.forward([token_id]).argmax())
            drafts.append(token_id)
        return drafts


ORACLE: list[Oracle] = []


class OracleV1:
    """`ORACLE` as a proposer of the V1 runner (speculative method "custom_class")."""

    def __init__(self, vllm_config) -> None:
        (self._oracle,) = ORACLE

    def load_model(self, *args, **kwargs) -> None: ...

    def propose(self, sampled_token_ids, num_tokens, token_ids, **kwargs) -> list[list[int]]:
        req_ids = self._oracle.engine.model_runner.input_batch.req_ids
        return [
            self._oracle.draft(req_id, token_ids[i, : num_tokens[i]].tolist()) if sampled else []
            for i, (req_id, sampled) in enumerate(zip(req_ids, sampled_token_ids, strict=True))
        ]


class OracleV2(NgramGPUSpeculator):
    """`ORACLE` as a speculator of the V2 runner, in place of the one for "ngram"."""

    def propose(self, input_batch, *args, num_speculative_tokens=None, dummy_run=False, **kwargs):
        states = self.req_states
        for row in range(0 if dummy_run else input_batch.num_reqs):
            idx = int(input_batch.idx_mapping[row])
            # vLLM warms a GPU up with requests of its own.
            is_ours = input_batch.req_ids[row].rsplit("-", 1)[0] in ORACLE[0].prompts
            if is_ours and args[4][row]:
                tokens = states.all_token_ids.gpu[idx, : states.total_len.gpu[idx]].tolist()
                drafts = ORACLE[0].draft(input_batch.req_ids[row], tokens)
                self.drafts[row] = torch.tensor(drafts)
        return self.drafts[: input_batch.num_reqs]


class InterpretedNgram(NgramGPUSpeculator):
    """vLLM's own, with the last of its kernels in torch: Triton's interpreter cannot run it."""

    def propose(self, input_batch, *args, num_speculative_tokens=None, dummy_run=False, **kwargs):
        num_sampled, states = args[4], self.req_states
        for row in range(0 if dummy_run else input_batch.num_reqs):
            idx = int(input_batch.idx_mapping[row])
            tokens = states.all_token_ids.gpu[idx, : states.total_len.gpu[idx]].tolist()
            if num_sampled[row]:
                self.drafts[row] = torch.tensor(self._look_up(tokens))
        return self.drafts[: input_batch.num_reqs]

    def _look_up(self, tokens: list[int]) -> list[int]:
        """The longest match, of these the last one; behind its end the last token again."""
        for n in range(self.max_n, self.min_n - 1, -1):
            for first in range(len(tokens) - n - 1, -1, -1):
                if tokens[first : first + n] == tokens[-n:]:
                    found = tokens[first + n :][: self.num_speculative_steps]
                    return found + [tokens[-1]] * (self.num_speculative_steps - len(found))
        return [tokens[-1]] * self.num_speculative_steps


def random_eagle(directory: Path, target: Path) -> Path:
    """Writes an EAGLE head of random weights for a Llama of `random_model`, and returns its folder.

    It reads the target's embeddings and hidden states and writes through the target's head, so it
    has one layer and what mixes the two.
    """
    config = AutoConfig.from_pretrained(target)
    one = random_model(
        directory,
        "llama",
        config.num_key_value_heads,
        config.num_attention_heads,
        layers=1,
        vocab=config.vocab_size,
        seed=7,
    )
    (path,) = one.glob("*.safetensors")
    weights = {
        name.removeprefix("model."): weight
        for name, weight in load_file(path).items()
        if ".layers." in name and "input_layernorm" not in name
    }
    hidden = config.hidden_size
    generator = torch.Generator().manual_seed(8)
    weights["fc.weight"] = torch.randn(hidden, 2 * hidden, generator=generator) * hidden**-0.5
    save_file(weights, path)
    return one
