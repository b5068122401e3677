"""fp8 caches on real engines: served text is explicit eviction of what the cache has rounded.

Engine and reference compute keys in another order of summation. Where a key lies that near to a
step of the cache's floats, the two store neighbours, and from there on the request is another one.
So most requests are held to the tolerance of other dtypes, and all of them to a wide one; a
reference that does not round is far outside of both.
"""

from pathlib import Path
from statistics import median

import pytest
import torch
from vllm.platforms import current_platform

import rkv_vllm
from rkv_vllm.options import ServerOptions
from tests import served_groups
from tests.engine import BLOCK_SIZE, Engine, running_engine
from tests.fp8 import DTYPES, Fp8Store, calibrated_model, needs_fp8_on_cpu
from tests.layered_reference import generate_layered_reference
from tests.methods.oracle import assert_same_kept, expected_scores
from tests.models import assert_varied, random_prompt
from tests.reference import generate_reference
from tests.test_equality import LOGPROB_TOLERANCE

pytestmark = [pytest.mark.engine, needs_fp8_on_cpu]

LENGTHS = {"budget": 32, "buffer": 16}
PROMPTS = {f"r{i}": random_prompt(14 + 5 * i, seed=i) for i in range(6)}
NUM_TOKENS = 90
# Of keys and values of each layer; no two alike, no power of two.
SCALES = [(0.05, 0.021), (0.31, 0.07)]
# Where a key was stored as its neighbour; a cache that does not round is above, in the median.
NEIGHBOUR_GAP = 0.02


class FlushWatch:
    """Chooses with the float64 oracle what is kept, and sees that these very bytes survive."""

    def __init__(self, engine: Engine, cache_dtype: str) -> None:
        self.num_judged = self.num_moved = 0
        self._layers = engine.model_runner.compilation_config.static_forward_context
        self._dtype = DTYPES[cache_dtype]
        self._expected = []
        compactor = engine.model_runner.compactor
        compactor.observer = self
        self._flush, compactor.flush = compactor.flush, self._watched_flush

    def chosen(self, choice) -> None:
        for i, directive in enumerate(choice.directives):
            for number, name in enumerate(choice.layers):
                row, end = directive.old_block_ids, directive.total_len
                before = [part[:, :end] for part in self._bytes(name, row)]
                num_heads = before[0].shape[0]
                heads = slice(number * num_heads, (number + 1) * num_heads)
                keep = choice.keep[i, heads, : directive.budget].long().cpu()
                # The oracle takes its time.
                if number == self.num_moved % len(choice.layers):
                    self._judge(choice, i, number, name, before[0], keep)
                self._expected.append((name, directive, before, keep))

    def _judge(self, choice, request, number, name, key_bytes, keep) -> None:
        eviction = choice.batch.evictions[request]
        settled, prefix_len = eviction.settled_len, eviction.prefix_len
        layer = self._layers[name]
        keys = key_bytes[:, :settled].view(self._dtype).float() * layer._k_scale_float
        queries = choice.batch.window_queries(request, choice.heads.queries[:, [number]])
        want = expected_scores(keys, queries.cpu(), prefix_len=prefix_len, scale=layer.impl.scale)
        assert_same_kept(keep - prefix_len, want.scores, eviction.budget, choice.batch.window)
        self.num_judged += 1

    def _bytes(self, name: str, row: list[int]) -> list[torch.Tensor]:
        """Bytes [heads, tokens, d] of the keys and of the values in a row of blocks."""
        layer = self._layers[name]
        blocks = layer.kv_cache[row]
        assert blocks.dtype == torch.uint8
        if blocks.is_cuda:
            halves = blocks.split(layer.head_size, dim=-1)
            return [part.transpose(0, 1).flatten(1, 2).cpu() for part in halves]
        halves = blocks.reshape(*blocks.shape[:2], 2, -1)
        key_blocks = halves[:, :, 0].unflatten(2, (layer.head_size, -1)).transpose(2, 3)
        value_blocks = halves[:, :, 1].unflatten(2, (-1, layer.head_size))
        return [part.transpose(0, 1).flatten(1, 2).clone() for part in (key_blocks, value_blocks)]

    def _watched_flush(self, *args):
        done = self._flush(*args)
        for name, directive, before, keep in self._expected:
            prefix_len, settled = directive.prefix_len, directive.settled_len
            for old, new in zip(before, self._bytes(name, directive.new_block_ids), strict=True):
                survivors = old.gather(1, keep.unsqueeze(-1).expand(-1, -1, old.shape[2]))
                parts = (old[:, :prefix_len], survivors, old[:, settled:])
                want = torch.cat(parts, dim=1)
                assert new[:, : want.shape[1]].equal(want)
            self.num_moved += 1
        self._expected.clear()
        return done


