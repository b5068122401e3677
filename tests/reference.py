"""Explicit eviction on transformers: what one request must say, computed without vLLM.

The loop keeps its own cache tensors, runs one request at a time and applies `keep_indices` when a
compaction is due. Nothing else of `rkv_vllm` but the config is used: schedule, positions and the
moving of survivors are written here a second time, in the plainest way. Knows nothing of blocks,
batches or observation slots. The models it is run on come from `models.py`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rkv_vllm.options import ServerOptions
from tests.methods.dense import keep_indices

ATTENTION_NAME = "explicit_eviction"
# What transformers calls layers of it; those of further kinds than these and ones with a window or
# chunks keep a state.
FULL_ATTENTION = ("full_attention", "attention")
BOUNDED_ATTENTION = ("sliding_attention", "chunked_attention")
TOP = 5
# Another method: of (layer, settled logical length, keys, values, queries), which are those of the
# settled tokens behind the prefix and of the window, the indices int64 [heads, budget] to keep.
Keep = Callable[[int, int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# A cache that rounds: of (layer, keys, values) what attention reads of them.
Store = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Compaction(NamedTuple):
    """One compaction: the step it followed, the settled length before it, the tokens evicted.

    Those of a prompt follow the step that its prefill ends with.

    `step` counts forward passes since the start of the text: 0 is the prefill and samples the first
    output token, step k computes output token k (counted from 1) and samples the next one.
    """

    step: int
    settled_len: int
    evicted: int


@dataclass
class ReferenceResult:
    """What one request produced.

    Attributes:
        token_ids: output tokens, one per step.
        logprobs: log-probability of each output token.
        top_ids: `[num_tokens, TOP]` int64, the most likely tokens of each step, likeliest first.
        top_logprobs: `[num_tokens, TOP]` float32, their log-probabilities.
        compactions: in the order they happened.
        physical_lens: tokens in the cache after each step, its compaction included.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None
    compactions: list[Compaction] = field(default_factory=list)
    physical_lens: list[int] = field(default_factory=list)


