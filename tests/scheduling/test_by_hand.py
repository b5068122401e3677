"""Requests that reach vLLM's queues without `add_request`, as in vLLM's own tests."""

import pytest
from vllm import SamplingParams
from vllm.v1.request import Request, RequestStatus

from tests.models import random_model
from tests.scheduling.simulation import Setting, SimulatedEngine

FEATURES = {
    "always": {},
    "pressure": {"when": "pressure", "num_blocks": 24},
    "prompts": {"compress_prompt": True, "prompt_chunk": 8},
    "swapping": {"host_blocks": 40, "num_blocks": 24},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=FEATURES.values(), ids=FEATURES)
def setting(request):
    return Setting(budget=8, buffer=8, window=4, **request.param)


def test_one_put_among_the_waiting_is_compacted_like_others(model, setting):
    def put(request: Request) -> None:
        engine.scheduler.waiting.add_request(request)
        engine.scheduler.requests[request.request_id] = request

    directives = []
    for by_hand in (False, True):
        engine = SimulatedEngine(model, setting)
        if by_hand:
            engine.scheduler.add_request = put
        for number in range(4):
            engine.add(f"request-{number}", [number] * 20, 50, {"kv_budget": 7 + number})
        engine.run()
        engine.assert_nothing_is_left()
        directives.append(engine.directives)
    assert directives[0] == directives[1]
    assert len(directives[0]) > 10


def test_one_put_among_the_running_is_scheduled_preempted_and_freed(model, setting):
    engine = SimulatedEngine(model, setting)
    scheduler = engine.scheduler
    for number in range(3):
        params = SamplingParams(max_tokens=9)
        request = Request(
            f"request-{number}", [number] * 16, params, None, block_hasher=engine.hasher
        )
        request.status = RequestStatus.RUNNING
        scheduler.requests[request.request_id] = request
        scheduler.running.append(request)
    assert sum(scheduler.schedule().num_scheduled_tokens.values()) == 48
    scheduler.finish_requests("request-0", RequestStatus.FINISHED_ABORTED)
    scheduler._preempt_request(scheduler.running.pop(), 0.0)
    scheduler.schedule()
    scheduler.finish_requests(["request-1", "request-2"], RequestStatus.FINISHED_STOPPED)
    assert not scheduler._known
    assert not scheduler.requests
