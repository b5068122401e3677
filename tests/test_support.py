"""What compression does not support is refused by name before the model loads, in one sentence."""

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import vllm
from vllm.config import ModelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

import rkv_vllm
from rkv_vllm import support
from rkv_vllm.plugin import register
from tests import checkpoint_configs


@pytest.fixture(autouse=True, scope="module")
def plugin():
    register()


@pytest.fixture
def arguments(tmp_path):
    """Makes engine arguments for a small supported model, with compression and some changes."""

    def make(checkpoint=checkpoint_configs.LLAMA, **changes):
        model = checkpoint_configs.write_config(tmp_path / "model", checkpoint)
        return EngineArgs(
            **{
                "model": model,
                "skip_tokenizer_init": True,
                "distributed_executor_backend": "mp",
                **rkv_vllm.engine_args(budget=96, buffer=32),
                **changes,
            }
        )

    return make


SUPPORTED = [
    {},
    {"checkpoint": checkpoint_configs.UNUSED_WINDOW},
    {"kv_cache_dtype": "bfloat16"},
    {"tensor_parallel_size": 2},
    {"pipeline_parallel_size": 2},
    {"data_parallel_size": 2},
    {"enable_lora": True},
    {"enable_prefix_caching": False},
    {"enable_chunked_prefill": True, "max_num_batched_tokens": 64, "max_num_seqs": 4},
    {"scheduling_policy": "priority"},
]


@pytest.mark.parametrize("changes", SUPPORTED, ids=lambda changes: next(iter(changes), "defaults"))
def test_supported_engine_passes_every_rule(arguments, changes):
    vllm_config = arguments(**changes).create_engine_config()
    assert [rule(vllm_config) for rule in support.REFUSALS] == [None] * len(support.REFUSALS)


REFUSED = {
    "speculative decoding": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 2,
            "prompt_lookup_max": 3,
        }
    },
    "KV connectors": {
        "kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    },
    "KV connectors and KV cache offloading": {"kv_offloading_size": 1.0},
    "context parallelism: got sizes 2": {
        "tensor_parallel_size": 2,
        "decode_context_parallel_size": 2,
    },
    "context parallelism: got sizes 1": {"prefill_context_parallel_size": 2},
    "micro-batching": {"enable_dbo": True},
    "micro-batching: got --enable-dbo or --ubatch-size": {"ubatch_size": 2},
    "another dtype than the model's: got fp8": {"kv_cache_dtype": "fp8"},
    "another dtype than the model's: got float16 with a bfloat16": {"kv_cache_dtype": "float16"},
    "fast prefill with shared KV layers": {"kv_sharing_fast_prefill": True},
    "models that do not generate": {"runner": "pooling", "convert": "embed"},
    "multi-head latent attention": {"checkpoint": checkpoint_configs.LATENT},
    "sliding-window": {"checkpoint": checkpoint_configs.SLIDING_WINDOW},
    "sliding-window, chunked": {"checkpoint": checkpoint_configs.MIXED_WINDOWS},
    "sliding-window, chunked or": {"checkpoint": checkpoint_configs.CHUNKED},
    "sliding-window, chunked or linear": {"checkpoint": checkpoint_configs.DUAL_CHUNK},
    "ALiBi": {"checkpoint": checkpoint_configs.ALIBI},
    "encoder-decoder models": {"checkpoint": checkpoint_configs.CROSS_ATTENTION},
    "bidirectional attention": {"attention_config": {"use_non_causal": True}},
    "bidirectional attention and diffusion": {"diffusion_config": {"canvas_length": 8}},
}


@pytest.mark.parametrize(("feature", "changes"), REFUSED.items(), ids=REFUSED)
def test_unsupported_feature_is_refused_by_name_with_the_cure(arguments, feature, changes):
    engine_args = arguments(**changes)
    with pytest.raises(ValueError, match=r"does not support .*: got .+, wanted .+; .+") as error:
        engine_args.create_engine_config()
    assert feature in str(error.value)
    assert len(str(error.value).splitlines()) == 1


