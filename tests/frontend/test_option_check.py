"""The middleware that refuses bad request options, in front of a small server."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from fastapi import FastAPI, Request
from starlette.testclient import TestClient

from rkv_vllm.frontend.option_check import OptionCheck
from rkv_vllm.options import CONFIG_KEY, ServerOptions

SERVER = ServerOptions(budget=64, buffer=32)
BAD = {"vllm_xargs": {"kv_budget": 4}}


def server(*, compresses: bool = True) -> tuple[FastAPI, list[bytes]]:
    """An app behind the check, and the bodies that reach its handlers."""
    app, handled = FastAPI(), []
    config = {CONFIG_KEY: SERVER.to_dict()} if compresses else {}
    app.state.vllm_config = SimpleNamespace(additional_config=config)
    app.add_middleware(OptionCheck)

    @app.post("/v1/{name:path}")
    async def handle(name: str, fields: dict, request: Request) -> dict:
        handled.append(await request.body())
        return fields

    return app, handled


def post(app: FastAPI, body: object, path: str = "completions"):
    return TestClient(app).post(f"/v1/{path}", json=body)


REFUSED = {
    "bad value": (BAD, "kv_budget", "got 4, wanted more tokens than this server's --kv-window 8"),
    "JSON's true": ({"vllm_xargs": {"kv_buffer": True}}, "kv_buffer", "got True, wanted a whole"),
    "misspelled": ({"vllm_xargs": {"kv_bugdet": 64}}, "kv_bugdet", "write 'kv_budget'"),
    "beams": (
        {"use_beam_search": True, "vllm_xargs": {"kv_protect": 16, "other": 1}},
        "kv_protect",
        "got 16, wanted no value with use_beam_search: ",
    ),
    "beams, off": (
        {"use_beam_search": "yes", "vllm_xargs": {"kv_compression": "off"}},
        "kv_compression",
        "leave it out or remove use_beam_search",
    ),
}


@pytest.mark.parametrize(("body", "key", "said"), REFUSED.values(), ids=REFUSED)
def test_a_bad_option_is_refused_by_its_key_before_a_handler_runs(body, key, said):
    app, handled = server()
    answer = post(app, body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("BadRequestError", key, 400)
    assert error["message"].startswith(f"{key}: got ")
    assert said in error["message"]
    assert handled == []


def test_anthropics_clients_get_their_own_shape():
    answer = post(server()[0], BAD, "messages").json()
    assert answer["type"] == "error"
    assert answer["error"]["message"].startswith("kv_budget: got 4")


PASSED = {
    "good value": {"vllm_xargs": {"kv_budget": 40, "kv_compress_prompt": False, "mine": 1}},
    "no options": {"prompt": "vllm_xargs"},
    "beams": {"use_beam_search": True, "vllm_xargs": {"mine": 1}},
    "no beams": {"use_beam_search": False, "vllm_xargs": {"kv_budget": 40}},
    "no object": {"vllm_xargs": ["kv_budget"]},
}


@pytest.mark.parametrize("body", PASSED.values(), ids=PASSED)
def test_anything_else_reaches_the_handler_as_it_was_sent(body):
    app, handled = server()
    assert post(app, body).json() == body
    assert [json.loads(each) for each in handled] == [body]


def test_what_is_no_json_object_is_left_to_vllm():
    client = TestClient(server()[0])
    for broken in (
        '{"vllm_xargs": {"kv_budget": 4}',
        '["vllm_xargs"]',
        "[" * 10**5 + '"vllm_xargs"',
    ):
        answer = client.post("/v1/x", content=broken, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 422)
        assert "kv_budget: got" not in answer.text
    assert client.post("/v1/x", data={"vllm_xargs": "4"}).status_code == 422


def test_without_compression_the_keys_mean_nothing():
    app, handled = server(compresses=False)
    assert post(app, BAD).status_code == 200
    assert len(handled) == 1


def test_a_body_in_pieces_is_checked_whole_and_only_when_somebody_reads_it():
    app, handled = server()
    body = json.dumps(BAD).encode()
    pieces = [
        {"type": "http.request", "body": body[:9], "more_body": True},
        {"type": "http.request", "body": body[9:], "more_body": False},
    ]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/x",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }

    async def ask(app) -> tuple[int, int]:
        """Status, and pieces that nobody took."""
        waiting, sent = list(pieces), []

        async def receive() -> dict:
            return waiting.pop(0)

        async def send(message: dict) -> None:
            sent.append(message)

        await app(scope, receive, send)
        (status,) = [m["status"] for m in sent if m["type"] == "http.response.start"]
        return status, len(waiting)

    assert asyncio.run(ask(app)) == (400, 0)

    async def unauthorized(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 401})
        await send({"type": "http.response.body"})

    assert asyncio.run(ask(OptionCheck(unauthorized))) == (401, 2)
    assert handled == []
