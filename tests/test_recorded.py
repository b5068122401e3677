"""With the options of commit d8f3e30 an engine says today what it said then.

`python -m tests.test_recorded` on that commit wrote data/recorded_d8f3e30.json. Another machine
adds floats in another order, so log-probabilities have a tolerance; tokens have none.
"""

import json
from pathlib import Path

import pytest

import rkv_vllm
from tests.models import random_prompt

RECORDING = Path(__file__).parent / "data" / "recorded_d8f3e30.json"
# Family, query heads per KV head, options, tokens of each prompt, output tokens.
CASES = {
    "defaults of the method": ("qwen3", 3, {"budget": 48, "buffer": 16}, (20, 47, 90), 160),
    "every option another": (
        "llama",
        8,
        {"budget": 40, "buffer": 12, "window": 5, "lam": 0.4, "pool": 3, "threshold": 0.3},
        (20, 64, 33),
        160,
    ),
}

pytestmark = pytest.mark.engine


def outputs(model: Path, options: dict, prompt_lens: tuple[int, ...], num_tokens: int) -> list:
    """[token ids, log-probabilities] of each request, and the number of compactions at the end."""
    from tests.engine import running_engine

    with running_engine(model, **rkv_vllm.engine_args(**options)) as engine:
        for i, length in enumerate(prompt_lens):
            engine.add(f"r{i}", random_prompt(length, seed=i), num_tokens)
        engine.run()
        said = [[output.token_ids, output.logprobs] for output in engine.outputs.values()]
        return [*said, engine.stats()["compactions"]]


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_recording(random_model_dir, case):
    family, group, options, prompt_lens, num_tokens = CASES[case]
    *said, compactions = outputs(random_model_dir(family, group), options, prompt_lens, num_tokens)
    *recorded, recorded_compactions = json.loads(RECORDING.read_text())[case]
    assert compactions == recorded_compactions > 15
    for (token_ids, logprobs), (recorded_ids, recorded_logprobs) in zip(
        said, recorded, strict=True
    ):
        assert token_ids == recorded_ids
        assert len(set(token_ids)) > 10, "the text repeats itself and proves nothing"
        gaps = [abs(a - b) for a, b in zip(logprobs, recorded_logprobs, strict=True)]
        assert max(gaps) < 1e-3, gaps


def record() -> None:
    """Write what this checkout says."""
    import tempfile

    from tests.models import random_model

    recording = {}
    for case, (family, group, *rest) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            model = random_model(folder, family, num_kv_heads=2, num_heads=2 * group)
            recording[case] = outputs(model, *rest)
    RECORDING.parent.mkdir(exist_ok=True)
    RECORDING.write_text(json.dumps(recording) + "\n")


if __name__ == "__main__":
    import tests.conftest  # noqa: F401  (sets the environment before vLLM is imported)

    record()