class LayerCache:
    """Keys and values `[num_kv_heads, n, head_dim]` of one layer, queries of its latest tokens.

    Attributes:
        scale: of the layer's logits; None until it has attended.
        soft_cap: of the same, 0 = none.
    """

    def __init__(self, layer: int, num_queries: int, store: Callable | None = None) -> None:
        self.scale: float | None = None
        self.soft_cap = 0.0
        self.layer = layer
        self.num_queries = num_queries
        self.store = store
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.queries: torch.Tensor | None = None

    def append(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Adds the tokens of one forward pass.

        Args:
            queries: `[num_heads, t, head_dim]` after RoPE.
            keys: `[num_kv_heads, t, head_dim]` after RoPE.
            values: `[num_kv_heads, t, head_dim]`.
        """
        if self.store is not None:
            keys, values = self.store(keys, values)
        if self.keys is not None:
            queries = torch.cat((self.queries, queries), dim=1)
            keys = torch.cat((self.keys, keys), dim=1)
            values = torch.cat((self.values, values), dim=1)
        self.queries = queries[:, -self.num_queries :]
        self.keys, self.values = keys, values

    def evict(
        self,
        settled_len: int,
        config: ServerOptions,
        prefix_len: int = 0,
        keep: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """Shrinks the settled tokens behind the prefix to the budget; all others stay.

        Args:
            settled_len: physical tokens that are judged or protected.
            config: what to keep.
            prefix_len: protected tokens.
            keep: a `Keep` of this layer, None for R-KV.
        """
        behind = self.keys.shape[1] - settled_len
        end = self.queries.shape[1] - behind
        keys, values = (part[:, prefix_len:settled_len] for part in (self.keys, self.values))
        queries = self.queries[:, end - config.window : end]
        if keep is None:
            kept = keep_indices(
                keys,
                queries,
                config.budget,
                window=config.window,
                lam=config.method_options.lam,
                pool=config.method_options.pool,
                threshold=config.method_options.threshold,
                center=config.method_options.center,
                defensive=config.method_options.defensive,
                scale=self.scale,
                soft_cap=self.soft_cap,
            )
        else:
            kept = keep(keys, values, queries)
        kept = prefix_len + kept
        self.keys = _survivors(self.keys, prefix_len, kept, settled_len)
        self.values = _survivors(self.values, prefix_len, kept, settled_len)


class StateCache(DynamicCache):
    """The states of recurrent layers; keys and values of the others are kept by `LayerCache`."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hands back the new tokens alone."""
        return key_states, value_states


def _survivors(
    cached: torch.Tensor, prefix_len: int, kept: torch.Tensor, settled_len: int
) -> torch.Tensor:
    """Of `cached [heads, n, d]` the prefix, each head's `kept [heads, budget]`, the unsettled."""
    index = kept.unsqueeze(-1).expand(-1, -1, cached.shape[-1])
    parts = (cached[:, :prefix_len], cached.gather(1, index), cached[:, settled_len:])
    return torch.cat(parts, dim=1)


def _explicit_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    layer_caches: list[LayerCache],
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Lets the newest tokens attend to all cached ones of their layer, causally among themselves.

    Registered with transformers, which passes `query [1, num_heads, t, d]` and `key`, `value
    [1, num_kv_heads, t, d]` after RoPE; `layer_caches` is a keyword argument of the model's call.
    `softcap` bounds the logits, `s_aux [num_heads]` are the logits of sinks, which have no value.
    """
    cache = layer_caches[module.layer_idx]
    # Others read it.
    if cache.layer == module.layer_idx:
        cache.scale, cache.soft_cap = scaling, softcap or 0.0
        cache.append(query[0], key[0], value[0])
    num_heads, num_new, head_dim = query.shape[1:]
    num_kv_heads, num_cached = cache.keys.shape[:2]
    grouped = query[0].reshape(num_kv_heads, num_heads // num_kv_heads, num_new, head_dim)
    logits = grouped @ cache.keys.unsqueeze(1).transpose(-1, -2) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    visible = _visible(module, num_new, num_cached)
    logits = logits.float().masked_fill(~visible, float("-inf"))
    if s_aux is not None:
        sinks = s_aux.float().reshape(num_kv_heads, -1, 1, 1).expand(-1, -1, num_new, 1)
        logits = torch.cat([logits, sinks], dim=-1)
    weights = logits.softmax(-1)[..., :num_cached]
    output = weights.to(query.dtype) @ cache.values.unsqueeze(1)
    return output.reshape(1, num_heads, num_new, head_dim).transpose(1, 2), None


def _is_full(model: PreTrainedModel, layer: int) -> bool:
    """Whether a layer attends to every token."""
    layer_types = getattr(model.config, "layer_types", None)
    return layer_types is None or layer_types[layer] in FULL_ATTENTION


def _owners(model: PreTrainedModel) -> dict[int, int]:
    """The layers that by design read the cache of the last layer of their kind that has one."""
    num_readers = getattr(model.config, "num_kv_shared_layers", None) or 0
    layer_types = getattr(model.config, "layer_types", None) or ()
    first = len(layer_types) - num_readers
    return {
        reader: max(i for i in range(first) if layer_types[i] == layer_types[reader])
        for reader in range(first, len(layer_types))
    }


def _visible(module: torch.nn.Module, num_new: int, num_cached: int) -> torch.Tensor:
    """Bool [num_new, num_cached]: the cached tokens of its layer that each new one sees.

    The cache of a layer with a window or chunks is never trimmed here, only not seen.
    """
    causal = torch.ones(num_new, num_cached, dtype=torch.bool).tril(num_cached - num_new)
    config = module.config
    layer_types = getattr(config, "layer_types", None)
    layer_type = None if layer_types is None else layer_types[module.layer_idx]
    if layer_type == "sliding_attention":
        # Command-R7B's windows have one token more than they say.
        window = config.sliding_window + (config.model_type == "cohere2")
        return causal & causal.triu(num_cached - num_new - window + 1)
    if layer_type == "chunked_attention":
        chunk = torch.arange(num_cached) // config.attention_chunk_size
        return causal & (chunk[num_cached - num_new :, None] == chunk)
    return causal


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _explicit_attention)


@lru_cache(maxsize=4)
def load_model(model_dir: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Loads a model that attends through this module's caches; the latest four stay loaded."""
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=dtype, attn_implementation=ATTENTION_NAME
    )
    return model.eval()


