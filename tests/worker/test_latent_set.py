"""Latent attention on a worker: what is recorded, how it judges, and that rows move once."""

import pytest
import torch
from vllm.model_executor.layers.attention import MLAAttention
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

from rkv_vllm.methods.rkv import RKV
from rkv_vllm.scheduling.spec import CompressedAttentionSpec, CompressedMLASpec, compressed_spec
from rkv_vllm.worker import flush as flush_module
from rkv_vllm.worker.attention_hook import observe_queries
from rkv_vllm.worker.flush import Compactor
from rkv_vllm.worker.group import CompressedGroup
from rkv_vllm.worker.latent_set import make_latent_sets
from rkv_vllm.worker.lengths import GroupRows
from rkv_vllm.worker.query_ring import RingMemory
from tests.methods.dense import keep_indices
from tests.worker.test_cache_views import CellBackend
from tests.worker.test_flush import directive

LAYERS, BLOCKS, TOKENS, HEADS, WINDOW, SEATS = 3, 12, 16, 5, 8, 3
LATENT, TURNED, PLAIN = 24, 8, 12
ROW, QUERY = LATENT + TURNED, PLAIN + TURNED
SCALES = [0.2, 0.3, 0.4]


class Latents(CPUMLAImpl):
    """Without vLLM's configuration."""

    def __init__(self, scale: float) -> None:
        self.scale = scale


class Layer(MLAAttention):
    """Without weights but those that absorb queries."""

    def __init__(self, cache, scale, generator, backend="CPU_MLA") -> None:
        torch.nn.Module.__init__(self)
        self.layer_name = "layer"
        self.attn_backend = CellBackend(backend)
        self.impl = Latents(scale)
        self.kv_cache = cache
        self.num_heads, self.head_size = HEADS, ROW
        self.kv_lora_rank, self.qk_head_dim = LATENT, QUERY
        self.kv_cache_dtype, self._k_scale = "auto", torch.tensor(1.0)
        self.W_UK_T = torch.randn(HEADS, PLAIN, LATENT, generator=generator)

    def forward_impl(self, q, *args, **kwargs):
        return q


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def layers(generator):
    memory = torch.randn(LAYERS, BLOCKS, TOKENS, ROW, generator=generator)
    return {f"model.layers.{i}.attn": Layer(memory[i], SCALES[i], generator) for i in range(LAYERS)}


@pytest.fixture
def rows():
    return GroupRows(4, 32, WINDOW + 1, torch.device("cpu"))


@pytest.fixture
def latent_set(layers, rows):
    for layer in layers.values():
        observe_queries(layer)
    size = LAYERS * HEADS * QUERY
    memory = RingMemory(SEATS, WINDOW + 1, size, torch.float32, torch.device("cpu"))
    (made,) = make_latent_sets(layers, TOKENS, rows, memory, WINDOW)
    assert memory.elements.numel() == made.ring.queries.numel()
    return made


def record(layers, rows, seat, window_end, generator):
    """Record the window of one request; returns its queries [layers, window, heads, QUERY]."""
    rows.watch([(seat, 0, WINDOW, window_end - WINDOW)])
    shown = [torch.randn(WINDOW, HEADS, QUERY, generator=generator) for _ in layers]
    for layer, queries in zip(layers.values(), shown, strict=True):
        layer.forward_impl(queries)
    return torch.stack(shown)


def absorbed(layer, queries):
    """Queries [heads, window, ROW] as attention to the cache takes them, in float64."""
    plain, turned = queries.double().split([PLAIN, TURNED], dim=-1)
    in_latents = torch.einsum("thp,hpl->htl", plain, layer.W_UK_T.double())
    return torch.cat([in_latents, turned.transpose(0, 1)], dim=-1)


