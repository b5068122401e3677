"""The explicit-eviction reference against plain transformers and numbers worked out by hand."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rkv_vllm.options import ServerOptions
from tests.methods.dense import keep_indices
from tests.models import EOS_TOKEN_ID, assert_varied, random_model, random_prompt
from tests.reference import ReferenceRequest, generate_reference, load_model, single_thread

NUM_KV_HEADS = 2
SHAPES = [(family, heads) for family in ("qwen3", "llama") for heads in (2, 6, 16)]
SMALL = ServerOptions(budget=64, buffer=32)
AMPLE = ServerOptions(budget=1024, buffer=128)
# Plain transformers and the reference order their sums differently; float32 leaves about 1e-5.
LOGPROB_TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _on_one_thread():
    with single_thread():
        yield


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """Returns a function (family, num_heads) -> folder that builds each model once."""
    built: dict[tuple[str, int], Path] = {}

    def get(family: str = "qwen3", num_heads: int = 6) -> Path:
        if (family, num_heads) not in built:
            directory = tmp_path_factory.mktemp(f"{family}-{num_heads}")
            built[family, num_heads] = random_model(directory, family, NUM_KV_HEADS, num_heads)
        return built[family, num_heads]

    return get


@torch.inference_mode()
def plain_forward(directory: Path, token_ids: list[int]):
    """One forward of stock transformers over a whole text, with its cache and attention weights."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    return model(torch.tensor([token_ids]), use_cache=True, output_attentions=True)


@pytest.mark.parametrize(("family", "num_heads"), SHAPES)
def test_ample_budget_equals_plain_greedy_generation(model_dir, family, num_heads):
    directory = model_dir(family, num_heads)
    prompt = random_prompt(70, seed=1)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    plain = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=60,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = plain.sequences[0, 70:]
    logprobs = torch.cat(plain.logits).log_softmax(-1)

    result = generate_reference(directory, prompt, 60, AMPLE)

    assert result.token_ids == tokens.tolist()
    chosen = logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(
        torch.tensor(result.logprobs), chosen, rtol=0, atol=LOGPROB_TOLERANCE
    )
    torch.testing.assert_close(
        result.top_logprobs, logprobs.topk(5).values, rtol=0, atol=LOGPROB_TOLERANCE
    )
    assert torch.equal(result.top_ids[:, 0], tokens)
    assert result.compactions == []
    assert result.physical_lens == list(range(70, 130))


@pytest.mark.parametrize(
    ("prompt_len", "compactions", "lens_at"),
    [
        # Shorter than the budget: due when 64 + 32 tokens are settled, at step 96 - 10 + 1.
        (10, [(87, 96, 32), (119, 96, 32)], {0: 10, 86: 96, 87: 65, 118: 96, 119: 65, 129: 75}),
        # 96 tokens are settled at step 27, but 32 decoded ones only at step 33.
        (
            70,
            [(33, 102, 38), (65, 96, 32), (97, 96, 32), (129, 96, 32)],
            {0: 70, 32: 102, 33: 65, 64: 96, 65: 65, 96: 96, 97: 65, 129: 65},
        ),
        # Longer than budget + buffer: cached whole, first trimmed after 32 decoded tokens.
        (
            150,
            [(33, 182, 118), (65, 96, 32), (97, 96, 32), (129, 96, 32)],
            {0: 150, 1: 151, 32: 182, 33: 65, 64: 96, 65: 65, 129: 65},
        ),
    ],
)
def test_compactions_happen_at_the_steps_worked_out_by_hand(
    model_dir, prompt_len, compactions, lens_at
):
    result = generate_reference(model_dir(), random_prompt(prompt_len, seed=2), 130, SMALL)

    assert result.compactions == compactions
    assert {step: result.physical_lens[step] for step in lens_at} == lens_at
    assert len(result.physical_lens) == 130


def test_unprocessed_step_delays_a_compaction_and_moves_two_tokens(model_dir):
    result = generate_reference(
        model_dir(), random_prompt(70, seed=2), 80, SMALL, unprocessed_steps=1
    )

    assert result.compactions == [(34, 102, 38), (66, 96, 32)]
    assert [result.physical_lens[step] for step in (33, 34, 65, 66)] == [103, 66, 97, 66]