class CompactionWatch:
    """Where decoding requests were compacted: settled logical lengths; it counts the others."""

    def __init__(self, engine: Engine) -> None:
        self.decoding: dict[str, list[int]] = {}
        self.num_of_prompts = 0
        compactor = engine.model_runner.compactor
        self._flush, compactor.flush = compactor.flush, self._watched_flush

    def _watched_flush(self, *args):
        done = self._flush(*args)
        for directive in done:
            if directive.reason == "prompt":
                self.num_of_prompts += 1
            else:
                req_id = directive.req_id.rsplit("-", 1)[0]
                self.decoding.setdefault(req_id, []).append(directive.settled_logical_len)
        return done


def serve(model: Path, num_tokens: int = NUM_TOKENS, cache_dtype: str = "auto", **options):
    """All prompts, watched where there is compression; returns the engine and its compactions."""
    # vLLM sizes the pool of a checkpoint that asks for fp8 by bytes as well.
    bytes_per_block = 2 * 2 * BLOCK_SIZE * 32 * len(SCALES)
    memory = 256 * bytes_per_block
    with running_engine(
        model, 256, kv_cache_memory_bytes=memory, kv_cache_dtype=cache_dtype, **options
    ) as engine:
        compactions = 0
        if options.get("additional_config"):
            watch = FlushWatch(engine, "fp8_e4m3" if cache_dtype == "auto" else cache_dtype)
        for req_id, prompt in PROMPTS.items():
            engine.add(req_id, prompt, num_tokens)
        engine.run()
        if options.get("additional_config"):
            compactions = engine.stats()["compactions"]
            assert watch.num_judged >= compactions
            assert watch.num_moved == compactions * len(SCALES)
        engine.assert_pool_is_empty()
    return engine, compactions


def gaps(engine: Engine, req_id: str, model: Path, prompt, store, config, **how) -> tuple:
    """How far apart log-probabilities are, and how often the reference made a compaction."""
    output = engine.outputs[req_id]
    reference = generate_reference(
        model,
        prompt,
        len(output.token_ids),
        config,
        store=store,
        forced_ids=output.token_ids,
        **how,
    )
    found = [abs(a - b) for a, b in zip(output.logprobs, reference.logprobs, strict=True)]
    if max(found) < LOGPROB_TOLERANCE:
        assert reference.top_ids[:, 0].tolist() == output.token_ids
    return found, len(reference.compactions)


def assert_explicit_eviction(engine, model, store, config, **how) -> int:
    """Every request is the reference's, most of them to the last bit; returns its compactions.

    On a GPU attention multiplies in fp8 as well: behind their first compaction requests are to be
    much nearer to the reference than to one that keeps its whole cache.
    """
    if current_platform.is_cuda():
        return _assert_nearer_than_a_whole_cache(engine, model, store, config, **how)
    compactions = num_same = 0
    for req_id, prompt in PROMPTS.items():
        found, number = gaps(engine, req_id, model, prompt, store, config, **how)
        assert median(found) < NEIGHBOUR_GAP, req_id
        num_same += max(found) < LOGPROB_TOLERANCE
        compactions += number
        assert_varied(engine.outputs[req_id].token_ids)
    assert 2 * num_same >= len(PROMPTS)
    plain, _ = gaps(engine, "r0", model, PROMPTS["r0"], None, config, **how)
    assert median(plain) > 5 * NEIGHBOUR_GAP
    return compactions