# What a small config.json on a CPU cannot bring about: the property is overridden on vLLM's own
# class, which fails when vLLM renames it.
OVERRIDDEN = {
    "Mamba, hybrid": (ModelConfig, "is_hybrid", True),
    "Mamba, hybrid or attention-free": (ModelConfig, "is_attention_free", True),
    "sliding-window": (ModelConfig, "rswa_window", 64),
    "bidirectional attention": (ModelConfig, "is_mm_prefix_lm", True),
    "bidirectional attention and": (ModelConfig, "is_diffusion", True),
}


@pytest.mark.parametrize(("feature", "override"), OVERRIDDEN.items(), ids=OVERRIDDEN)
def test_unsupported_property_is_refused_by_name(arguments, monkeypatch, feature, override):
    vllm_config = arguments().create_engine_config()
    cls, name, value = override
    monkeypatch.setattr(cls, name, property(lambda self: value))
    # A cached property keeps its value in the instance, but a plain one comes before it.
    with pytest.raises(ValueError, match="does not support") as error:
        support.check(vllm_config)
    assert feature in str(error.value)


def test_sparse_offload_is_refused_by_name(arguments):
    vllm_config = arguments().create_engine_config()
    vllm_config.attention_config.hisparse_config = object()
    assert "HiSparse" in str(support.sparse_offload(vllm_config))


def test_every_rule_has_a_test():
    tested = "\n".join([*REFUSED, *OVERRIDDEN, "HiSparse", "V1 runner", "attention backend"])
    features = [
        "speculative decoding",
        "KV connectors",
        "HiSparse",
        "context parallelism",
        "micro-batching",
        "another dtype",
        "fast prefill",
        "generate",
        "latent",
        "sliding-window",
        "Mamba",
        "ALiBi",
        "encoder-decoder",
        "bidirectional",
        "V1 runner",
        "attention backend",
    ]
    assert len(features) == len(support.REFUSALS)
    assert all(feature in tested for feature in features)


def test_all_refusals_are_named_at_once(arguments):
    engine_args = arguments(kv_sharing_fast_prefill=True, kv_cache_dtype="fp8")
    with pytest.raises(ValueError, match=r"(?s)KV cache in another dtype.*\n.*fast prefill"):
        engine_args.create_engine_config()


def run_without_plugin(tmp_path, statement):
    """Runs a statement about an engine with drafts in a process that loads other plugins only."""
    script = (
        "import sys, rkv_vllm, vllm\n"
        "drafts = {'method': 'ngram', 'num_speculative_tokens': 2, 'prompt_lookup_max': 3}\n"
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


REFUSED_DRAFTS = "does not support speculative decoding: got method 'ngram'"


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
        "scheduler_cls": support.SCHEDULER_CLS,
        "worker_cls": support.WORKER_CLS["cpu"],
    }
    run = run_without_plugin(tmp_path, f"vllm.LLM(**engine, **{by_name})")
    assert run.returncode != 0
    assert REFUSED_DRAFTS in run.stderr


def test_a_gpu_is_warned_of(arguments, monkeypatch):
    vllm_config = arguments().create_engine_config()
    warnings: list[str] = []
    logger = SimpleNamespace(warning=lambda message, *_: warnings.append(message))
    monkeypatch.setattr("rkv_vllm.log.init_logger", lambda name: logger)
    support.check(vllm_config)
    assert warnings == []
    monkeypatch.setattr(type(current_platform), "device_name", "cuda")
    support.check(vllm_config)
    assert "has not run on one" in warnings[0]


