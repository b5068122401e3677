"""Served requests keep what TriAttention's formula says of their keys, from a file on disk."""

import pytest
import torch

import rkv_vllm
from rkv_vllm.methods.query_statistics import QueryStatistics, load_statistics
from rkv_vllm.options import ServerOptions
from tests import reference
from tests.engine import running_engine
from tests.models import random_prompt
from tests.reference import generate_reference

pytestmark = pytest.mark.engine

LAYERS, KV_HEADS, GROUP, SIZE = 4, 2, 3, 32
CONFIG = ServerOptions(budget=64, buffer=32)
LOGPROB_TOLERANCE = 1e-3


def random_statistics(name: str) -> QueryStatistics:
    generator = torch.Generator().manual_seed(1)
    shape = (LAYERS, KV_HEADS * GROUP, SIZE // 2)
    real, imaginary = torch.randn((2, *shape), generator=generator)
    return QueryStatistics(
        model=name,
        num_kv_heads=KV_HEADS,
        num_tokens=1,
        inv_freq=1e6 ** -(torch.arange(SIZE // 2) / (SIZE // 2)),
        mean_query=torch.cat([real, imaginary], dim=-1),
        mean_magnitude=torch.hypot(real, imaginary) + torch.rand(shape, generator=generator),
    )


class ExplicitChoice:
    """In place of R-KV's `keep_indices`: asked for one layer after the other."""

    def __init__(self, statistics: QueryStatistics) -> None:
        self.statistics = statistics
        self.num_asked = 0

    def __call__(self, keys, queries, budget, *, window, **_):
        compaction, layer = divmod(self.num_asked, LAYERS)
        self.num_asked += 1
        n = keys.shape[1]
        # Every compaction so far has evicted the buffer.
        next_position = n + compaction * CONFIG.buffer
        kept = self._scores(keys[:, : n - window].double(), layer, next_position)
        kept = kept.topk(budget - window).indices.sort().values
        return torch.cat([kept, torch.arange(n - window, n).expand(KV_HEADS, -1)], dim=1)

    def _scores(self, keys, layer: int, next_position: int):
        keys = torch.complex(*keys.chunk(2, dim=-1))
        means = torch.complex(*self.statistics.mean_query[layer].double().chunk(2, dim=-1))
        rest = self.statistics.mean_magnitude[layer] - means.abs()
        scores = []
        for head in range(KV_HEADS * GROUP):
            own = keys[head // GROUP]
            total = (rest[head] * own.abs()).sum(dim=-1)
            for power in range(17):
                angles = (next_position + 2**power) * self.statistics.inv_freq.double()
                query = means[head] * torch.exp(1j * angles)
                total += (query * own.conj()).real.sum(dim=-1) / 17
            scores.append((total - total.mean()) / total.std(correction=0))
        return torch.stack(scores).view(KV_HEADS, GROUP, -1).amax(dim=1)


@pytest.mark.parametrize("runner", ["v1"], indirect=True)
def test_output_equals_explicit_eviction(random_model_dir, tmp_path, monkeypatch, runner):
    model = random_model_dir("llama", GROUP)
    path = tmp_path / "statistics.safetensors"
    random_statistics(model.name).save(path)
    options = rkv_vllm.engine_args(
        "triattention", budget=CONFIG.budget, buffer=CONFIG.buffer, statistics=str(path)
    )
    prompts = {f"r{i}": random_prompt(30 + 11 * i, seed=i) for i in range(3)}
    with running_engine(model, **options) as engine:
        for req_id, prompt in prompts.items():
            engine.add(req_id, prompt, 200)
        engine.run()
        stats = engine.stats()
        engine.assert_pool_is_empty()
    compactions = 0
    for req_id, prompt in prompts.items():
        choice = ExplicitChoice(load_statistics(str(path)))
        monkeypatch.setattr(reference, "keep_indices", choice)
        expected = generate_reference(model, prompt, 200, CONFIG)
        output = engine.outputs[req_id]
        assert output.token_ids == expected.token_ids, req_id
        gaps = [abs(a - b) for a, b in zip(output.logprobs, expected.logprobs, strict=True)]
        assert max(gaps) < LOGPROB_TOLERANCE
        assert {each.evicted for each in expected.compactions} == {CONFIG.buffer}
        compactions += len(expected.compactions)
    # Nothing but the scores of this method tells its output from R-KV's.
    monkeypatch.undo()
    assert (
        engine.outputs["r0"].token_ids
        != generate_reference(model, prompts["r0"], 200, CONFIG).token_ids
    )
    assert stats["compactions"] == compactions >= 3 * len(prompts)
    assert stats["non_finite"] == 0
