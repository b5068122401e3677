"""An OpenAI endpoint without a model: it answers at once and counts as ours does."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROMPT_LEN, OUTPUT_LEN = 50, 7


class FakeServer:
    """What a test sets, and what was asked.

    Attributes:
        has_plugin: whether compactions are counted.
        compacts: whether requests of compressed sides are.
        refuses: status and message for requests of compressed sides; None: it answers them.
        wait_seconds: until it answers.
        counts_tokens: whether answers say their numbers of tokens.
        asked: bodies of all requests for answers.
        open_at_once: most requests that were open at the same time.
    """

    def __init__(self) -> None:
        self.has_plugin = self.compacts = True
        self.refuses: tuple[int, str] | None = None
        self.wait_seconds = 0.0
        self.counts_tokens = True
        self.asked: list[dict[str, Any]] = []
        self.open_at_once = self._open = 0
        self._compactions = 5
        self._lock = threading.Lock()
        self.url = ""

    def metrics(self) -> str:
        lines = ["vllm:num_requests_running 0"]
        if self.has_plugin:
            lines.append(f"vllm:kv_compression_compactions_total {self._compactions}")
            lines.append(f"vllm:kv_compression_evicted_tokens_total {32 * self._compactions}")
        return "\n".join(lines) + "\n"

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with self._lock:
            self.asked.append(body)
            self._open += 1
            self.open_at_once = max(self.open_at_once, self._open)
        time.sleep(self.wait_seconds)
        with self._lock:
            self._open -= 1
            is_compressed = body.get("vllm_xargs", {}).get("kv_compression") != "off"
            if is_compressed and self.refuses:
                status, message = self.refuses
                return status, {"error": {"message": message, "code": status}}
            if is_compressed and self.compacts:
                self._compactions += 2
        return 200, {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": "Answer: \\boxed{5}"},
                    "token_ids": list(range(OUTPUT_LEN)),
                }
            ],
            "usage": {
                "prompt_tokens": PROMPT_LEN,
                "completion_tokens": OUTPUT_LEN,
                "total_tokens": PROMPT_LEN + OUTPUT_LEN,
            }
            if self.counts_tokens
            else None,
        }


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    """A server of the model "tiny" on a free port of this machine."""
    fake = FakeServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self._send(200, json.dumps({"data": [{"id": "tiny"}]}))
            elif self.path == "/metrics":
                self._send(200, fake.metrics())
            else:
                self._send(404, "{}")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer = fake.answer(body)
            self._send(status, json.dumps(answer))

        def _send(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        fake.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield fake
        finally:
            server.shutdown()
