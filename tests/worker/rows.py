"""Compares the rows of scheduler, worker and block table (SPEC 4.5) of an engine in this process.

Between two steps a compaction is booked and not carried out yet: then the worker's row is the old
one of its directive, and the scheduler's the new one, to which nothing was added since.
"""

from vllm.utils.math_utils import cdiv

from rkv_vllm.scheduling.books import GroupBooks


def assert_rows_agree(engine) -> int:
    """Check every row of every running request in every group.

    Args:
        engine: a `tests.engine.Engine` with compression, between two steps.

    Returns:
        Rows compared whose request was compacted at least once.
    """
    scheduler, runner = engine.scheduler, engine.model_runner
    pending = {(d.req_id, d.group_id): d for d in runner.compactor.pending}
    num_compacted = 0
    for request in scheduler.running:
        for group_id, books in enumerate(
            scheduler.kv_cache_manager.coordinator.single_type_managers
        ):
            req_id = request.request_id
            booked = [block.block_id for block in books.req_to_blocks[req_id]]
            directive = pending.get((req_id, group_id))
            worker_row, table_row = rows_of(runner, req_id, group_id)
            assert worker_row == table_row, (req_id, group_id)
            if directive is None:
                if not isinstance(books, GroupBooks):
                    # What a window has left behind is the null block for the scheduler only.
                    table_row = [t if b else 0 for t, b in zip(table_row, booked, strict=True)]
                assert table_row == booked, (req_id, group_id)
            else:
                assert table_row == directive.old_block_ids, (req_id, group_id)
                assert booked == directive.new_block_ids, (req_id, group_id)
            if isinstance(books, GroupBooks):
                num_compacted += check_lengths(engine, request, group_id, books, directive)
    return num_compacted


def check_lengths(engine, request, group_id, books, directive) -> bool:
    """The worker's evicted tokens are the scheduler's, and no block is held for nothing."""
    evicted = books.num_evicted.get(request.request_id, 0)
    carried_out = engine.model_runner.compactor.groups[group_id].num_evicted(request.request_id)
    assert carried_out == evicted - (0 if directive is None else directive.num_evict)
    if evicted:
        physical_len = request.num_computed_tokens - evicted
        held = len(books.req_to_blocks[request.request_id])
        # Rejected drafts leave blocks behind that the next tokens fill.
        drafted = (
            engine.scheduler.num_spec_tokens * engine.scheduler.vllm_config.max_concurrent_batches
        )
        longest = physical_len + drafted + engine.scheduler.num_lookahead_tokens
        assert cdiv(physical_len, books.block_size) <= held <= cdiv(longest, books.block_size)
    return evicted > 0


def rows_of(runner, req_id: str, group_id: int) -> tuple[list[int], list[int]]:
    """Block ids that the worker keeps of a request, and those that attention is shown."""
    if hasattr(runner, "state_rows"):
        tables = runner.block_tables
        state = runner.req_states.req_id_to_index[req_id]
        width = tables.num_blocks.np[group_id, state]
        gathered = tables.block_tables[group_id].gpu[state, :width].tolist()
        # V2 keeps no row beside the table.
        return gathered, gathered
    kept = list(runner.requests[req_id].block_ids[group_id])
    table = runner.input_batch.block_table[group_id]
    row = runner.input_batch.req_id_to_index.get(req_id)
    if row is None:
        # A step without room for one of its tokens took the request out of the batch.
        return kept, kept
    return kept, table.block_table.np[row, : table.num_blocks_per_row[row]].tolist()
