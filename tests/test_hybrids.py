"""Full attention is compacted beside layers that keep a state: convolution, Mamba2, delta net."""

from dataclasses import replace

import pytest
import torch
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

import rkv_vllm
from rkv_vllm.options import ServerOptions
from rkv_vllm.scheduling.directive import StepPlan
from rkv_vllm.scheduling.spec import CompressedAttentionSpec
from tests.engine import Engine, running_engine
from tests.hybrid_models import random_hybrid_model
from tests.models import assert_varied, random_prompt
from tests.reference import ReferenceResult, generate_reference

pytestmark = pytest.mark.engine

CONFIG = ServerOptions(budget=64, buffer=32)
LOGPROB_TOLERANCE = 1e-3
# Full blocks of it are shared, so that survivors have to move to fresh ones.
SHARED = random_prompt(70, seed=1)


@pytest.fixture
def hybrid_model(tmp_path, monkeypatch):
    """Makes a model, and mends what stock vLLM 0.32 gets wrong about these on a CPU."""
    kernel = RotaryEmbedding.forward_cpu
    spec_of = MambaMixer2.get_kv_cache_spec

    def flat(self, positions, query, key=None):
        """The kernel turns [tokens, heads, head_size] wrongly, which LFM2 hands to it."""
        rows = len(positions)
        turned = kernel(self, positions, query.reshape(rows, -1), key.reshape(rows, -1))
        return turned[0].view(query.shape), turned[1].view(key.shape)

    def split_prompts(self, vllm_config):
        """The scan ends with the last state alone; a prompt across blocks would need another."""
        spec = spec_of(self, vllm_config)
        return replace(spec, num_prefill_checkpoint_blocks=0, prefill_checkpoint_alignment=None)

    monkeypatch.setattr(RotaryEmbedding, "forward_cpu", flat)
    monkeypatch.setattr(MambaMixer2, "get_kv_cache_spec", split_prompts)
    return lambda family: random_hybrid_model(tmp_path / family, family)


class FlushWatch:
    """Fills fresh blocks with NaN, as a state may have left them, and sees that no state changes.

    Attributes:
        num_poisoned: blocks that survivors moved to.
    """

    def __init__(self, engine: Engine) -> None:
        self.num_poisoned = 0
        runner = engine.model_runner
        layers = runner.compilation_config.static_forward_context
        groups = engine.scheduler.kv_cache_config.kv_cache_groups
        self._caches = [
            layers[name].kv_cache
            for group in groups
            if isinstance(group.kv_cache_spec, CompressedAttentionSpec)
            for name in group.layer_names
        ]
        self._others = [
            (group_id, state)
            for group_id, group in enumerate(groups)
            if not isinstance(group.kv_cache_spec, CompressedAttentionSpec)
            for name in group.layer_names
            for state in layers[name].kv_cache
        ]
        self._engine = engine
        self._plan = StepPlan()
        compactor = runner.compactor
        self._begin, self._flush = compactor.begin_step, compactor.flush
        compactor.begin_step, compactor.flush = self._begin_step, self._watched_flush

    def _begin_step(self, plan: StepPlan) -> None:
        self._plan = plan
        self._begin(plan)

    def _watched_flush(self, *args):
        fresh = [
            block_id
            for directive in self._plan.directives
            for block_id in set(directive.new_block_ids).difference(directive.old_block_ids)
        ]
        self.num_poisoned += len(fresh)
        for cache in self._caches:
            cache[fresh] = torch.nan
        before = list(self._held_states())
        done = self._flush(*args)
        self._plan = StepPlan()
        assert all(map(torch.equal, before, self._held_states()))
        return done

    def _held_states(self):
        managers = self._engine.scheduler.kv_cache_manager.coordinator.single_type_managers
        for group_id, state in self._others:
            rows = managers[group_id].req_to_blocks.values()
            ids = sorted({block.block_id for row in rows for block in row if not block.is_null})
            # Bytes, because what nothing was written to yet may be NaN.
            yield state[ids].view(torch.uint8)


def serve(model, num_tokens: int, *, preempt: bool = True, **options) -> tuple[Engine, int]:
    """Staggered requests with a common prefix, chunked prompts, a preemption, a prefix hit.

    Returns:
        The engine, and blocks that were fresh.
    """
    prompts = {f"r{i}": [*SHARED, *random_prompt(20 + 31 * i, seed=i)] for i in range(3)}
    options = {**rkv_vllm.engine_args(budget=64, buffer=32), **options}
    with running_engine(model, max_num_batched_tokens=96, **options) as engine:
        watch = FlushWatch(engine)
        for req_id, prompt in prompts.items():
            engine.add(req_id, prompt, num_tokens)
            for _ in range(6):
                engine.step()
        if preempt:
            while engine.stats()["compactions"] < 4:
                engine.step()
            engine.preempt("r1")
        engine.run()
        engine.prompts = prompts
        engine.final_stats = engine.stats()
        engine.add("again", prompts["r2"], 10)
        engine.run()
        assert engine.num_cached_tokens("again") >= engine.block_size
        assert engine.outputs["again"].token_ids == engine.outputs["r2"].token_ids[:10]
        engine.assert_pool_is_empty()
        assert engine.compacted_rows_checked > 0
    return engine, watch.num_poisoned


