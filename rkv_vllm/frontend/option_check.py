"""ASGI middleware: a bad request option is refused before vLLM handles the request.

Later it may be too late: a streamed answer of the Responses API has begun, the Messages API has
logged the client's mistake as a fault of the server, beam search has dropped the options. A body is
looked at when vLLM reads it, so only behind its authentication. `flags.py` puts this in place, by
vLLM's own --middleware. What needs the length of the prompt is left to `patches/`.
Next: request_check.py.
"""

import json
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rkv_vllm.frontend.request_check import find_bad_option
from rkv_vllm.request_options import RequestOptionError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_KEY = "vllm_xargs"
# What pydantic reads as true.
_TRUE = ("true", "1", "on", "t", "y", "yes")


class OptionCheck:
    """Answers requests with bad options itself, with status 400, and hands on all others.

    Args:
        app: what it stands in front of.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection as ASGI has it."""
        if scope["type"] != "http" or scope["method"] != "POST" or not _is_json(scope):
            await self._app(scope, receive, send)
            return
        chunks: list[bytes] = []
        refused: RequestOptionError | None = None

        async def receive_and_check() -> Message:
            nonlocal refused
            message = await receive()
            if message["type"] != "http.request":
                return message
            chunks.append(message.get("body", b""))
            if not message.get("more_body", False):
                refused = _find_bad_option(b"".join(chunks), scope["app"].state.vllm_config)
                chunks.clear()
            if refused is not None:
                # FastAPI stops here, counts status 400, and hands it to a handler of vLLM's.
                raise HTTPException(400, str(refused))
            return message

        async def send_unless_refused(message: Message) -> None:
            if refused is None:
                await send(message)

        await self._app(scope, receive_and_check, send_unless_refused)
        if refused is not None:
            # With the parameter's name, which vLLM's handler would leave out.
            await _answer(refused, scope["path"])(scope, receive, send)


def _is_json(scope: Scope) -> bool:
    return any(name == b"content-type" and b"json" in value for name, value in scope["headers"])


def _find_bad_option(body: bytes, vllm_config: "VllmConfig") -> RequestOptionError | None:
    # Most requests have none, and a body can be megabytes.
    if f'"{_KEY}"'.encode() not in body:
        return None
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        # vLLM says what is wrong with it.
        return None
    extra_args = fields.get(_KEY) if isinstance(fields, dict) else None
    if not isinstance(extra_args, dict):
        return None
    uses_beam_search = str(fields.get("use_beam_search")).lower() in _TRUE
    return find_bad_option(extra_args, vllm_config, uses_beam_search)


def _answer(error: RequestOptionError, path: str) -> JSONResponse:
    """The error in the words of OpenAI's API, or of Anthropic's."""
    said = {"message": str(error), "type": "BadRequestError", "param": error.key, "code": 400}
    content = {"error": said}
    if path.endswith("/messages"):
        content["type"] = "error"
    return JSONResponse(content, 400)
