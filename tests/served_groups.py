"""Serves a model with several KV-cache groups and compares it with explicit eviction.

Sees to it that no flush writes a block that it does not own. Next: test_families.py.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from rkv_vllm.options import ServerOptions
from rkv_vllm.scheduling.spec import CompressedAttentionSpec
from tests.engine import Engine, running_engine
from tests.layered_reference import generate_layered_reference
from tests.models import assert_varied, random_prompt

LOGPROB_TOLERANCE = 1e-3
SHARED = random_prompt(32, seed=1)
PROMPTS = {f"r{i}": [*SHARED, *random_prompt(6 + 7 * i, seed=i)] for i in range(4)}


class CacheWatch:
    """Sees which blocks a flush writes, in all layers of all groups."""

    def __init__(self, engine: Engine) -> None:
        self.num_flushes = 0
        # By group: blocks that requests held right after compactions.
        self.blocks_left: dict[int, set[int]] = {}
        layers = engine.model_runner.compilation_config.static_forward_context
        groups = engine.scheduler.kv_cache_config.kv_cache_groups
        self._layers = [layers[name].kv_cache for group in groups for name in group.layer_names]
        self._flush = engine.model_runner.compactor.flush
        engine.model_runner.compactor.flush = self._watched_flush

    def _watched_flush(self, *args):
        before = [cache.clone() for cache in self._layers]
        done = self._flush(*args)
        for directive in done:
            left = self.blocks_left.setdefault(directive.group_id, set())
            left.add(len(directive.new_block_ids))
        allowed = {block_id for directive in done for block_id in directive.new_block_ids}
        self.num_flushes += bool(done)
        for old, cache in zip(before, self._layers, strict=True):
            changed = (old != cache).flatten(1).any(dim=1).nonzero().flatten().tolist()
            assert set(changed) <= allowed
        return done


def serve(
    model: Path, num_tokens: int, num_groups: int, **options
) -> tuple[Engine, list, dict[int, int], dict[int, set[int]]]:
    """Run all prompts, then some of them again.

    Returns:
        The engine, the specs of its groups, compactions by group, blocks left by group.
    """
    with running_engine(model, 256, num_groups, **options) as engine:
        watch = CacheWatch(engine)
        for req_id, prompt in PROMPTS.items():
            engine.add(req_id, prompt, num_tokens)
        engine.run()
        groups = engine.model_runner.compactor.groups
        compactions = {group_id: group.num_compactions for group_id, group in groups.items()}
        assert engine.stats()["compactions"] == sum(compactions.values())
        assert watch.num_flushes > 0
        assert engine.compacted_rows_checked > 0
        engine.add("again", PROMPTS["r3"], 40)
        engine.run()
        assert engine.outputs["again"].token_ids == engine.outputs["r3"].token_ids[:40]
        engine.assert_pool_is_empty()
        specs = [g.kv_cache_spec for g in engine.scheduler.kv_cache_config.kv_cache_groups]
        # Blocks that were hashed before the first compaction are found again.
        largest = max(spec.block_size for spec in specs)
        assert engine.num_cached_tokens("again") >= len(PROMPTS["r3"]) // largest * largest
        assert [isinstance(spec, CompressedAttentionSpec) for spec in specs] == [
            group_id in groups for group_id in range(num_groups)
        ]
        return engine, specs, compactions, watch.blocks_left


def assert_equal_explicit_eviction(
    engine: Engine,
    model: Path,
    num_tokens: int,
    configs: Sequence[ServerOptions | None],
    unprocessed_steps: int,
) -> torch.Tensor:
    """Returns the reference's compactions [requests, layers]."""
    compactions = []
    for req_id, prompt in PROMPTS.items():
        reference = generate_layered_reference(
            model, prompt, num_tokens, configs, unprocessed_steps
        )
        output = engine.outputs[req_id]
        assert output.token_ids == reference.token_ids, req_id
        gaps = [abs(a - b) for a, b in zip(output.logprobs, reference.logprobs, strict=True)]
        assert max(gaps) < LOGPROB_TOLERANCE
        assert_varied(output.token_ids)
        compactions.append(reference.compactions)
    return torch.tensor(compactions)