def _assert_nearer_than_a_whole_cache(engine, model, store, config, **how) -> int:
    compactions, evicted, whole = 0, [], []
    for req_id, prompt in PROMPTS.items() if config else ():
        found, number = gaps(engine, req_id, model, prompt, store, config, **how)
        compactions += number
        first = config.budget + config.buffer - len(prompt) + 2
        evicted += found[first:]
        whole += gaps(engine, req_id, model, prompt, store, None, **how)[0][first:]
    assert config is None or 2 * median(evicted) < median(whole), (median(evicted), median(whole))
    return compactions


def test_a_calibrated_checkpoint_is_served_as_explicit_eviction_beside_stock(
    random_model_dir, tmp_path
):
    model = random_model_dir("qwen3", 3, layers=2)
    calibrated = calibrated_model(tmp_path, model, SCALES, "tensor")
    store, config = Fp8Store("fp8_e4m3", SCALES), ServerOptions(**LENGTHS)
    engine, compactions = serve(calibrated, **rkv_vllm.engine_args(**LENGTHS))
    assert compactions == assert_explicit_eviction(engine, model, store, config) >= 18
    stock, _ = serve(calibrated)
    assert_explicit_eviction(stock, model, store, None)
    for req_id, prompt in PROMPTS.items():
        ours, theirs = engine.outputs[req_id].token_ids, stock.outputs[req_id].token_ids
        # Decoded until the first compaction, which leaves the token of its own step alone.
        num_equal = LENGTHS["budget"] + LENGTHS["buffer"] - len(prompt) + 1
        assert ours[:num_equal] == theirs[:num_equal]
        assert ours != theirs


@pytest.mark.parametrize(
    ("runner", "cache_dtype", "strategy"),
    [
        pytest.param("v1", "fp8_e5m2", None, marks=pytest.mark.nightly),
        # CPU_ATTN takes the largest of the heads' factors for all of them.
        pytest.param("v1", "auto", "attn_head", marks=pytest.mark.nightly),
        pytest.param("v2", "fp8_e4m3", None, marks=pytest.mark.nightly),
        pytest.param("v2-async", "fp8_e5m2", None, marks=pytest.mark.nightly),
    ],
    indirect=["runner"],
)
def test_every_float_runner_and_strategy_is_explicit_eviction(
    random_model_dir, tmp_path, runner, cache_dtype, strategy
):
    model = served = random_model_dir("llama", 3, layers=2)
    scales = ()
    if strategy is not None:
        by_head = [([keys, 0.7 * keys], [0.8 * values, values]) for keys, values in SCALES]
        served, scales = calibrated_model(tmp_path, model, by_head, strategy), SCALES
    store = Fp8Store("fp8_e4m3" if cache_dtype == "auto" else cache_dtype, scales)
    engine, compactions = serve(served, cache_dtype=cache_dtype, **rkv_vllm.engine_args(**LENGTHS))
    how = {"unprocessed_steps": runner.unprocessed_steps}
    config = ServerOptions(**LENGTHS)
    assert compactions == assert_explicit_eviction(engine, model, store, config, **how) >= 12


@pytest.mark.nightly
@pytest.mark.skipif(current_platform.is_cuda(), reason="text depends on the batch there")
def test_full_layers_are_compacted_beside_sliding_ones(random_model_dir):
    """Of both groups the cache rounds; blocks of the windows are never written by a flush."""
    layer_types = ("sliding_attention", "full_attention")
    model = random_model_dir("llama", 3, layers=2, layer_types=layer_types, sliding_window=40)
    bytes_per_block = 2 * 2 * BLOCK_SIZE * 32
    engine, _, compactions, _ = served_groups.serve(
        model,
        100,
        2,
        kv_cache_dtype="fp8_e4m3",
        kv_cache_memory_bytes=256 * bytes_per_block,
        **rkv_vllm.engine_args(**LENGTHS),
    )
    configs, store = [None, ServerOptions(**LENGTHS)], Fp8Store("fp8_e4m3")
    num_same = expected = 0
    for req_id, prompt in served_groups.PROMPTS.items():
        reference = generate_layered_reference(model, prompt, 100, configs, store=store)
        num_same += engine.outputs[req_id].token_ids == reference.token_ids
        expected += reference.compactions[1]
        assert_varied(reference.token_ids)
    assert 2 * num_same >= len(served_groups.PROMPTS)
    (of_full,) = compactions.values()
    assert of_full == expected >= 16


