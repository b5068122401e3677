"""What compression does not support is refused by name before the model loads, in one sentence."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import vllm
from vllm.config import ModelConfig, VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

import rkv_vllm
from rkv_vllm.cache_owners import write_owners
from rkv_vllm.fit.refusals import REFUSALS, check
from rkv_vllm.fit.versions import SCHEDULER_CLS, WORKER_CLS
from rkv_vllm.methods import ModelShape
from rkv_vllm.methods.rkv import RKV
from tests import checkpoint_configs
from tests.fit.conftest import OFF

EXPERIMENT = rkv_vllm.engine_args(experimental_mla=True)
READS = '{"model": "model", "num_layers": 2, "reads": {"1": 0}}'

NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
# The fixture names the model's own folder.
ITSELF = {"method": "draft_model", "num_speculative_tokens": 2, "model": "the model itself"}
SUPPORTED = [
    {},
    {"checkpoint": checkpoint_configs.UNUSED_WINDOW},
    {"checkpoint": checkpoint_configs.MIXED_WINDOWS},
    {"checkpoint": checkpoint_configs.CHUNKED},
    {"checkpoint": checkpoint_configs.ALL_WINDOWS, "disable_sliding_window": True},
    {"kv_cache_dtype": "bfloat16"},
    {"kv_cache_dtype": "fp8"},
    {"kv_cache_dtype": "fp8_e5m2"},
    {"tensor_parallel_size": 2},
    {"pipeline_parallel_size": 2},
    {"data_parallel_size": 2},
    {"enable_lora": True},
    {"enable_prefix_caching": False},
    {"enable_chunked_prefill": True, "max_num_batched_tokens": 64, "max_num_seqs": 4},
    {"scheduling_policy": "priority"},
    rkv_vllm.engine_args(share_layers=READS),
    {"speculative_config": NGRAM},
]


@pytest.mark.parametrize("changes", SUPPORTED, ids=lambda changes: next(iter(changes), "defaults"))
def test_supported_engine_passes_every_rule(arguments, changes):
    vllm_config = arguments(**changes).create_engine_config()
    assert [rule.find(vllm_config) for rule in REFUSALS] == [None] * len(REFUSALS)


# Pairs of what the sentence says and what the engine arguments say.
REFUSED = [
    (
        "draft models on this runner: got method 'draft_model' on the V1",
        {"speculative_config": ITSELF},
    ),
    (
        "speculative decoding with pipeline parallelism: got --pipeline-parallel-size 2",
        {"speculative_config": NGRAM, "pipeline_parallel_size": 2},
    ),
    (
        "KV connectors and KV cache offloading: got connector 'ExampleConnector'",
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
    ),
    ("KV connectors and KV cache offloading", {"kv_offloading_size": 1.0}),
    (
        "context parallelism: got sizes 2 (decode) and 1 (prefill)",
        {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
    ),
    ("context parallelism: got sizes 1", {"prefill_context_parallel_size": 2}),
    ("micro-batching: got --enable-dbo or --ubatch-size above 1", {"enable_dbo": True}),
    ("micro-batching", {"ubatch_size": 2}),
    ("this KV cache dtype: got nvfp4 with a bfloat16 model", {"kv_cache_dtype": "nvfp4"}),
    (
        "layers whose KV cache has a dtype of its own: got --kv-cache-dtype-skip-layers 0 1",
        {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0", "1"]},
    ),
    (
        "layer budgets (--kv-layer-budgets) with pipeline parallelism: got --pipeline-parallel-s",
        {"pipeline_parallel_size": 2, **rkv_vllm.engine_args(layer_budgets="pyramid")},
    ),
    (
        "layer budgets (--kv-layer-budgets) without vLLM's hybrid KV cache manager",
        {
            "disable_hybrid_kv_cache_manager": True,
            **rkv_vllm.engine_args(layer_budgets="pyramid"),
        },
    ),
    (
        "shared caches (--kv-share-layers) with layer budgets: got --kv-layer-budgets pyramid",
        rkv_vllm.engine_args(share_layers=READS, layer_budgets="pyramid"),
    ),
    (
        "shared caches (--kv-share-layers) with pipeline parallelism: got --pipeline-parallel-size",
        {"pipeline_parallel_size": 2, **rkv_vllm.engine_args(share_layers=READS)},
    ),
    (
        "shared caches (--kv-share-layers) in models with other layers than full attention",
        {
            "checkpoint": checkpoint_configs.MIXED_WINDOWS,
            **rkv_vllm.engine_args(share_layers=READS),
        },
    ),
    (
        "layer budgets (--kv-layer-budgets) with layers of other kinds",
        {
            "checkpoint": checkpoint_configs.MIXED_WINDOWS,
            **rkv_vllm.engine_args(layer_budgets="pyramid"),
        },
    ),
    ("fast prefill with shared KV layers", {"kv_sharing_fast_prefill": True}),
    ("models that do not generate text", {"runner": "pooling", "convert": "embed"}),
    (
        "sparse attention with an indexer (DSA: DeepSeek-V3.2, GLM-5): got LlamaForCausalLM",
        {"checkpoint": {**checkpoint_configs.LATENT, "index_topk": 64}, **EXPERIMENT},
    ),
    (
        "multi-head latent attention (MLA) unless it is asked for: got LlamaForCausalLM",
        {"checkpoint": checkpoint_configs.LATENT},
    ),
    (
        "multi-head latent attention (MLA) together with this: got --kv-compress-prompt, "
        "--kv-swap-space",
        {
            "checkpoint": checkpoint_configs.LATENT,
            **rkv_vllm.engine_args(experimental_mla=True, compress_prompt=True, swap_space=0.1),
        },
    ),
    (
        "multi-head latent attention (MLA) together with this: got an fp8 --kv-cache-dtype",
        {"checkpoint": checkpoint_configs.LATENT, "kv_cache_dtype": "fp8", **EXPERIMENT},
    ),
    (
        "models without a layer of full attention",
        {"checkpoint": checkpoint_configs.SLIDING_WINDOW},
    ),
    (
        "models without a layer of full attention",
        {"checkpoint": checkpoint_configs.ALL_WINDOWS},
    ),
    (
        "sliding-window or chunked layers without vLLM's hybrid KV cache manager: got --disable-hy",
        {"checkpoint": checkpoint_configs.MIXED_WINDOWS, "disable_hybrid_kv_cache_manager": True},
    ),
    (
        "sliding-window or chunked layers without vLLM's hybrid KV cache manager",
        {"checkpoint": checkpoint_configs.CHUNKED, "disable_hybrid_kv_cache_manager": True},
    ),
    (
        "dual chunk attention and reference windows (R-SWA)",
        {"checkpoint": checkpoint_configs.DUAL_CHUNK},
    ),
    ("ALiBi position biases", {"checkpoint": checkpoint_configs.ALIBI}),
    ("encoder-decoder models", {"checkpoint": checkpoint_configs.CROSS_ATTENTION}),
    ("bidirectional attention", {"attention_config": {"use_non_causal": True}}),
    ("bidirectional attention and diffusion", {"diffusion_config": {"canvas_length": 8}}),
]


@pytest.mark.parametrize(("sentence", "changes"), REFUSED)
def test_unsupported_feature_is_refused_by_name_with_the_cure(arguments, sentence, changes):
    engine_args = arguments(**changes)
    with pytest.raises(ValueError, match=r"does not support .*: got .+, wanted .+; .+") as error:
        engine_args.create_engine_config()
    assert sentence in str(error.value)
    assert len(str(error.value).splitlines()) == 1


# What a small config.json on a CPU cannot bring about is set on vLLM's own classes and objects,
# which fails when vLLM renames it. A property of a class comes before what an instance has cached.
PATCHED = [
    ("models without attention", ModelConfig, "is_attention_free", property(lambda _: True)),
    (
        "this method of speculative decoding: got method 'dflash'",
        VllmConfig,
        "speculative_config",
        property(lambda _: SimpleNamespace(method="dflash")),
    ),
    (
        "dual chunk attention and reference windows (R-SWA)",
        ModelConfig,
        "rswa_window",
        property(lambda _: 64),
    ),
    ("bidirectional attention", ModelConfig, "is_mm_prefix_lm", property(lambda _: True)),
    ("bidirectional attention", ModelConfig, "is_diffusion", property(lambda _: True)),
    ("the V1 model runner on a GPU: got V1", type(current_platform), "device_type", "cuda"),
    ("HiSparse KV offloading", "attention_config", "hisparse_config", object()),
    (
        "this attention backend: got FLEX_ATTENTION, wanted one of CPU_ATTN, FLASH_ATTN",
        "attention_config",
        "backend",
        AttentionBackendEnum.FLEX_ATTENTION,
    ),
]


@pytest.mark.parametrize(("sentence", "owner", "name", "value"), PATCHED)
def test_unsupported_property_is_refused_by_name(
    arguments, monkeypatch, sentence, owner, name, value
):
    vllm_config = arguments().create_engine_config()
    owner = getattr(vllm_config, owner) if isinstance(owner, str) else owner
    monkeypatch.setattr(owner, name, value)
    with pytest.raises(ValueError, match="does not support") as error:
        check(vllm_config)
    assert sentence in str(error.value)


@pytest.mark.parametrize(("budget", "accepted"), [(543, False), (544, True)])
def test_a_budget_below_the_block_of_a_state_is_refused_with_the_number_that_works(
    arguments, monkeypatch, budget, accepted
):
    compression = rkv_vllm.engine_args(budget=budget, buffer=32)
    vllm_config = arguments(**compression, max_model_len=2000).create_engine_config()
    asked = vllm_config.cache_config.block_size

    def align(cls, config, backend) -> None:
        config.cache_config.block_size = 544

    monkeypatch.setattr(ModelConfig, "is_hybrid", property(lambda _: True))
    monkeypatch.setattr(type(current_platform), "_align_hybrid_block_size", classmethod(align))
    if accepted:
        check(vllm_config)
    else:
        # Two blocks, less a buffer of 32 and one token in flight.
        sentence = r"--kv-budget: got 543, wanted at least 544: .* pass --kv-budget 1055, .* 2 of"
        with pytest.raises(ValueError, match=sentence):
            check(vllm_config)
    # vLLM aligns it itself later, from what the user asked for.
    assert vllm_config.cache_config.block_size == asked != 544


# What a draft model's layers cannot stand beside, on the V2 runner.
BESIDE_DRAFTS = [
    ("a draft model beside: got --kv-swap-space", rkv_vllm.engine_args(swap_space=0.1)),
    ("a draft model beside: got --kv-layer-budgets", rkv_vllm.engine_args(layer_budgets="pyramid")),
    (
        "a draft model beside: got layers of other kinds in target or draft model",
        {"checkpoint": checkpoint_configs.MIXED_WINDOWS},
    ),
]


@pytest.mark.parametrize(("sentence", "changes"), BESIDE_DRAFTS)
def test_what_a_draft_model_does_not_stand_beside_is_refused(
    arguments, monkeypatch, sentence, changes
):
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", True)
    arguments(speculative_config=ITSELF).create_engine_config()
    with pytest.raises(ValueError, match="does not support") as error:
        arguments(speculative_config=ITSELF, **changes).create_engine_config()
    assert sentence in str(error.value)


STATE_BESIDE_DRAFTS = "speculative decoding of models that keep a state or latent rows: got Llama"


@pytest.mark.parametrize("kind", ["is_hybrid", "use_mla"])
def test_drafts_beside_a_state_or_latent_rows_are_refused(arguments, monkeypatch, kind):
    vllm_config = arguments(speculative_config=NGRAM).create_engine_config()
    monkeypatch.setattr(ModelConfig, kind, property(lambda _: True))
    with pytest.raises(ValueError, match=STATE_BESIDE_DRAFTS):
        check(vllm_config)


@pytest.mark.skipif(not vllm.__version__.startswith("0.32."), reason="vLLM 0.33 refuses it itself")
def test_a_cache_in_another_dtype_than_the_models_is_refused(arguments):
    with pytest.raises(ValueError, match="this KV cache dtype: got float16 with a bfloat16 model"):
        arguments(kv_cache_dtype="float16").create_engine_config()


ROUTED_EXPERTS = "returned routed experts together with this: got --kv-compress-prompt"


def test_returned_experts_are_refused_beside_hits_that_vllm_does_not_know_of(arguments):
    # vLLM takes the flag on its V2 runner only.
    vllm_config = arguments().create_engine_config()
    vllm_config.aux_output_config.enable_return_routed_experts = True
    check(vllm_config)
    vllm_config.additional_config["kv_compression"]["compress_prompt"] = True
    with pytest.raises(ValueError, match=f"does not support {ROUTED_EXPERTS}, wanted none of it"):
        check(vllm_config)


def test_every_rule_has_a_test():
    cases = (*REFUSED, *PATCHED, *BESIDE_DRAFTS, (STATE_BESIDE_DRAFTS,), (ROUTED_EXPERTS,))
    tested = "\n".join(sentence for sentence, *_ in cases)
    assert [rule.feature for rule in REFUSALS if rule.feature not in tested] == []


def test_what_a_gpu_has_passes(arguments, monkeypatch):
    vllm_config = arguments().create_engine_config()
    monkeypatch.setattr(type(current_platform), "device_type", "cuda")
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", True)
    vllm_config.attention_config.backend = AttentionBackendEnum.TRITON_ATTN
    check(vllm_config)


def test_all_refusals_are_named_at_once(arguments):
    engine_args = arguments(kv_sharing_fast_prefill=True, kv_cache_dtype="nvfp4")
    with pytest.raises(ValueError, match=r"(?s)this KV cache dtype.*\n.*fast prefill"):
        engine_args.create_engine_config()


def run_without_plugin(tmp_path, statement):
    """Runs a statement about an engine with drafts in a process that loads other plugins only."""
    script = (
        "import sys, rkv_vllm, vllm\n"
        "drafts = {'method': 'draft_model', 'num_speculative_tokens': 2, 'model': sys.argv[1]}\n"
        "engine = dict(model=sys.argv[1], speculative_config=drafts, skip_tokenizer_init=True,\n"
        "    load_format='dummy', max_model_len=256, enforce_eager=True,\n"
        "    kv_cache_memory_bytes=2**23)\n"
    )
    model = checkpoint_configs.write_config(tmp_path / "model", checkpoint_configs.LLAMA)
    return subprocess.run(
        [sys.executable, "-c", script + statement, model],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "VLLM_PLUGINS": "other"},
    )


REFUSED_DRAFTS = "does not support draft models on this runner: got method 'draft_model'"


def test_engine_args_bring_the_refusals_where_the_plugin_is_not_loaded(tmp_path):
    run = run_without_plugin(
        tmp_path, "vllm.EngineArgs(**engine, **rkv_vllm.engine_args()).create_engine_config()"
    )
    assert run.returncode != 0
    assert REFUSED_DRAFTS in run.stderr


@pytest.mark.engine
def test_the_scheduler_refuses_where_the_plugin_is_not_loaded(tmp_path):
    by_name = {
        "additional_config": {"kv_compression": {"method": "rkv"}},
        "scheduler_cls": SCHEDULER_CLS,
        "worker_cls": WORKER_CLS["cpu"],
    }
    run = run_without_plugin(tmp_path, f"vllm.LLM(**engine, **{by_name})")
    assert run.returncode != 0
    assert REFUSED_DRAFTS in run.stderr


@pytest.mark.parametrize(("caches_prefixes", "num_warnings"), [(True, 1), (False, 0)])
def test_priorities_beside_prefix_caching_are_warned_about_once(
    arguments, warnings, caches_prefixes, num_warnings
):
    settings = {"scheduling_policy": "priority", "enable_prefix_caching": caches_prefixes}
    vllm_config = arguments(**settings).create_engine_config()
    check(vllm_config)
    assert ["--no-enable-prefix-caching" in warning for warning in warnings] == [
        True
    ] * num_warnings


@pytest.mark.parametrize(("max_model_len", "num_warnings"), [(128, 1), (129, 0)])
def test_options_that_never_take_effect_are_warned_about_once(
    arguments, warnings, max_model_len, num_warnings
):
    check(arguments(max_model_len=max_model_len).create_engine_config())
    assert ["no request will ever be" in warning for warning in warnings] == [True] * num_warnings


@pytest.mark.parametrize(
    ("name", "got"),
    [("scheduler_cls", "my.Scheduler"), ("scheduler_cls", object), ("worker_cls", "my.Worker")],
)
def test_foreign_scheduler_or_worker_is_refused(arguments, name, got):
    with pytest.raises(ValueError, match=r"cls: got .*, but --kv-compression wanted .*; leave"):
        arguments(**{name: got}).create_engine_config()


@pytest.mark.parametrize("route", ["scheduler_cls", "worker_cls"])
def test_our_scheduler_or_worker_without_options_is_refused(arguments, route):
    engine_args = arguments(**{**OFF, route: getattr(arguments(), route)})
    with pytest.raises(ValueError, match="without options"):
        engine_args.create_engine_config()


def test_nothing_is_refused_when_off(arguments):
    foreign = {"scheduler_cls": "my.Scheduler", "worker_cls": "my.Worker"}
    vllm_config = arguments(
        checkpoint_configs.SLIDING_WINDOW, **{**OFF, **foreign, "kv_cache_dtype": "fp8"}
    ).create_engine_config()
    assert vllm_config.additional_config == {}
    assert vllm_config.scheduler_config.scheduler_cls == "my.Scheduler"
    assert vllm_config.parallel_config.worker_cls == "my.Worker"


def test_classes_stay_vllms_own_when_off(arguments):
    vllm_config = arguments(**OFF).create_engine_config()
    assert vllm_config.scheduler_config.scheduler_cls is None
    assert vllm_config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"


def test_a_method_is_asked_whether_the_model_fits_before_it_is_loaded(arguments):
    """Its file has to be one of this model."""
    compression = rkv_vllm.engine_args("triattention", budget=96, buffer=32)
    engine_args = arguments(**compression)
    with pytest.raises(ValueError, match="--kv-option statistics: got ''") as error:
        engine_args.create_engine_config()
    assert f"rkv-vllm calibrate {engine_args.model}" in str(error.value)


def test_a_method_is_shown_the_shape_of_the_whole_model(arguments, monkeypatch):
    seen = []
    monkeypatch.setattr(RKV, "check_model", lambda options, shape: seen.append((options, shape)))
    engine_args = arguments(tensor_parallel_size=2, pipeline_parallel_size=2)
    engine_args.create_engine_config()
    shape = ModelShape(engine_args.model, 2, num_query_heads=2, num_kv_heads=1, head_size=32)
    assert seen == [(RKV.Options(), shape)]


def with_pyramid(budget=96):
    return rkv_vllm.engine_args(layer_budgets="pyramid", budget=budget, buffer=32)


def test_layer_budgets_that_do_not_fit_the_model_are_refused_before_it_is_loaded(arguments):
    arguments(**with_pyramid()).create_engine_config()
    with pytest.raises(ValueError, match=r"--kv-layer-budgets \(layer_budgets\): got 'pyramid'"):
        arguments(**with_pyramid(budget=9)).create_engine_config()
    five = {**checkpoint_configs.LLAMA, "num_hidden_layers": 5}
    with pytest.raises(ValueError, match="got 'a model of 5 layers'"):
        arguments(checkpoint=five, **with_pyramid()).create_engine_config()


def test_latent_attention_is_refused_with_the_flag_that_allows_it(arguments):
    with pytest.raises(ValueError, match="pass that flag to try it") as error:
        arguments(checkpoint_configs.LATENT).create_engine_config()
    assert "wanted --kv-experimental-mla with it" in str(error.value)


def test_shared_caches_of_another_model_are_refused_before_it_is_loaded(arguments, tmp_path):
    path = tmp_path / "shared.json"
    write_owners(path, "model", 3, {2: 1})
    with pytest.raises(ValueError, match="for 3 layers, and the model has 2; make it: rkv-vllm"):
        arguments(**rkv_vllm.engine_args(share_layers=str(path))).create_engine_config()
    hashes = []
    for owners in ({1: 0}, {2: 0}, {2: 1}):
        three = {**checkpoint_configs.LLAMA, "num_hidden_layers": 3}
        write_owners(path, "model", 3, owners)
        engine_args = arguments(three, **rkv_vllm.engine_args(share_layers=str(path)))
        hashes.append(engine_args.create_engine_config().compute_hash())
    # By which vLLM finds compiled graphs.
    assert len(set(hashes)) == 3


def test_a_pool_or_a_step_too_small_for_compressed_prompts_is_refused_before_loading(arguments):
    lengths = {"budget": 64, "buffer": 32, "prompt_chunk": 96, "compress_prompt": True}
    ours = rkv_vllm.engine_args(**lengths)
    # 64 + 96 + 32 and what is in flight take 7 blocks of 32; one stays empty.
    arguments(**ours, block_size=32, num_gpu_blocks_override=8).create_engine_config()
    with pytest.raises(ValueError, match="--num-gpu-blocks-override: got 7, wanted at least 8"):
        arguments(**ours, block_size=32, num_gpu_blocks_override=7).create_engine_config()
    arguments(**ours, max_num_batched_tokens=39, max_num_seqs=32).create_engine_config()
    with pytest.raises(ValueError, match="--kv-compress-prompt: got --max-num-batched-tokens 38"):
        arguments(**ours, max_num_batched_tokens=38, max_num_seqs=32).create_engine_config()
    with pytest.raises(ValueError, match="--long-prefill-token-threshold 7, wanted room"):
        arguments(**ours, long_prefill_token_threshold=7).create_engine_config()


def test_a_pool_that_holds_no_whole_text_is_refused_before_loading(arguments):
    """It fitted max_model_len and not the pool, and the scheduler hung.

    https://github.com/vllm-project/vllm/issues/39734
    """
    ours = rkv_vllm.engine_args(budget=64, buffer=16, prompt_chunk=96)
    pool = {"block_size": 16, "num_gpu_blocks_override": 33}
    arguments(**ours, **pool, max_model_len=512).create_engine_config()
    refused = arguments(**ours, **pool, max_model_len=1024)
    with pytest.raises(ValueError, match="override: got 33, wanted at least 65") as error:
        refused.create_engine_config()
    # R-KV's bound: budget, chunk and buffer, and what is in flight.
    assert "lower --max-model-len to 512, or add --kv-compress-prompt: with" in str(error.value)
    assert "--kv-buffer 16 and --kv-protect none one request takes up to 12" in str(error.value)
    ours = rkv_vllm.engine_args(budget=64, buffer=16, prompt_chunk=96, compress_prompt=True)
    arguments(**ours, **pool, max_model_len=1024).create_engine_config()
    # vLLM makes of it what the pool can hold.
    arguments(**pool, max_model_len=-1).create_engine_config()
