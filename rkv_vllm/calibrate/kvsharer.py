"""Which layers can do with another layer's KV cache: the search behind `--share-layers`.

While a model reads a text, every layer's keys and values are summed up over its pieces. Pairs of
layers are then tried in the order of how far apart these lie, the most distant first: the later
layer of a pair reads the cache of the earlier one, in addition to the pairs taken before, and the
text is read again. Where the model's last hidden states stay similar enough to those it had, the
pair is taken; until enough layers share.

Source: KVSharer: Efficient Inference via Layer-Wise Dissimilar KV Cache Sharing (arXiv:2410.18517),
section 3, which finds that dissimilar caches replace each other better than similar ones. Next:
rkv_vllm/cache_owners.py, which reads the file.
"""

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor


class CacheSums:
    """Sums of all layers' keys and values over the pieces of a text; an observer of `forward.read`.

    Args:
        num_layers: of the model.
    """

    def __init__(self, num_layers: int) -> None:
        self._sums: list[list[Tensor]] = [[] for _ in range(num_layers)]

    def observe(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, output: Tensor
    ) -> None:
        """Add a piece of text. See `AttentionObserver`."""
        states = [key.float().cpu(), value.float().cpu()]
        if not self._sums[layer]:
            self._sums[layer] = states
            return
        for total, added in zip(self._sums[layer], states, strict=True):
            # The last piece may be a short one.
            total[:, : added.shape[1]] += added

    def distances(self) -> Tensor:
        """Returns the Euclidean distances between layers' caches, [num_layers, num_layers]."""
        caches = [torch.cat([part.flatten() for part in sums]) for sums in self._sums]
        distances = torch.zeros(len(caches), len(caches))
        for i, j in combinations(range(len(caches)), 2):
            distances[i, j] = distances[j, i] = torch.dist(caches[i], caches[j])
        return distances


def choose_owners(
    distances: Tensor,
    count: int,
    similarity: Callable[[dict[int, int]], float],
    threshold: float,
) -> dict[int, int]:
    """Choose the layers that read another layer's cache.

    Args:
        distances: between the layers' caches, [num_layers, num_layers].
        count: layers that shall read another one's cache, at most.
        similarity: of the model's last hidden states, to those it has by itself, when the layers
            named read the caches named: at most 1.
        threshold: least similarity at which a pair is taken.

    Returns:
        By number of a reader, the number of the owner; as many as were found.
    """
    pairs = sorted(combinations(range(len(distances)), 2), key=lambda pair: -distances[pair])
    owners: dict[int, int] = {}
    for owner, reader in pairs:
        if len(owners) == count:
            break
        # An owner keeps its own cache, and a reader has one owner.
        if reader in owners or owner in owners or reader in owners.values():
            continue
        tried = {**owners, reader: owner}
        if similarity(tried) >= threshold:
            owners = tried
    return owners


def mean_cosine(states: Tensor, others: Tensor) -> float:
    """Mean over tokens of the cosine between hidden states, both [num_tokens, hidden size]."""
    return torch.cosine_similarity(states.float(), others.float(), dim=-1).mean().item()
