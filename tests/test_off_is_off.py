"""Installed but not switched on, the plugin changes nothing in vLLM but the functions it lists."""

import difflib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rkv_vllm import patches
from rkv_vllm.flags import GROUP_TITLE
from rkv_vllm.options import OPTIONS, flagged_method_options
from tests.checkpoint_configs import LLAMA, write_config

# Every module whose behaviour compression changes when it is on, or might be tempted to change.
TOUCHED_MODULES = [
    "vllm.engine.arg_utils",
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.llm",
    "vllm.config.vllm",
    "vllm.config.scheduler",
    "vllm.v1.engine.core",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.core.sched.async_scheduler",
    "vllm.v1.core.sched.output",
    "vllm.v1.core.kv_cache_manager",
    "vllm.v1.core.kv_cache_coordinator",
    "vllm.v1.core.single_type_kv_cache_manager",
    "vllm.v1.core.block_pool",
    "vllm.v1.core.kv_cache_utils",
    "vllm.v1.kv_cache_interface",
    "vllm.v1.kv_cache_spec_registry",
    "vllm.v1.worker.worker_base",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.worker.gpu_input_batch",
    "vllm.v1.worker.block_table",
    "vllm.v1.worker.utils",
    "vllm.v1.attention.backend",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.attention.backends.registry",
    "vllm.model_executor.layers.attention.attention",
    "vllm.v1.metrics.stats",
    "vllm.v1.metrics.loggers",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.input_processor",
]

# Runs in a process of its own: one that other tests have not registered the plugin in. Compares by
# identity every function, class and property of the modules and of the classes in them, between
# "plugin not loaded" and "plugin loaded, engine config made without compression".
COMPARE = """
import importlib, json, sys

from vllm.plugins import load_general_plugins
from vllm.v1 import kv_cache_spec_registry as registry

modules = [importlib.import_module(name) for name in json.loads(sys.argv[1])]
registry.KVCacheSpecRegistry._ensure_registered(None)


def is_code(value):
    return callable(value) or isinstance(value, (staticmethod, classmethod, property))


def snapshot():
    found = {}
    for module in modules:
        for name, value in vars(module).items():
            if is_code(value):
                found[f"{module.__name__}:{name}"] = value
            if isinstance(value, type) and value.__module__ == module.__name__:
                for member, code in vars(value).items():
                    if is_code(code):
                        found[f"{module.__name__}:{name}.{member}"] = code
    for name in ("_REGISTRY_KVCACHESPEC_LIST", "_REGISTRY_ROLE_MANAGERS"):
        found[f"registry:{name}"] = repr(getattr(registry, name))
    return found


before = snapshot()
load_general_plugins()
loaded = sorted(name for name in sys.modules if name.split(".")[0] == "rkv_vllm")

from vllm.engine.arg_utils import EngineArgs

config = EngineArgs(model=sys.argv[2], skip_tokenizer_init=True).create_engine_config()
after = snapshot()
different = [
    name
    for name in sorted(before.keys() | after.keys())
    if name not in before or name not in after
    or (before[name] != after[name] if name.startswith("registry:")
        else before[name] is not after[name])
]
print(json.dumps({
    "different": different,
    "compared": len(before),
    "registered_specs": len(registry._REGISTRY_KVCACHESPEC_LIST),
    "loaded": loaded,
    "additional_config": config.additional_config,
    "scheduler_cls": config.scheduler_config.scheduler_cls,
    "worker_cls": config.parallel_config.worker_cls,
}))
"""


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    model = write_config(tmp_path_factory.mktemp("llama"), LLAMA)
    run = subprocess.run(
        [sys.executable, "-c", COMPARE, json.dumps(TOUCHED_MODULES), model],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_no_vllm_symbol_differs_but_the_listed_ones(comparison):
    listed = sorted(patch.symbol for patch in patches.PATCHES if not patch.only_when_on)
    assert comparison["different"] == listed
    assert comparison["compared"] > 1000
    assert comparison["registered_specs"] > 1


def test_engine_config_is_the_stock_one(comparison):
    assert comparison["additional_config"] == {}
    assert comparison["scheduler_cls"] is None
    assert comparison["worker_cls"] == "vllm.v1.worker.cpu_worker.CPUWorker"


def test_nothing_of_scheduler_worker_or_kernels_is_imported(comparison):
    assert "rkv_vllm.plugin" in comparison["loaded"]
    heavy = ("scheduling", "worker", "kernels", "methods")
    assert not [
        name for name in comparison["loaded"] if name.split(".")[1:2] in ([h] for h in heavy)
    ]


def test_patch_table_lists_the_files_of_its_folder():
    files = {path.stem for path in Path(patches.__file__).parent.glob("*.py")} - {"__init__"}
    assert sorted(files) == sorted(patch.module for patch in patches.PATCHES)
    assert all(patch.why and patch.since and patch.until for patch in patches.PATCHES)


def help_of_serve(plugins: dict[str, str]) -> list[str]:
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "--help=all"]
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**environment, "COLUMNS": "100", **plugins},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.splitlines()


def test_help_differs_by_our_group_only():
    stock, ours = help_of_serve({"VLLM_PLUGINS": ""}), help_of_serve({})
    changes = [line for line in difflib.ndiff(stock, ours) if not line.startswith(("  ", "? "))]
    assert [line for line in changes if line.startswith("-")] == []
    added = [line[2:] for line in changes]
    assert added[0] == f"{GROUP_TITLE}:"
    text = " ".join(" ".join(added).split())
    for option in {**OPTIONS, **flagged_method_options()}.values():
        metavar = f"{option.metavar} " if option.metavar else ""
        assert f"{option.flag} {metavar}{option.meaning}" in text
    # One block: the group and nothing between the other groups.
    start = ours.index(added[0])
    assert ours[start : start + len(added)] == added