def test_the_v1_runner_on_a_gpu_is_refused(arguments, monkeypatch):
    vllm_config = arguments().create_engine_config()
    assert not vllm_config.use_v2_model_runner
    monkeypatch.setattr(type(current_platform), "device_type", "cuda")
    with pytest.raises(ValueError, match="does not support the V1 model runner on a GPU: got V1"):
        support.check(vllm_config)
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", True)
    support.check(vllm_config)


def test_an_attention_backend_of_unknown_layout_is_refused(arguments):
    vllm_config = arguments().create_engine_config()
    vllm_config.attention_config.backend = AttentionBackendEnum.FLEX_ATTENTION
    with pytest.raises(ValueError, match=r"got FLEX_ATTENTION, wanted one of CPU_ATTN, FLASH_ATTN"):
        support.check(vllm_config)
    vllm_config.attention_config.backend = AttentionBackendEnum.TRITON_ATTN
    support.check(vllm_config)


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "0.34.0rc1.dev2+g123", "1.0.0"])
def test_untested_vllm_version_is_refused(arguments, monkeypatch, version):
    engine_args = arguments()
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(
        ValueError, match=rf"got {version.replace('+', '.')}, wanted >=0.32.0,<0.34"
    ):
        engine_args.create_engine_config()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.0+cpu", "0.32.1rc1", "0.33.0"])
def test_tested_vllm_version_is_accepted(monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    support.check_vllm_version()


def test_platform_without_a_worker_is_refused(arguments, monkeypatch):
    engine_args = arguments()
    monkeypatch.setattr(type(current_platform), "device_name", "rocm")
    with pytest.raises(
        ValueError, match="no worker for this platform: got 'rocm', wanted one of cpu, cuda"
    ):
        engine_args.create_engine_config()
    with pytest.raises(ValueError, match="got 'rocm'"):
        rkv_vllm.engine_args()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("--scheduler-cls", {"scheduler_cls": "my.Scheduler"}),
        ("--scheduler-cls", {"scheduler_cls": object}),
        ("worker_cls", {"worker_cls": "my.Worker"}),
    ],
)
def test_foreign_scheduler_or_worker_is_refused(arguments, name, changes):
    with pytest.raises(ValueError, match=rf"{name}: got .*, but --kv-compression wanted .*; leave"):
        arguments(**changes).create_engine_config()


@pytest.mark.parametrize("route", ["scheduler_cls", "worker_cls"])
def test_our_scheduler_or_worker_without_options_is_refused(arguments, route):
    given = arguments()
    engine_args = arguments(additional_config={}, scheduler_cls=None, worker_cls="auto")
    setattr(engine_args, route, getattr(given, route))
    with pytest.raises(ValueError, match="without options"):
        engine_args.create_engine_config()


def test_foreign_scheduler_and_worker_are_none_of_our_business_when_off(arguments):
    vllm_config = arguments(
        additional_config={}, scheduler_cls="my.Scheduler", worker_cls="my.Worker"
    ).create_engine_config()
    assert vllm_config.scheduler_config.scheduler_cls == "my.Scheduler"
    assert vllm_config.parallel_config.worker_cls == "my.Worker"


def test_unsupported_features_stay_allowed_when_off(arguments):
    vllm_config = arguments(
        checkpoint_configs.SLIDING_WINDOW,
        additional_config={},
        scheduler_cls=None,
        worker_cls="auto",
        kv_cache_dtype="fp8",
    ).create_engine_config()
    assert vllm_config.additional_config == {}
    assert vllm_config.scheduler_config.scheduler_cls is None
    assert vllm_config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"


@pytest.mark.parametrize(("max_model_len", "warnings"), [(128, 1), (129, 0)])
def test_options_that_never_take_effect_are_warned_about(arguments, max_model_len, warnings):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("vllm.rkv_vllm.support")
    logger.addHandler(handler)
    try:
        arguments(max_model_len=max_model_len).create_engine_config()
    finally:
        logger.removeHandler(handler)
    assert ["no request will ever be" in record.getMessage() for record in records] == (
        [True] * warnings
    )
