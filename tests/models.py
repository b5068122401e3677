"""Small random models on disk whose greedy text varies and whose attention matters.

A model with plain random weights repeats one token, and its output hardly changes when its cache is
trimmed: an equality test on it proves nothing. The weights here are scaled so that every token's
successor depends on what attention reads. vLLM and transformers load the same folder. Knows nothing
of compression; read `reference.py` next.
"""

import itertools
import string
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>")
EOS_TOKEN_ID = SPECIAL_TOKENS.index("</s>")
NUM_CHARACTERS = 96
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FAMILIES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}

# Standard deviations that the weights are drawn for, with inputs of unit root mean square.
QUERY_STD = 2.0
KEY_STD = 1.5
ATTENTION_GAIN = 1.5
MLP_GAIN = 1.0
LOGIT_STD = 2.5
# Share of a key's energy that all keys of a head have in common, as in trained models: many pairs
# of keys are then more alike than the similarity threshold, and many are not.
COMMON_KEY_ENERGY = 0.75
# The residual channel that carries a constant for the common part of the keys; nothing else reads
# or writes it.
CONSTANT_CHANNEL = 0


def random_model(
    directory: str | Path,
    family: str = "qwen3",
    num_kv_heads: int = 2,
    num_heads: int = 2,
    *,
    layers: int = 4,
    head_dim: int = 32,
    hidden: int = 192,
    vocab: int = 1024,
    seed: int = 0,
    max_position_embeddings: int = 4096,
    layer_types: Sequence[str] | None = None,
    sliding_window: int | None = None,
) -> Path:
    """Writes a random float32 model with its tokenizer and returns its folder.

    Args:
        directory: folder to write to, made when missing.
        family: "qwen3" (norms on queries and keys) or "llama".
        num_kv_heads: key-value heads; must divide `num_heads`.
        num_heads: query heads.
        layers: decoder layers.
        head_dim: size of one head; vLLM's CPU attention takes 32, 64, 80, 96, 112, 128 ...
        hidden: width of the residual stream; Llama wants a multiple of `num_heads`.
        vocab: tokens of the model and of its tokenizer alike.
        seed: seed of the weights; the same arguments give the same bytes.
        max_position_embeddings: longest text in tokens.
        layer_types: of a Llama, "sliding_attention" or "full_attention" for each layer; vLLM obeys,
            of transformers only `reference.py`.
        sliding_window: tokens that a sliding layer sees, its own included.

    Returns:
        The folder, as a `Path`.

    Raises:
        ValueError: unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is not one of {sorted(FAMILIES)}; pass one of them")
    config_class, model_class = FAMILIES[family]
    config = config_class(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        bos_token_id=SPECIAL_TOKENS.index("<s>"),
        eos_token_id=EOS_TOKEN_ID,
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
        dtype=torch.float32,
        **({} if layer_types is None else {"layer_types": [*layer_types]}),
        **({} if sliding_window is None else {"sliding_window": sliding_window}),
    )
    model = model_class(config).to(torch.float32)
    _draw_weights(model, torch.Generator().manual_seed(seed))
    path = Path(directory)
    model.save_pretrained(path)
    tiny_tokenizer(vocab, max_position_embeddings).save_pretrained(path)
    return path


def _draw_weights(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Overwrites projections and embeddings; norm weights stay one but for Qwen3's head norms."""
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding.copy_(torch.randn(embedding.shape, generator=generator))
        embedding[:, CONSTANT_CHANNEL] = 1
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for projection, gain in (
                (attention.q_proj, QUERY_STD),
                (attention.k_proj, KEY_STD),
                (attention.v_proj, 1.0),
                (attention.o_proj, ATTENTION_GAIN),
                (mlp.gate_proj, 1.0),
                (mlp.up_proj, 1.0),
                (mlp.down_proj, MLP_GAIN),
            ):
                draw(projection.weight, gain, generator)
            for reader in (attention.q_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                reader.weight[:, CONSTANT_CHANNEL] = 0
            for writer in (attention.o_proj, mlp.down_proj):
                writer.weight[CONSTANT_CHANNEL] = 0
            share_key_part(attention.k_proj.weight, generator)
            if hasattr(attention, "k_norm"):
                attention.q_norm.weight.fill_(QUERY_STD)
                attention.k_norm.weight.fill_(KEY_STD)
        draw(model.lm_head.weight, LOGIT_STD, generator)
        model.lm_head.weight[:, CONSTANT_CHANNEL] = 0
        # A logit of zero among a thousand random ones is never the largest: text does not end by
        # chance.
        model.lm_head.weight[: len(SPECIAL_TOKENS)] = 0


def draw(weight: torch.Tensor, gain: float, generator: torch.Generator) -> None:
    """Fills `weight [out, in]` so that inputs of unit root mean square give outputs of `gain`."""
    drawn = torch.randn(weight.shape, generator=generator)
    weight.copy_(drawn * gain * weight.shape[1] ** -0.5)


def share_key_part(weight: torch.Tensor, generator: torch.Generator) -> None:
    """Splits a key projection `[num_kv_heads * head_dim, hidden]` into common and own part."""
    weight *= (1 - COMMON_KEY_ENERGY) ** 0.5
    common = torch.randn(weight.shape[0], generator=generator)
    weight[:, CONSTANT_CHANNEL] = common * KEY_STD * COMMON_KEY_ENERGY**0.5


def tiny_tokenizer(vocab: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """Builds an ASCII tokenizer of exactly `vocab` tokens: characters, letter pairs and triples.

    Every token decodes to whole characters, so streamed text never waits for the rest of one. Text
    beyond ASCII becomes `<unk>`.

    Args:
        vocab: number of tokens; at least the special tokens and characters.
        model_max_length: longest text in tokens.

    Returns:
        A fast tokenizer with a chat template.

    Raises:
        ValueError: `vocab` is out of range.
    """
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    letters = string.ascii_lowercase
    pairs = list(itertools.product(letters, letters))
    triples = list(itertools.product(letters, letters, letters))
    merges = [*pairs, *((first + second, third) for first, second, third in triples)]
    smallest = len(SPECIAL_TOKENS) + len(characters)
    if not smallest <= vocab <= smallest + len(merges):
        raise ValueError(
            f"vocab {vocab} is outside {smallest}..{smallest + len(merges)}; pass a size between"
        )
    merges = merges[: vocab - smallest]
    pieces = [*SPECIAL_TOKENS, *characters, *(left + right for left, right in merges)]
    model = BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=merges,
        unk_token="<unk>",
    )
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL_TOKENS[4:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def kv_cache_bytes(model: Path, num_tokens: int, bytes_per_element: int = 4) -> int:
    """Size of a pool for `num_tokens` tokens on one rank, those of the null block included."""
    config = AutoConfig.from_pretrained(model)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    elements = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    return num_tokens * elements * bytes_per_element


def random_prompt(length: int, seed: int, vocab: int = 1024) -> list[int]:
    """Draws `length` token ids, none of them special, for a prompt."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL_TOKENS), vocab, (length,), generator=generator).tolist()


def assert_varied(token_ids: Sequence[int]) -> None:
    """Fails when greedy text is too poor to tell a right cache from a wrong one.

    At least a third of the tokens must be distinct (100 of 300), and the last quarter must not
    repeat with any period up to its half.

    Args:
        token_ids: generated tokens, without the prompt.
    """
    distinct = len(set(token_ids))
    assert 3 * distinct >= len(token_ids), f"{distinct} distinct among {len(token_ids)} tokens"
    tail = list(token_ids[-(len(token_ids) // 4) :])
    for period in range(1, len(tail) // 2 + 1):
        assert tail[period:] != tail[:-period], f"the text ends in a cycle of {period} tokens"
