"""`vllm serve` with the tests' flags, looked at through HTTP alone.

Works without `tests/engine.py`: nothing of vLLM is imported here.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from prometheus_client.parser import text_string_to_metric_families

from rkv_vllm.bench import server as vllm_server
from rkv_vllm.bench.processes import ChildError
from tests.models import kv_cache_bytes

BLOCK_SIZE = 32
# Later flags win, so a test overrides any of these by repeating it.
DEFAULT_FLAGS = (
    "--dtype=float32",
    "--enforce-eager",
    "--max-model-len=1024",
    "--max-num-seqs=16",
    f"--block-size={BLOCK_SIZE}",
    "--seed=0",
)
# A server closes idle connections, and a request may just have taken one.
ONE_REQUEST_EACH = {"Connection": "close"}
DEFAULT_ENVIRONMENT = {
    # POST /collective_rpc, the only way to the workers' counters, is a development endpoint.
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
}


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        running: its process and log.
        model: name that requests give.
        client: synchronous client that never retries.
    """

    running: vllm_server.Server
    model: str
    client: openai.OpenAI

    @property
    def base_url(self) -> str:
        """Without a trailing slash and without "/v1"."""
        return self.running.url

    @property
    def log(self) -> str:
        return self.running.log.read_text(errors="replace")

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.base_url}/v1",
            api_key="none",
            max_retries=0,
            timeout=240,
            default_headers=ONE_REQUEST_EACH,
        )

    def health(self) -> int:
        """Status code of /health."""
        return vllm_server.local_request("GET", f"{self.base_url}/health").status_code

    def metrics(self) -> Counter[str]:
        """Samples of /metrics by name without the prefix "vllm:", summed over their labels."""
        sums: Counter[str] = Counter()
        page = self.running.ask("GET", "/metrics").text
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                sums[sample.name.removeprefix("vllm:")] += sample.value
        return sums

    def rpc(self, method: str) -> list[Any]:
        """What the worker's method returns, one entry per rank."""
        answer = self.running.ask("POST", "/collective_rpc", json={"method": method})
        return answer.json()["results"]

    def stats(self) -> dict[str, int]:
        """Counters of compression; the ranks must agree."""
        first, *others = self.rpc("kv_compression_stats")
        assert all(other == first for other in others)
        return first

    def report(self, response_id: str) -> dict[str, int | str]:
        """Lengths and blocks of the one request behind an OpenAI response."""
        reports = self.rpc("kv_compression_requests")[0]
        (report,) = [r for r in reports if response_id in r["req_id"]]
        return report

    def complete(self, prompt: list[int] | str, max_tokens: int, **options: Any) -> Any:
        """One greedy completion of exactly `max_tokens` tokens."""
        extra = {"ignore_eos": True, "return_token_ids": True, **options.pop("extra_body", {})}
        return self.client.completions.create(
            model=self.model,
            prompt=prompt,
            max_tokens=max_tokens,
            extra_body=extra,
            **{"temperature": 0, **options},
        )


@contextmanager
def serving(
    model: Path, *flags: str, num_blocks: int = 256, env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Serves a model until the block ends, with what tests want of every server.

    Args:
        model: folder of a model.
        flags: further flags; they win over `DEFAULT_FLAGS`.
        num_blocks: blocks of the pool, the null block included.
        env: further environment variables.
    """
    pool = f"--kv-cache-memory-bytes={kv_cache_bytes(model, num_blocks * BLOCK_SIZE)}"
    all_flags = [str(model), *DEFAULT_FLAGS, pool, *flags]
    environment = {**DEFAULT_ENVIRONMENT, **(env or {})}
    with tempfile.TemporaryDirectory(prefix="served-") as scratch:
        try:
            with (
                vllm_server.serving(all_flags, Path(scratch) / "log", environment) as running,
                openai.OpenAI(
                    base_url=f"{running.url}/v1",
                    api_key="none",
                    max_retries=0,
                    timeout=240,
                    default_headers=ONE_REQUEST_EACH,
                ) as client,
            ):
                yield Server(running, str(model), client)
        except ChildError as error:
            raise AssertionError("\n".join([str(error), *error.log_tail])) from error
