"""The V2 runner under captured graphs: fixed addresses, and nobody's rows in dummy batches."""

import functools
import gc
import inspect
import weakref

import pytest
import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

import rkv_vllm
from tests.engine import running_engine
from tests.models import random_prompt

pytestmark = pytest.mark.engine


class Recorder:
    """Notes what attention metadata is made from."""

    def __init__(self, monkeypatch) -> None:
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState

        self.batches: list[dict] = []
        prepare_attn = DefaultModelState.prepare_attn

        def noting(state, batch, mode, block_tables, slot_mappings, *args, **kwargs):
            self.batches.append(
                {
                    "seq_lens": batch.seq_lens.clone(),
                    "upper_bound": batch.seq_lens_cpu_upper_bound.clone(),
                    "addresses": (
                        batch.seq_lens.data_ptr(),
                        slot_mappings.data_ptr(),
                        block_tables[0].data_ptr(),
                    ),
                    "slots": slot_mappings.clone(),
                }
            )
            return prepare_attn(state, batch, mode, block_tables, slot_mappings, *args, **kwargs)

        monkeypatch.setattr(DefaultModelState, "prepare_attn", noting)

    def take(self) -> list[dict]:
        taken, self.batches = self.batches, []
        return taken


@pytest.mark.parametrize("runner", ["v2"], indirect=True)
def test_captured_dummy_and_real_runs_share_addresses_and_nothing_else(
    random_model_dir, runner, monkeypatch
):
    from vllm.v1.worker.gpu.cudagraph_utils import prepare_inputs_to_capture

    model = random_model_dir("qwen3", 3)
    with running_engine(model, **rkv_vllm.engine_args(budget=48, buffer=16)) as engine:
        # Not before the start, which compares vLLM's functions with what we know of them.
        recorder = Recorder(monkeypatch)
        model_runner = engine.model_runner
        rows = model_runner.physical_rows
        for i in range(2):
            engine.add(f"r{i}", random_prompt(48 + i, seed=i), 40)
        while engine.stats()["compactions"] < 2:
            engine.step()
        recorder.take()
        engine.step()
        (real,) = recorder.take()
        assert rows.num_evicted.any()
        windows = model_runner.query_ring.queries.clone()
        evicted = rows.num_evicted.copy()

        # As many rows as the live requests have: their numbers coincide with those of live ones.
        model_runner._dummy_run(2)
        (dummy,) = recorder.take()
        # Nothing is subtracted: these rows are nobody's.
        assert dummy["seq_lens"].equal(model_runner.input_buffers.seq_lens[:2])
        assert (model_runner.query_ring.token_rows == -1).all()
        model_runner._dummy_run(4, skip_attn=True, is_profile=True)
        assert recorder.take() == []
        assert (model_runner.query_ring.token_rows == -1).all()
        prepare_inputs_to_capture(
            2,
            2,
            model_runner.model_state,
            model_runner.input_buffers,
            model_runner.block_tables,
            model_runner.attn_groups,
            model_runner.kv_cache_config,
            full_cudagraph=True,
        )
        (captured,) = recorder.take()
        assert captured["addresses"] == dummy["addresses"] == real["addresses"]
        assert captured["seq_lens"].equal(model_runner.input_buffers.seq_lens[:2])
        assert (dummy["slots"] == -1).all()
        assert (captured["slots"] == -1).all()
        assert model_runner.query_ring.queries.equal(windows)
        assert (rows.num_evicted == evicted).all()

        # Host planners read the bound: it is exact, and physical.
        logical = [len(engine.outputs[f"r{i}"].token_ids) + 48 + i for i in range(2)]
        assert real["upper_bound"].tolist() == real["seq_lens"].tolist()
        assert real["seq_lens"].sum() < sum(logical) - 2 * 16 + 1
        engine.run()
        assert engine.stats()["compactions"] == 4


@pytest.mark.parametrize("runner", ["v2"], indirect=True)
def test_graph_padding_behind_a_real_batch_belongs_to_nobody(random_model_dir, runner):
    """A graph replays more rows than a step has: their slots are none and their lengths zero."""
    model = random_model_dir("qwen3", 3)
    with running_engine(model, **rkv_vllm.engine_args(budget=48, buffer=16)) as engine:
        tables = engine.model_runner.block_tables
        rows = engine.model_runner.physical_rows
        rows.num_evicted[:] = 5
        rows.slots[:] = 3
        rows.begin_step()
        rows.seq_lens.fill_(99)
        rows.pool.token_rows.fill_(99)
        idx_mapping = torch.tensor([7, -1])
        slots = tables.compute_slot_mappings(
            idx_mapping,
            torch.tensor([0, 1, 2, 2, 2], dtype=torch.int32),
            torch.tensor([20, 20, 0, 0]),
            num_tokens_padded=4,
        )
        assert slots[0].tolist() == [15, -1, -1, -1]
        assert (rows.pool.token_rows[1:] == -1).all()
        assert rows.pool.token_rows[0] >= 0
        assert rows.seq_lens[0] == 16
        assert not rows.seq_lens[2:].any()


@pytest.mark.parametrize("runner", ["v2"], indirect=True)
def test_vllm_profiles_before_there_is_a_cache_and_on_one_that_it_throws_away(
    random_model_dir, runner, monkeypatch
):
    """As on a GPU: the memory of a dummy batch is measured first, then that of captured graphs."""
    attend = CPUAttentionBackendImpl.forward
    parameters = inspect.signature(attend)

    @functools.wraps(attend)
    def attend_to_nothing_known(*args, **kwargs):
        output = attend(*args, **kwargs)
        # Without a cache vLLM hands unwritten memory on, and where that holds NaN the interpreter
        # refuses to look for the largest logit.
        if parameters.bind(*args, **kwargs).arguments["attn_metadata"] is None:
            output.zero_()
        return output

    monkeypatch.setattr(CPUAttentionBackendImpl, "forward", attend_to_nothing_known)
    model = random_model_dir("qwen3", 3)
    options = rkv_vllm.engine_args(budget=48, buffer=16)
    # Without a given size vLLM runs its largest dummy batch before it allocates the cache.
    sizes = {"kv_cache_memory_bytes": None, "gpu_memory_utilization": 0.3}
    with running_engine(model, 64, **sizes, num_gpu_blocks_override=64, **options) as engine:
        model_runner = engine.model_runner
        config = model_runner.kv_cache_config
        thrown_away = weakref.ref(model_runner.compactor)
        model_runner.initialize_kv_cache(config, is_profiling=True)
        gc.collect()
        assert thrown_away() is None
        model_runner._dummy_run(4)
        model_runner.initialize_kv_cache(config)
        engine.add("a", random_prompt(50, seed=1), 40)
        engine.run()
        assert engine.stats()["compactions"] == 2
