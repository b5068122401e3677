"""What tests ask a worker for that no client can see (`--worker-extension-cls`).

Next: medley.py.
"""

import functools

from rkv_vllm.scheduling.directive import STEP_PLAN_ATTRIBUTE


class PreemptionWatch:
    """To be mixed into a worker: notes when preempted requests are computed again."""

    def watch_preemptions(self) -> None:
        """Begin to note, or begin anew."""
        self._restarts: dict[str, list[int]] = {}
        runner = self.model_runner
        if not hasattr(runner, "unwatched_execute_model"):
            runner.unwatched_execute_model = runner.execute_model
            runner.execute_model = functools.partial(self._watched_execute_model, runner)

    def preemptions(self) -> dict[str, list[int]]:
        """By request id: after how many output tokens it was computed again, each time."""
        return self._restarts

    def _watched_execute_model(self, runner, scheduler_output, *args, **kwargs):
        cached = scheduler_output.scheduled_cached_reqs
        plan = getattr(scheduler_output, STEP_PLAN_ATTRIBUTE, None)
        swapped_in = set() if plan is None else {each.req_id for each in plan.restored}
        for req_id, num_tokens in zip(cached.req_ids, cached.num_output_tokens, strict=True):
            if req_id in cached.resumed_req_ids and req_id not in swapped_in and num_tokens:
                self._restarts.setdefault(req_id, []).append(num_tokens)
        return runner.unwatched_execute_model(scheduler_output, *args, **kwargs)