@pytest.mark.nightly
def test_swap_prompts_prefixes_and_pressure_take_bytes_for_what_they_are(random_model_dir):
    """One short pool for all of them; a request's text is that of its own compactions."""
    model = random_model_dir("qwen3", 3, layers=2)
    lengths = {**LENGTHS, "compress_prompt": True, "prompt_chunk": 64}
    options = rkv_vllm.engine_args(when="pressure", swap_space=0.01, **lengths)
    prefix = random_prompt(300, seed=9)
    prompts = {
        "first": [*prefix, *random_prompt(20, seed=1)],
        # Starts from what the first has left of their prefix.
        "later": [*prefix, *random_prompt(30, seed=2)],
        **{f"r{i}": random_prompt(20 + 7 * i, seed=i) for i in range(4)},
    }
    num_tokens, num_blocks = 110, 12
    memory = num_blocks * BLOCK_SIZE * 2 * 2 * 32 * 2
    with running_engine(
        model,
        num_blocks,
        kv_cache_memory_bytes=memory,
        kv_cache_dtype="fp8_e4m3",
        max_num_batched_tokens=96,
        **options,
    ) as engine:
        bytes_watch, watch = FlushWatch(engine, "fp8_e4m3"), CompactionWatch(engine)
        engine.add("first", prompts["first"], num_tokens)
        while not engine.outputs["first"].token_ids:
            engine.step()
        for req_id in list(prompts)[1:]:
            engine.add(req_id, prompts[req_id], num_tokens)
        preempted = set()
        while engine.llm.llm_engine.has_unfinished_requests():
            engine.step()
            running = {r.request_id.rsplit("-", 1)[0] for r in engine.scheduler.running}
            compacted = {
                req_id.rsplit("-", 1)[0] for req_id in engine.scheduler._tracks[0].books.num_evicted
            }
            for req_id in sorted(running & compacted - preempted):
                # Not while it is prefilled.
                if len(engine.outputs[req_id].token_ids) > 5:
                    engine.preempt(req_id)
                    preempted.add(req_id)
        stats = engine.stats()
        engine.assert_pool_is_empty()
    assert stats["swapped_in"] == stats["swapped_out"] >= 2
    assert stats["recomputed"] == 0
    assert engine.num_cached_tokens("later") == 256
    assert bytes_watch.num_moved == 2 * stats["compactions"]
    of_decoding = sum(map(len, watch.decoding.values()))
    # What the later one has not computed it has not compacted.
    assert stats["compactions"] == watch.num_of_prompts + of_decoding
    assert min(of_decoding, watch.num_of_prompts) >= 4
    if current_platform.is_cuda():
        # It multiplies in fp8: bytes and choice are right, no reference says the same.
        return
    store, config = Fp8Store("fp8_e4m3"), ServerOptions(**lengths)
    num_same = of_prompts = 0
    for req_id, prompt in prompts.items():
        at = watch.decoding.get(req_id, ())
        found, number = gaps(engine, req_id, model, prompt, store, config, compacted_at=at)
        assert median(found) < NEIGHBOUR_GAP, req_id
        num_same += max(found) < LOGPROB_TOLERANCE
        of_prompts += number - len(at)
        assert_varied(engine.outputs[req_id].token_ids)
    assert 2 * num_same >= len(prompts)
    assert watch.num_of_prompts < of_prompts
