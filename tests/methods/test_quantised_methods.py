"""Every method scores an fp8 cache like a float32 cache that holds the numbers its bytes mean."""

from dataclasses import replace

import pytest
import torch

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.ops import Ops, triton_ops
from rkv_vllm.kernels.paged import FLOATS_OF_A_BYTE, PagedStates, Quantisation
from rkv_vllm.methods import Heads, ModelFacts, available_methods, get_method
from tests.kernels.cases import CPU, NAIVE, SCORE_TOLERANCE, SMALL_STATES, new_case, new_states
from tests.methods.test_triattention import random_statistics

LENGTHS = [(61, 61, 30), (90, 92, 21, 33)]
GROUP = 2


def scores(
    name: str, options: dict, ops: Ops, keys: PagedStates, queries: torch.Tensor, batch
) -> torch.Tensor:
    """Of values that are the keys."""
    facts = ModelFacts(
        layers=tuple(f"model.layers.{i}.self_attn.attn" for i in range(keys.num_layers)),
        first_kv_head=0,
        num_kv_heads=keys.num_heads,
        num_query_heads=queries.shape[3],
        head_size=keys.head_size,
        scale=torch.tensor([0.3, 0.1]),
        soft_cap=torch.tensor([0.0, 20.0]),
    )
    method_class = get_method(name)
    method = method_class(method_class.Options(**options), facts, ops)
    needs_queries = method.need(method.options).queries
    layers = slice(0, keys.num_layers)
    return method.score(Heads(layers, keys, keys, queries if needs_queries else None), batch)


@pytest.mark.parametrize("dtype", FLOATS_OF_A_BYTE, ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("name", available_methods())
def test_bytes_are_scored_as_the_numbers_that_they_mean(name, dtype, tmp_path):
    case = new_case(LENGTHS, dtype=dtype, group=GROUP, head_size=32, seed=3)
    evictions = [e._replace(seed=99 + i) for i, e in enumerate(case.batch.evictions)]
    case = replace(case, batch=EvictionBatch.of(evictions, case.batch.window, "cpu"))
    states, options = case.states, {}
    if name == "vase":
        # It sorts widths, many of which are equal: a factor must not round them apart.
        factors = states.quantisation.scale.log2().round().exp2()
        quantisation = Quantisation(dtype, factors)
        states = PagedStates(states.blocks, None, states.block_size, quantisation)
    if name == "triattention":
        random_statistics(GROUP).save(tmp_path / "statistics.safetensors")
        options["statistics"] = str(tmp_path / "statistics.safetensors")
    plain = new_states("heads first", states.num_blocks, states.head_size, torch.float32)
    for eviction in evictions:
        row = torch.tensor(eviction.old_block_ids)
        plain.write(row, states.numbers(row, eviction.total_len))
    queries = case.queries.float()
    want = scores(name, options, NAIVE, plain, queries, case.batch)
    assert want.shape[1] == states.num_layers * states.num_heads
    for ops in (NAIVE, CPU, triton_ops(SMALL_STATES)):
        got = scores(name, options, ops, states, case.queries, case.batch)
        for i in range(len(evictions)):
            m = case.batch.num_candidates(i)
            assert want[i, :, :m].isfinite().all()
            torch.testing.assert_close(got[i, :, :m], want[i, :, :m], **SCORE_TOLERANCE)