@pytest.mark.parametrize("scratch_bytes", [flush_module.SCRATCH_BYTES, 1])
def test_a_layer_keeps_what_all_its_heads_look_at_and_rows_move_once(
    layers, rows, latent_set, generator, monkeypatch, scratch_bytes
):
    monkeypatch.setattr(flush_module, "SCRATCH_BYTES", scratch_bytes)
    requests = {"a": ((3, 1, 7), (3, 9), 2), "b": ((4, 5, 0), (4, 10), 0)}
    before = [layer.kv_cache.clone() for layer in layers.values()]
    compactor = Compactor(
        {0: CompressedGroup(0, TOKENS, [latent_set], lambda s, o: RKV(o, s.model, s.ops))}, WINDOW
    )
    queries, done = {}, []
    for req_id, (old, new, seat) in requests.items():
        queries[req_id] = record(layers, rows, seat, 44, generator)
        done.append(
            directive(
                req_id,
                old=old,
                new=new,
                settled_len=44,
                total_len=46,
                num_evict=24,
                seat=seat,
                method_options=RKV.Options(),
            )
        )
    compactor.pending = done
    assert len(compactor.flush()) == 2
    written = {block for _, new, _ in requests.values() for block in new}
    kept_by_layer = set()
    for i, (layer, old_cache) in enumerate(zip(layers.values(), before, strict=True)):
        for block in set(range(BLOCKS)) - written:
            assert layer.kv_cache[block].equal(old_cache[block])
        for req_id, (old, new, _) in requests.items():
            cached = old_cache[list(old)].flatten(0, 1)
            window = absorbed(layer, queries[req_id][i]).float()
            (kept,) = keep_indices(cached[None, :44], window, 20, window=WINDOW, scale=SCALES[i])
            kept_by_layer.add(tuple(kept.tolist()))
            expected = torch.cat([cached[kept], cached[44:46]])
            assert layer.kv_cache[list(new)].flatten(0, 1)[:22].equal(expected)
    assert len(kept_by_layer) == LAYERS * len(requests)


def test_values_are_the_latents_within_the_rows(layers, latent_set):
    assert latent_set.stored == (latent_set.keys,)
    assert (latent_set.keys.num_heads, latent_set.keys.head_size) == (1, ROW)
    facts = latent_set.model
    assert (facts.num_kv_heads, facts.num_query_heads, facts.head_size) == (1, HEADS, ROW)
    assert facts.scale.tolist() == pytest.approx(SCALES)
    row = torch.tensor([5, 2])
    keys, values = latent_set.keys.read(row, 20), latent_set.values.read(row, 20)
    assert values.equal(keys[..., :LATENT])
    cache = layers["model.layers.1.attn"].kv_cache
    assert keys[1, 0].equal(cache[[5, 2]].flatten(0, 1)[:20])


def test_other_backends_and_layouts_are_refused_by_name(layers, rows):
    layer = next(iter(layers.values()))
    layer.attn_backend = CellBackend("FLASHMLA_SPARSE")
    with pytest.raises(ValueError, match="by CPU_MLA, got layer by FLASHMLA_SPARSE; choose that"):
        make_latent_sets(layers, TOKENS, rows, None, WINDOW)
    layer.attn_backend = CellBackend("CPU_MLA")
    layer.impl.do_kv_cache_update = lambda latent, key, cache, *_: cache.fill_(1)
    with pytest.raises(ValueError, match="in an unknown way"):
        make_latent_sets(layers, TOKENS, rows, None, WINDOW)


def test_specs_of_latent_attention_are_ours_and_merge_with_their_like_only():
    sizes = {"block_size": 16, "num_kv_heads": 1, "dtype": torch.float32}
    mla = MLAAttentionSpec(**sizes, head_size=576, cache_dtype_str="auto")
    ours = compressed_spec(mla, None)
    assert type(ours) is CompressedMLASpec
    assert ours.page_size_bytes == mla.page_size_bytes == 16 * 576 * 4
    merged = CompressedMLASpec.merge([ours, ours])
    assert (type(merged), merged.layer_budget) == (CompressedMLASpec, None)
    assert merged.page_size_bytes == mla.page_size_bytes
    full = compressed_spec(FullAttentionSpec(**sizes, head_size=64), None)
    assert type(full) is CompressedAttentionSpec
    for others in ([ours, mla], [ours, compressed_spec(mla, 96)], [ours, full]):
        with pytest.raises(AssertionError, match="expected equal layer budgets"):
            CompressedMLASpec.merge(others)
    assert not ours.is_uniform_with_collection({"a": ours, "b": compressed_spec(mla, 96)})