@pytest.mark.parametrize(
    ("family", "num_heads", "unprocessed_steps"),
    [*((*shape, 0) for shape in SHAPES), ("qwen3", 6, 1)],
)
def test_survivors_are_what_keep_indices_says(model_dir, family, num_heads, unprocessed_steps):
    directory = model_dir(family, num_heads)
    tokens = random_prompt(103 + unprocessed_steps, seed=3)
    settled_len = 102
    model = load_model(directory, torch.float32)
    compacted = ReferenceRequest(model, SMALL, unprocessed_steps)
    untouched = ReferenceRequest(model, AMPLE, unprocessed_steps)
    for request in (compacted, untouched):
        request.prefill(tokens[:70])
        for token in tokens[70:]:
            request.decode(token)
    plain = plain_forward(directory, tokens)

    assert compacted.physical_len == SMALL.budget + 1 + unprocessed_steps
    for layer, (after, before) in enumerate(
        zip(compacted.layer_caches, untouched.layer_caches, strict=True)
    ):
        queries = before.queries[:, -SMALL.window - 1 - unprocessed_steps :][:, : SMALL.window]
        _assert_queries_attend_like(
            plain.attentions[layer][0], queries, before.keys, settled_len - SMALL.window
        )
        kept = keep_indices(before.keys[:, :settled_len], queries, SMALL.budget)
        for head in range(NUM_KV_HEADS):
            cached = kept[head].tolist() + list(range(settled_len, len(tokens)))
            assert torch.equal(after.keys[head], before.keys[head, cached])
            assert torch.equal(after.values[head], before.values[head, cached])
        plain_layer = plain.past_key_values.layers[layer]
        torch.testing.assert_close(before.keys, plain_layer.keys[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(before.values, plain_layer.values[0], rtol=0, atol=1e-4)


def _assert_queries_attend_like(
    weights: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, first: int
) -> None:
    """Checks that `queries [num_heads, w, d]` are those of positions `first` and up.

    They are when they give the rows of the plain model's attention `weights [num_heads, n, n]`.
    """
    group = queries.shape[0] // keys.shape[0]
    for head in range(queries.shape[0]):
        for row, query in enumerate(queries[head]):
            position = first + row
            visible = keys[head // group, : position + 1]
            expected = (visible @ query / query.shape[0] ** 0.5).softmax(0)
            torch.testing.assert_close(
                weights[head, position, : position + 1], expected, rtol=0, atol=1e-4
            )


def test_cached_keys_keep_their_logical_position_through_compactions(model_dir):
    tokens = random_prompt(170, seed=4)
    request = ReferenceRequest(load_model(model_dir(), torch.float32), SMALL)
    request.prefill(tokens[:70])
    settled = [request.decode(token)[1] for token in tokens[70:]]
    assert [length for length in settled if length is not None] == [102, 96, 96]

    # Keys of the first layer depend on token and position alone, so the text's own keys name the
    # logical position of every entry, whatever was evicted in between.
    cached = request.layer_caches[0].keys
    text = plain_forward(model_dir(), tokens).past_key_values.layers[0].keys[0]
    distances = torch.cdist(cached, text, compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.amin(-1).max() < 1e-3
    positions = distances.argmin(-1)
    assert (positions.diff(dim=-1) > 0).all()
    newest = request.physical_len - SMALL.budget
    assert newest == 4
    assert (positions[:, -newest:] == torch.arange(166, 170)).all()
    assert not torch.equal(positions[0], positions[1])


@pytest.mark.parametrize(("family", "num_heads"), SHAPES)
def test_text_varies_and_eviction_changes_it(model_dir, family, num_heads):
    directory = model_dir(family, num_heads)
    prompt = random_prompt(70, seed=5)

    evicted = generate_reference(directory, prompt, 300, SMALL)
    full = generate_reference(directory, prompt, 100, None)

    assert len(evicted.compactions) == 9
    assert_varied(evicted.token_ids)
    assert_varied(full.token_ids)
    # The compaction after step 33 acts from step 34 on.
    assert evicted.token_ids[:34] == full.token_ids[:34]
    assert evicted.logprobs[:34] == full.logprobs[:34]
    assert evicted.token_ids[:100] != full.token_ids


def test_forced_tokens_are_fed_and_scored(model_dir):
    prompt, forced = random_prompt(30, seed=6), random_prompt(20, seed=7)
    result = generate_reference(model_dir(), prompt, 20, SMALL, forced_ids=forced)

    logprobs = plain_forward(model_dir(), prompt + forced).logits[0, 29:-1].log_softmax(-1)
    expected = logprobs[range(20), forced]
    assert result.token_ids == forced
    torch.testing.assert_close(
        torch.tensor(result.logprobs), expected, rtol=0, atol=LOGPROB_TOLERANCE
    )


def test_recompute_starts_over_with_prompt_and_output(model_dir):
    prompt = random_prompt(70, seed=8)
    result = generate_reference(model_dir(), prompt, 120, SMALL, recompute_at=50)
    undisturbed = generate_reference(model_dir(), prompt, 120, SMALL)
    fresh = generate_reference(model_dir(), prompt + result.token_ids[:50], 70, SMALL)

    assert result.token_ids[:50] == undisturbed.token_ids[:50]
    assert result.token_ids[50:] == fresh.token_ids
    assert result.token_ids != undisturbed.token_ids
    assert result.compactions == [(33, 102, 38), (83, 152, 88), (115, 96, 32)]
    assert [result.physical_lens[step] for step in (49, 50, 82, 83)] == [81, 120, 152, 65]


def test_cache_has_the_dtype_that_was_asked_for(model_dir):
    request = ReferenceRequest(load_model(model_dir(), torch.bfloat16), SMALL)
    request.prefill(random_prompt(70, seed=9))
    settled = [request.decode(token)[1] for token in random_prompt(33, seed=10)]

    assert settled[-1] == 102
    assert request.layer_caches[0].keys.dtype == torch.bfloat16
    assert request.layer_caches[0].keys.shape == (NUM_KV_HEADS, 65, 32)


@pytest.mark.parametrize(
    "tokens",
    [
        [7] * 300,
        list(range(150)) + [1, 2, 3, 4, 5] * 30,
        [number % 90 for number in range(300)],
    ],
    ids=["one token", "ends in a cycle", "90 of 300 distinct"],
)
def test_poor_text_is_refused(tokens):
    with pytest.raises(AssertionError):
        assert_varied(tokens)


def test_model_never_ends_its_text_by_chance(model_dir):
    logits = plain_forward(model_dir(), random_prompt(300, seed=11)).logits[0]

    assert (logits[:, EOS_TOKEN_ID] == 0).all()
    assert logits.amax(-1).min() > 3


def test_tokenizer_covers_the_model_and_chats(model_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_dir())
    text = "Keep the last 8 tokens,\nevict the rest."
    chat = [{"role": "user", "content": text}]

    assert len(tokenizer) == 1024
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(set(tokenizer(text).input_ids)) > 15
    assert all(tokenizer.decode([token]).isascii() for token in range(1024))
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert prompt == f"<|user|>{text}<|assistant|>"
    # Each role is one token of its own, not spelled out.
    assert len(tokenizer(prompt).input_ids) == len(tokenizer(text).input_ids) + 2
