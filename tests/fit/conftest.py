"""What the tests of this folder share: the plugin is loaded, and engines of a small model."""

import logging

import pytest
from vllm.engine.arg_utils import EngineArgs

import rkv_vllm
from rkv_vllm.plugin import register
from tests.checkpoint_configs import LLAMA, write_config


@pytest.fixture(autouse=True, scope="module")
def plugin():
    register()


@pytest.fixture
def arguments(tmp_path):
    """Makes engine arguments for a small supported model, with compression and some changes."""

    def make(checkpoint=LLAMA, **changes):
        model = write_config(tmp_path / "model", checkpoint)
        drafts = changes.get("speculative_config")
        if drafts and "model" in drafts:
            changes["speculative_config"] = {**drafts, "model": model}
        compression = rkv_vllm.engine_args(budget=96, buffer=32)
        return EngineArgs(**{"model": model, "skip_tokenizer_init": True, **compression, **changes})

    return make


@pytest.fixture
def warnings():
    """What this package's checks warn of, as if nothing had been warned of before.

    vLLM's loggers do not reach pytest's own handler.
    """
    from vllm import logger as vllm_logger

    vllm_logger._print_warning_once.cache_clear()
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("vllm.rkv_vllm.fit")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


OFF = {"additional_config": {}, "scheduler_cls": None, "worker_cls": "auto"}