@contextmanager
def single_thread() -> Iterator[None]:
    """Computes on one thread: for matrices this small, waiting for other threads costs more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class ReferenceRequest:
    """One request: its caches, its lengths and the rule when it is compacted."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: ServerOptions | None,
        unprocessed_steps: int = 0,
        prefix_len: int = 0,
        keep: Keep | None = None,
        compacted_at: Collection[int] | None = None,
        store: Store | None = None,
        owners: Mapping[int, int] | None = None,
    ) -> None:
        self.compacted_at = compacted_at
        self.store = store
        # Of layers that read another layer's cache.
        self.owners = owners or _owners(model)
        self.model = model
        self.config = config
        self.keep = keep
        # First tokens that are neither judged nor counted against the budget.
        self.prefix_len = prefix_len
        self.unprocessed_steps = unprocessed_steps
        self.restart()

    def restart(self) -> None:
        """Forgets the cache and the counter: the next forward is a prefill."""
        num_queries = 1
        if self.config is not None:
            num_queries = self.config.window + 1 + self.unprocessed_steps
        num_layers = self.model.config.num_hidden_layers
        self.layer_caches = [
            LayerCache(layer, num_queries, self.store and partial(self.store, layer))
            for layer in range(num_layers)
        ]
        for reader, owner in self.owners.items():
            self.layer_caches[reader] = self.layer_caches[owner]
        layer_types = getattr(self.model.config, "layer_types", None) or ()
        has_states = not {*FULL_ATTENTION, *BOUNDED_ATTENTION}.issuperset(layer_types)
        self.states = StateCache(config=self.model.config) if has_states else None
        self.logical_len = 0
        self.physical_len = 0
        # Physical length from which decoded tokens count towards the next compaction.
        self.counted_from = 0
        # Settled physical lengths at which this prefill was compacted.
        self.prompt_compactions: list[int] = []

    @torch.inference_mode()
    def forward(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Computes `token_ids` behind the cached text; returns log-probabilities `[vocab]`."""
        positions = torch.arange(self.logical_len, self.logical_len + len(token_ids))
        logits = self.model(
            input_ids=torch.tensor([list(token_ids)]),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            past_key_values=self.states,
            logits_to_keep=1,
            layer_caches=self.layer_caches,
        ).logits
        self.logical_len += len(token_ids)
        self.physical_len += len(token_ids)
        return logits[0, -1].float().log_softmax(-1)

    def prefill(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Caches a text, whole or (SPEC 6) chunk by chunk; returns log-probabilities `[vocab]`."""
        self.restart()
        done = 0
        if self._compresses(len(token_ids)):
            chunk, kept = self.config.prompt_chunk, self.prefix_len + self.config.budget
            while done + chunk < len(token_ids):
                self.forward(token_ids[done : done + chunk])
                done += chunk
                if self.physical_len > kept:
                    self.prompt_compactions.append(self.physical_len)
                    self._evict(self.physical_len, self.logical_len)
        logprobs = self.forward(token_ids[done:])
        self.counted_from = self.physical_len
        return logprobs

    def _compresses(self, prefill_len: int) -> bool:
        if self.config is None or not self.config.compress_prompt:
            return False
        return prefill_len > self.prefix_len + self.config.budget + self.config.prompt_chunk

    @torch.inference_mode()
    def _evict(self, settled_len: int, settled_logical_len: int) -> None:
        for layer, cache in enumerate(self.layer_caches):
            if layer in self.owners or not _is_full(self.model, layer):
                continue
            keep = self.keep and partial(self.keep, layer, settled_logical_len)
            cache.evict(settled_len, self.config, self.prefix_len, keep)
        self.physical_len -= settled_len - self.prefix_len - self.config.budget

    def decode(self, token_id: int) -> tuple[torch.Tensor, int | None]:
        """Computes one token and compacts when it was due at the start of the step.

        Returns:
            Log-probabilities `[vocab]`; the settled length before a compaction, None without one.
        """
        settled_len = self.physical_len - self.unprocessed_steps
        settled_logical_len = self.logical_len - self.unprocessed_steps
        logprobs = self.forward([token_id])
        if not self._is_due(settled_len, settled_logical_len):
            return logprobs, None
        self._evict(settled_len, settled_logical_len)
        self.counted_from = self.prefix_len + self.config.budget
        return logprobs, settled_len

    def _is_due(self, settled_len: int, settled_logical_len: int) -> bool:
        if self.config is None:
            return False
        if self.compacted_at is not None:
            return settled_logical_len in self.compacted_at
        decoded = settled_len - self.counted_from
        config = self.config
        due_at = self.prefix_len + config.budget + config.buffer
        return settled_len >= due_at and decoded >= config.buffer


@single_thread()
def generate_reference(
    model_dir: str | Path,
    prompt_ids: Sequence[int],
    num_tokens: int,
    config: ServerOptions | None,
    *,
    dtype: torch.dtype = torch.float32,
    forced_ids: Sequence[int] | None = None,
    recompute_at: int | Sequence[int] = (),
    unprocessed_steps: int = 0,
    keep: Keep | None = None,
    compacted_at: Collection[int] | None = None,
    store: Store | None = None,
    owners: Mapping[int, int] | None = None,
) -> ReferenceResult:
    """Generates greedily for one request with explicit eviction.

    Args:
        model_dir: folder of a model that transformers can load.
        prompt_ids: tokens of the prompt.
        num_tokens: output tokens, which is also the number of steps: the last token is sampled and
            never computed.
        config: what to keep and when to compact; None never compacts.
        dtype: of weights and cache.
        forced_ids: output tokens to take instead of the likeliest, at least `num_tokens`; the
            log-probabilities are theirs.
        recompute_at: preemptions after that many output tokens: the cache is lost, prompt and
            output so far are prefilled together and the rules start afresh.
        unprocessed_steps: earlier steps whose output the scheduler has not processed when it
            schedules the next one: 0 with synchronous, 1 with asynchronous scheduling. Their tokens
            are not settled.
        keep: chooses what to keep, None for R-KV.
        compacted_at: settled logical lengths at which it is compacted while it decodes, instead of
            by the rule of `config`.
        store: how the cache rounds, None for one that does not.
        owners: by number of a layer that reads another layer's cache, the number of that one; None
            for those that read one by design.

    Returns:
        Tokens, log-probabilities, compactions and physical lengths. A compaction due in the very
        last step is listed, though it changes no output and an engine may skip it.

    Raises:
        ValueError: `forced_ids` is too short or `recompute_at` is not inside the text.
    """
    if forced_ids is not None and len(forced_ids) < num_tokens:
        raise ValueError(
            f"forced_ids has {len(forced_ids)} tokens, num_tokens is {num_tokens}; pass as many"
        )
    restarts = {recompute_at} if isinstance(recompute_at, int) else set(recompute_at)
    if not all(1 <= restart < num_tokens for restart in restarts):
        raise ValueError(
            f"recompute_at {recompute_at} is not in 1..{num_tokens - 1}; pass an output length "
            "that another token follows"
        )
    prefix_len = 0
    if config is not None and config.protect != "none":
        prefix_len = len(prompt_ids) if config.protect == "prompt" else config.protect
    model = load_model(Path(model_dir), dtype)
    request = ReferenceRequest(
        model, config, unprocessed_steps, prefix_len, keep, compacted_at, store, owners
    )
    result = ReferenceResult()
    tops = []
    for step in range(num_tokens):
        if step == 0 or step in restarts:
            logprobs = request.prefill([*prompt_ids, *result.token_ids])
            for settled_len in request.prompt_compactions:
                evicted = settled_len - prefix_len - config.budget
                result.compactions.append(Compaction(step, settled_len, evicted))
        else:
            logprobs, settled_len = request.decode(result.token_ids[-1])
            if settled_len is not None:
                evicted = settled_len - prefix_len - config.budget
                result.compactions.append(Compaction(step, settled_len, evicted))
        token_id = int(logprobs.argmax()) if forced_ids is None else int(forced_ids[step])
        result.token_ids.append(token_id)
        result.logprobs.append(float(logprobs[token_id]))
        result.physical_lens.append(request.physical_len)
        tops.append(logprobs.topk(TOP))
    result.top_ids = torch.stack([top.indices for top in tops])
    result.top_logprobs = torch.stack([top.values for top in tops])
    return result
