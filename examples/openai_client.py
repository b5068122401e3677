"""Stream one chat from a running server, then print what compression has done there so far.

VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --kv-compression rkv --kv-budget 128 --kv-buffer 64
python examples/openai_client.py "Tell me a long story."

VLLM_SERVER_DEV_MODE adds the endpoint that the numbers come from; chatting works without it.
"""

import argparse

import requests
from openai import OpenAI


def main() -> None:
    """Chat once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="without /v1")
    parser.add_argument("--max-tokens", type=int, default=300, help="longest answer in tokens")
    args = parser.parse_args()

    client = OpenAI(base_url=f"{args.url}/v1", api_key="none")
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": args.question}]
    for chunk in client.chat.completions.create(
        model=model, messages=messages, max_tokens=args.max_tokens, stream=True
    ):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    method = {"method": "kv_compression_stats"}
    answer = requests.post(f"{args.url}/collective_rpc", json=method, timeout=60)
    answer.raise_for_status()
    stats = answer.json()["results"][0]
    print(f"\n{stats['compactions']} compactions evicted {stats['evicted_tokens']} tokens")


if __name__ == "__main__":
    main()
