"""Means of a model's queries before RoPE, gathered while it reads. Next: triattention.py."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rkv_vllm.methods.query_statistics import QueryStatistics


class QuerySums:
    """Sums over tokens, by layer, query head and frequency; an observer of `forward.read`.

    Args:
        model: a Llama-like decoder with one `rotary_emb`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        self._rotary = model.rotary_emb
        self._num_kv_heads = config.num_key_value_heads
        num_frequencies = self._rotary.inv_freq.shape[0]
        shape = (config.num_hidden_layers, config.num_attention_heads, num_frequencies)
        self._queries = torch.zeros(shape, dtype=torch.complex128)
        self._magnitudes = torch.zeros(shape, dtype=torch.float64)
        self._num_tokens = torch.zeros(config.num_hidden_layers, dtype=torch.int64)

    def observe(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, output: Tensor
    ) -> None:
        """Add the queries of a piece of text. See `AttentionObserver`."""
        before = self._before_rope(query)
        self._queries[layer] += before.sum(dim=1).cpu()
        self._magnitudes[layer] += before.abs().sum(dim=1).cpu()
        self._num_tokens[layer] += query.shape[1]

    def _before_rope(self, query: Tensor) -> Tensor:
        """Turn queries back, in float32: complex64 [query heads, n, frequencies]."""
        num_tokens = query.shape[1]
        positions = torch.arange(num_tokens, device=query.device)[None]
        like = torch.empty(0, dtype=torch.float32, device=query.device)
        cosine, sine = (turn[0].chunk(2, dim=-1)[0] for turn in self._rotary(like, positions))
        # Scaled RoPE may stretch queries as well as turn them; a division undoes both.
        return torch.complex(*query.float().chunk(2, dim=-1)) / torch.complex(cosine, sine)

    def statistics(self, name: str) -> QueryStatistics:
        """Returns the means.

        Args:
            name: of the model.
        """
        count = self._num_tokens[:, None, None]
        mean = self._queries / count
        return QueryStatistics(
            model=name,
            num_kv_heads=self._num_kv_heads,
            num_tokens=int(self._num_tokens[0]),
            inv_freq=self._rotary.inv_freq.float().cpu(),
            mean_query=torch.cat([mean.real, mean.imag], dim=-1).float(),
            mean_magnitude=(self._magnitudes / count).float(),
        )
