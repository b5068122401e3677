"""Answer many prompts in a Ray Data job; beside every answer stands what was evicted for it.

python examples/ray_data_batch.py .models/SmolLM2-135M-Instruct folder/of/answers
Needs ray, pandas, pyarrow. On a cluster (RAY_ADDRESS) make the pool larger, with num_gpus=1.
"""

import sys

import ray.data
from vllm import LLM, SamplingParams

import rkv_vllm


class Answering:
    """An actor with an engine."""

    def __init__(self, model: str) -> None:
        compression = rkv_vllm.engine_args(budget=128, buffer=64)
        self.llm = LLM(model, enforce_eager=True, kv_cache_memory_bytes=2**28, **compression)

    def __call__(self, batch: dict) -> dict:
        """Answer the prompts of a batch at once."""
        sampling = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
        outputs = self.llm.generate(list(batch["prompt"]), sampling)
        reports = self.llm.collective_rpc("kv_compression_requests")[0]
        by_id = {report["req_id"].split("-")[0]: report for report in reports}
        for column in ("compactions", "evicted_tokens"):
            batch[column] = [by_id[output.request_id][column] for output in outputs]
        return batch | {"answer": [output.outputs[0].text for output in outputs]}


if __name__ == "__main__":
    prompts = ray.data.from_items([{"prompt": f"What is special about {n}?"} for n in range(12)])
    actors = {"compute": ray.data.ActorPoolStrategy(size=1), "fn_constructor_args": sys.argv[1:2]}
    answers = prompts.map_batches(Answering, batch_size=6, **actors).materialize()
    answers.write_json(sys.argv[2])
    done = answers.select_columns(["compactions", "evicted_tokens"]).to_pandas().sum()
    print(f"{done['compactions']} compactions evicted {done['evicted_tokens']} tokens")
