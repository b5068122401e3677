"""What this release runs on, and what it refuses at start: by name, with the cure.

Everything here is asked only when compression is switched on, before a model is loaded. vLLM is
imported inside the functions, so that importing this module stays cheap. A refusal goes when the
feature is supported: delete its function, its line in `REFUSALS` and its case in the tests.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from rkv_vllm.config import CONFIG_KEY, KVCompressionConfig
from rkv_vllm.signatures import Part, check_signatures

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

SUPPORTED_VLLM = ">=0.32.0,<0.34"
# A factory: vLLM calls whatever this names, and it picks the scheduler that fits the config.
SCHEDULER_CLS = "rkv_vllm.scheduling.scheduler.make_scheduler"
# Name of vLLM's platform -> worker class.
WORKER_CLS = {
    "cpu": "rkv_vllm.worker.cpu_worker.CompressionCPUWorker",
    "cuda": "rkv_vllm.worker.gpu_worker.CompressionGPUWorker",
}

# Those whose cache layouts are known (worker/cache_views.py).
ATTENTION_BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")

FULL_ATTENTION_LAYERS = {"full_attention", "attention"}


class Refusal(NamedTuple):
    """One unsupported feature found in a config: what it is, what was set, the way out."""

    feature: str
    got: str
    wanted: str
    cure: str

    def __str__(self) -> str:
        """The sentence that users read."""
        return (
            f"KV cache compression does not support {self.feature}: got {self.got}, "
            f"wanted {self.wanted}; {self.cure}"
        )


def check_vllm_version() -> None:
    """Raises ValueError unless the installed vLLM lies in `SUPPORTED_VLLM`."""
    import vllm
    from packaging.specifiers import SpecifierSet

    if not SpecifierSet(SUPPORTED_VLLM).contains(vllm.__version__, prereleases=True):
        raise ValueError(
            f"KV cache compression is not tested with this vLLM: got {vllm.__version__}, "
            f'wanted {SUPPORTED_VLLM}; run: pip install "vllm{SUPPORTED_VLLM}"'
        )


def platform_worker_cls() -> str:
    """Returns the worker class for the platform that vLLM runs on.

    Raises:
        ValueError: a platform without such a class.
    """
    from vllm.platforms import current_platform

    # Not the device type: ROCm calls its own "cuda".
    platform = current_platform.device_name
    if platform not in WORKER_CLS:
        raise ValueError(
            f"KV cache compression has no worker for this platform: got {platform!r}, wanted "
            f"one of {', '.join(WORKER_CLS)}; use a vLLM built for one of these"
        )
    return WORKER_CLS[platform]


def check_engine_args(engine_args: "EngineArgs") -> None:
    """Raises ValueError for what must be refused before vLLM makes its config.

    The CPU platform drops `enable_dbo` without a word, and vLLM's own errors about the other two
    advise settings that would be refused next.

    Args:
        engine_args: as the user gave them.
    """
    check_vllm_version()
    check_signatures(Part.ENGINE)
    platform_worker_cls()
    _raise_if_any(
        _micro_batching(engine_args.enable_dbo or engine_args.ubatch_size > 1),
        _context_parallel(
            engine_args.decode_context_parallel_size, engine_args.prefill_context_parallel_size
        ),
    )


def check(vllm_config: "VllmConfig") -> None:
    """Raises ValueError naming every unsupported feature of a finished engine config.

    Logs a warning when no request can grow long enough to be compacted, and on a GPU.

    Args:
        vllm_config: the engine config that vLLM has made, with our options in it.
    """
    _raise_if_any(*(rule(vllm_config) for rule in REFUSALS))
    _warn_if_never_due(vllm_config)
    _warn_if_unproven()


def _raise_if_any(*refusals: Refusal | None) -> None:
    if found := [refusal for refusal in refusals if refusal is not None]:
        raise ValueError("\n".join(map(str, found)))


def _warn_if_never_due(vllm_config: "VllmConfig") -> None:
    from rkv_vllm.log import init_logger

    config = KVCompressionConfig.from_dict(vllm_config.additional_config[CONFIG_KEY])
    max_model_len = vllm_config.model_config.max_model_len
    if config.budget + config.buffer >= max_model_len:
        init_logger(__name__).warning(
            "--kv-budget %d plus --kv-buffer %d reach --max-model-len %d: no request will ever be "
            "compacted unless it sets a smaller budget itself; lower the budget",
            config.budget,
            config.buffer,
            max_model_len,
        )


def _warn_if_unproven() -> None:
    """To go with the first run of benchmarks/gpu/verify.py that passes."""
    from vllm.platforms import current_platform

    from rkv_vllm.log import init_logger

    if current_platform.device_name == "cuda":
        init_logger(__name__).warning(
            "This release of KV cache compression was tested under Triton's interpreter and "
            "compiled for GPUs, but has not run on one: compare its output with your own "
            "uncompressed run first (benchmarks/gpu/verify.py does)"
        )


def speculative_decoding(vllm_config: "VllmConfig") -> Refusal | None:
    """Drafts are written to the cache before they are accepted."""
    speculative = vllm_config.speculative_config
    if speculative is None:
        return None
    return Refusal(
        "speculative decoding",
        f"method {speculative.method!r}",
        "none",
        "remove --speculative-config and --spec-...",
    )


def kv_connector(vllm_config: "VllmConfig") -> Refusal | None:
    """A connector takes the content of a block for the tokens it was hashed for."""
    connector = vllm_config.kv_transfer_config
    if connector is None:
        return None
    return Refusal(
        "KV connectors and KV cache offloading",
        f"connector {connector.kv_connector!r}",
        "none",
        "remove --kv-transfer-config and --kv-offloading-size",
    )


def sparse_offload(vllm_config: "VllmConfig") -> Refusal | None:
    """HiSparse keeps the cache on the host."""
    if vllm_config.attention_config.hisparse_config is None:
        return None
    return Refusal(
        "HiSparse KV offloading",
        "attention_config.hisparse_config",
        "none",
        "remove hisparse_config from --attention-config",
    )


def context_parallel(vllm_config: "VllmConfig") -> Refusal | None:
    """The tokens of one request lie interleaved on several ranks."""
    parallel = vllm_config.parallel_config
    return _context_parallel(
        parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size
    )


def _context_parallel(decode: int, prefill: int) -> Refusal | None:
    if decode == prefill == 1:
        return None
    return Refusal(
        "context parallelism",
        f"sizes {decode} (decode) and {prefill} (prefill)",
        "1 and 1",
        "remove --decode-context-parallel-size and --prefill-context-parallel-size",
    )


def micro_batching(vllm_config: "VllmConfig") -> Refusal | None:
    """Slices of a batch bring attention metadata of their own."""
    return _micro_batching(vllm_config.parallel_config.use_ubatching)


def _micro_batching(in_use: bool) -> Refusal | None:
    if not in_use:
        return None
    return Refusal(
        "micro-batching", "--enable-dbo or --ubatch-size above 1", "neither", "remove both flags"
    )


def cache_dtype(vllm_config: "VllmConfig") -> Refusal | None:
    """Keys of a quantised cache cannot be scored as they are."""
    got = vllm_config.cache_config.cache_dtype
    model_dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    if got in ("auto", model_dtype):
        return None
    return Refusal(
        "a KV cache in another dtype than the model's",
        f"{got} with a {model_dtype} model",
        "auto",
        "pass --kv-cache-dtype auto (a checkpoint may ask for a quantised cache by itself: then "
        f"pass --kv-cache-dtype {model_dtype})",
    )


def kv_sharing_fast_prefill(vllm_config: "VllmConfig") -> Refusal | None:
    """It hands some layers metadata with fewer tokens."""
    if not vllm_config.cache_config.kv_sharing_fast_prefill:
        return None
    return Refusal(
        "fast prefill with shared KV layers",
        "--kv-sharing-fast-prefill",
        "off",
        "remove the flag",
    )


def pooling_model(vllm_config: "VllmConfig") -> Refusal | None:
    """Nothing is decoded, so nothing is ever compacted."""
    runner = vllm_config.model_config.runner_type
    if runner == "generate":
        return None
    return Refusal(
        "models that do not generate text",
        f"runner {runner!r}",
        "'generate'",
        "pass --runner generate or remove --kv-compression",
    )


def latent_attention(vllm_config: "VllmConfig") -> Refusal | None:
    """A latent cache holds no keys per head."""
    if not vllm_config.model_config.use_mla:
        return None
    return _wrong_model("multi-head latent attention (MLA)", vllm_config)


def window_attention(vllm_config: "VllmConfig") -> Refusal | None:
    """Layers with a window or chunks find their tokens by logical position."""
    model = vllm_config.model_config
    # The config of the checkpoint, not of vLLM: each model family has other fields.
    checkpoint = model.hf_text_config.to_dict()
    layer_types = checkpoint.get("layer_types")
    if layer_types is not None:
        limited = not FULL_ATTENTION_LAYERS.issuperset(layer_types)
    else:
        limited = model.get_sliding_window() is not None
    if checkpoint.get("dual_chunk_attention_config") is not None:
        limited = True
    if limited or model.attention_chunk_size is not None or model.rswa_window is not None:
        return _wrong_model("sliding-window, chunked or linear attention layers", vllm_config)
    return None


def recurrent_model(vllm_config: "VllmConfig") -> Refusal | None:
    """A recurrent state is no list of tokens."""
    model = vllm_config.model_config
    if not (model.is_hybrid or model.is_attention_free):
        return None
    return _wrong_model("Mamba, hybrid or attention-free models", vllm_config)


def alibi(vllm_config: "VllmConfig") -> Refusal | None:
    """ALiBi takes the place in the cache for the place in the text."""
    if not vllm_config.model_config.uses_alibi:
        return None
    return _wrong_model("ALiBi position biases", vllm_config)


def encoder_decoder(vllm_config: "VllmConfig") -> Refusal | None:
    """Cross-attention has a cache of its own."""
    if not vllm_config.model_config.is_encoder_decoder:
        return None
    return _wrong_model("encoder-decoder models", vllm_config)


def bidirectional_attention(vllm_config: "VllmConfig") -> Refusal | None:
    """A token that is seen by earlier ones is not settled when it is computed."""
    model = vllm_config.model_config
    if not (
        model.is_mm_prefix_lm
        or model.is_diffusion
        or vllm_config.diffusion_config is not None
        or vllm_config.attention_config.use_non_causal
    ):
        return None
    return _wrong_model("bidirectional attention and diffusion", vllm_config)


def v1_runner_on_gpu(vllm_config: "VllmConfig") -> Refusal | None:
    """On GPUs only the V2 runner, vLLM's default there, has an adapter."""
    from vllm.platforms import current_platform

    if current_platform.device_type == "cpu" or vllm_config.use_v2_model_runner:
        return None
    return Refusal(
        "the V1 model runner on a GPU",
        "V1",
        "V2",
        "unset VLLM_USE_V2_MODEL_RUNNER; if vLLM then logs a feature that V2 does not support yet, "
        "remove that feature",
    )


def attention_backend(vllm_config: "VllmConfig") -> Refusal | None:
    """A backend that vLLM picks by itself is checked when the cache is allocated."""
    backend = vllm_config.attention_config.backend
    if backend is None or backend.name in ATTENTION_BACKENDS:
        return None
    return Refusal(
        "this attention backend",
        backend.name,
        f"one of {', '.join(ATTENTION_BACKENDS)}",
        "choose one of these with --attention-backend, or leave the flag out",
    )


def _wrong_model(feature: str, vllm_config: "VllmConfig") -> Refusal:
    model = vllm_config.model_config
    return Refusal(
        feature,
        f"{', '.join(model.architectures)} ({model.model})",
        "a decoder with full attention in every layer",
        "remove --kv-compression or serve another model",
    )


REFUSALS: tuple[Callable[["VllmConfig"], Refusal | None], ...] = (
    speculative_decoding,
    kv_connector,
    sparse_offload,
    context_parallel,
    micro_batching,
    cache_dtype,
    kv_sharing_fast_prefill,
    pooling_model,
    latent_attention,
    window_attention,
    recurrent_model,
    alibi,
    encoder_decoder,
    bidirectional_attention,
    v1_runner_on_gpu,
    attention_backend,
)
