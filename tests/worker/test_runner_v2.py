"""The V2 runner under captured graphs: fixed addresses, and nobody's rows in dummy batches."""

import functools
import gc
import inspect
import weakref

import numpy as np
import pytest
import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

import rkv_vllm
from tests.engine import running_engine
from tests.models import random_prompt
from tests.worker.test_flush import directive

pytestmark = pytest.mark.engine


class Recorder:
    """Notes what attention metadata is made from."""

    def __init__(self, monkeypatch) -> None:
        from vllm.v1.worker.utils import AttentionGroup

        self.batches: list[dict] = []
        for name in ("build_metadata", "build_metadata_for_cudagraph_capture"):
            monkeypatch.setattr(AttentionGroup, name, self._noting(getattr(AttentionGroup, name)))

    def _noting(self, build):
        @functools.wraps(build)
        def noting(group, common, *args, **kwargs):
            self.batches.append(
                {
                    "seq_lens": common.seq_lens.clone(),
                    "upper_bound": common.seq_lens_cpu_upper_bound.clone(),
                    "addresses": (
                        common.seq_lens.data_ptr(),
                        common.slot_mapping.data_ptr(),
                        common.block_table_tensor.data_ptr(),
                    ),
                    "slots": common.slot_mapping.clone(),
                }
            )
            return build(group, common, *args, **kwargs)

        return noting

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
        (evicted_rows,) = model_runner.state_rows.num_evicted.values()
        (rows,) = model_runner.rows.values()
        ring = model_runner.compactor.groups[0].layer_sets[0].ring
        for i in range(2):
            engine.add(f"r{i}", random_prompt(48 + i, seed=i), 40)
        while engine.stats()["compactions"] < 2:
            engine.step()
        recorder.take()
        engine.step()
        (real,) = recorder.take()
        assert evicted_rows.any()
        windows = ring.queries.clone()
        evicted = evicted_rows.copy()

        # As many rows as the live requests have: their numbers coincide with those of live ones.
        model_runner._dummy_run(2)
        (dummy,) = recorder.take()
        # Nothing is subtracted: these rows are nobody's.
        assert dummy["seq_lens"].equal(model_runner.input_buffers.seq_lens[:2])
        assert (rows.token_rows == -1).all()
        model_runner._dummy_run(4, skip_attn=True, is_profile=True)
        assert recorder.take() == []
        assert (rows.token_rows == -1).all()
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
        assert ring.queries.equal(windows)
        assert (evicted_rows == evicted).all()

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
        states = engine.model_runner.state_rows
        (rows,) = engine.model_runner.rows.values()
        states.num_evicted[0][:] = 5
        states.seats[0][:] = 3
        states.begin_step(np.array([7]))
        # Where vLLM warms up with requests of its own their blocks still stand in it.
        tables.block_tables[0].gpu[7] = 0
        rows.seq_lens.fill_(99)
        rows.token_rows.fill_(99)
        device = rows.seq_lens.device
        step = (
            torch.tensor([7, -1], device=device),
            torch.tensor([0, 1, 2, 2, 2], dtype=torch.int32, device=device),
            torch.tensor([20, 20, 0, 0], device=device),
        )
        with states.own_call():
            slots = tables.compute_slot_mappings(*step, num_tokens_padded=4)
        assert slots[0].tolist() == [15, -1, -1, -1]
        assert (rows.token_rows[1:] == -1).all()
        assert rows.token_rows[0] >= 0
        assert rows.seq_lens[0] == 16
        assert not rows.seq_lens[2:].any()

        # A draft model asks with a mapping of its own, wider than a step.
        lengths, recorded = rows.seq_lens.clone(), rows.token_rows.clone()
        width = len(recorded) + engine.model_runner.max_num_reqs
        own = torch.full((1, width), 99, device=device)
        slots = tables.compute_slot_mappings(*step, num_tokens_padded=4, out=own)
        assert slots[0].tolist() == [15, -1, -1, -1]
        assert (own[0, 4:] == -1).all()
        assert rows.seq_lens.equal(lengths)
        assert rows.token_rows.equal(recorded)
        with pytest.raises(ValueError, match=f"got a mapping of {width + 1} tokens, wanted at"):
            tables.compute_slot_mappings(*step, num_tokens_padded=4, out=torch.ones(1, width + 1))


@pytest.mark.parametrize("runner", ["v2"], indirect=True)
def test_rows_of_different_widths_are_exchanged_in_one_flush(random_model_dir, runner):
    model = random_model_dir("qwen3", 3)
    with running_engine(model, **rkv_vllm.engine_args(budget=48, buffer=16)) as engine:
        tables = engine.model_runner.block_tables
        rows = {4: [9, 8, 7], 2: [6]}
        directives = [directive(f"r{i}", [1, 2, 3, 5], new) for i, new in rows.items()]
        tables.exchange_rows(0, directives, list(rows))
        for state, new in rows.items():
            assert tables.num_blocks.np[0, state] == len(new)
            assert tables.block_tables[0].gpu[state, : len(new)].tolist() == new


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