def assert_equal_explicit_eviction(engine: Engine, model, num_tokens: int, runner) -> None:
    compactions = 0
    for req_id, prompt in engine.prompts.items():
        reference: ReferenceResult = generate_reference(
            model,
            prompt,
            num_tokens,
            CONFIG,
            recompute_at=engine.preempted_at.get(req_id, []),
            unprocessed_steps=runner.unprocessed_steps,
        )
        output = engine.outputs[req_id]
        assert output.token_ids == reference.token_ids, req_id
        gaps = [abs(a - b) for a, b in zip(output.logprobs, reference.logprobs, strict=True)]
        assert max(gaps) < LOGPROB_TOLERANCE
        assert_varied(output.token_ids)
        compactions += len(reference.compactions)
    # A preemption drops what was booked in the step before it.
    dropped = compactions - engine.final_stats["compactions"]
    assert 0 <= dropped <= len(engine.preempted_at)
    assert engine.final_stats["compactions"] >= 9


@pytest.mark.parametrize(
    ("runner", "family", "num_groups", "block_size"),
    [
        ("v1", "granite4", 2, 64),
        pytest.param("v1", "lfm2", 3, 32, marks=pytest.mark.nightly),
        pytest.param("v2", "lfm2", 3, 32, marks=pytest.mark.nightly),
        pytest.param("v2-async", "lfm2", 3, 32, marks=pytest.mark.nightly),
        pytest.param("v2-async", "granite4", 2, 64, marks=pytest.mark.nightly),
    ],
    indirect=["runner"],
)
def test_full_layers_are_compacted_beside_states(
    hybrid_model, runner, family, num_groups, block_size
):
    model, num_tokens = hybrid_model(family), 130
    engine, num_fresh = serve(
        model,
        num_tokens,
        preempt=not runner.unprocessed_steps,
        num_groups=num_groups,
        block_size=block_size,
    )
    assert num_fresh > 0
    assert_equal_explicit_eviction(engine, model, num_tokens, runner)


# vLLM runs gated delta nets on CPUs in bfloat16 only, and scores of such keys collide: so what is
# kept follows from places alone, and log-probabilities are held against transformers' own noise.
BLOCK = 160
NEWEST = ServerOptions(budget=BLOCK, buffer=32)


def keep_newest(shift: int = 0):
    """All heads keep the newest tokens, or the window and others a few places before those."""

    def keep(layer, length, keys, values, queries):
        stop = keys.shape[1]
        others = torch.arange(stop - BLOCK - shift, stop - NEWEST.window - shift)
        kept = torch.cat([others, torch.arange(stop - NEWEST.window, stop)])
        return kept.expand(keys.shape[0], -1)

    return keep


@pytest.mark.nightly
@pytest.mark.parametrize("runner", ["v1"], indirect=True)
def test_gated_delta_nets_in_bfloat16_differ_by_its_own_noise(hybrid_model, runner):
    model, num_tokens = hybrid_model("qwen3_next"), 110
    shared = random_prompt(BLOCK + 10, seed=1)
    prompts = [[*shared, *random_prompt(20 + 31 * i, seed=i)] for i in range(3)]
    options = rkv_vllm.engine_args("recent", sinks=0, budget=BLOCK, buffer=NEWEST.buffer)
    with running_engine(
        model, 64, 2, block_size=BLOCK, dtype="bfloat16", max_num_batched_tokens=200, **options
    ) as engine:
        for number, prompt in enumerate(prompts):
            engine.add(f"r{number}", prompt, num_tokens)
            for _ in range(6):
                engine.step()
        engine.run()
        stats = engine.stats()
        engine.assert_pool_is_empty()

    def reference(number, keep, dtype):
        said = engine.outputs[f"r{number}"].token_ids
        return generate_reference(
            model, prompts[number], num_tokens, NEWEST, dtype=dtype, forced_ids=said, keep=keep
        )

    gaps, noise, shifted, compactions = [], [], [], 0
    for number in range(len(prompts)):
        said = torch.tensor(engine.outputs[f"r{number}"].logprobs)
        assert_varied(engine.outputs[f"r{number}"].token_ids)
        right = reference(number, keep_newest(), torch.bfloat16)
        exact = reference(number, keep_newest(), torch.float32)
        other = reference(number, keep_newest(shift=8), torch.bfloat16)
        first = right.compactions[0].step + 1
        for found, expected, of in (
            (gaps, right, said),
            (noise, exact, torch.tensor(right.logprobs)),
            (shifted, other, said),
        ):
            found.append((of - torch.tensor(expected.logprobs)).abs()[first:].mean().item())
        compactions += len(right.compactions)
    assert stats["compactions"] == compactions == 9
    assert sum(gaps) < 2 * sum(noise)
    assert sum(shifted) > 3 * sum(gaps)
