"""The part of `rkv-vllm calibrate` that looks for layers which can read another layer's cache.

Shows progress and refuses what cannot be; the search itself stands in
`rkv_vllm/calibrate/kvsharer.py`. Imports torch, so import it late.
"""

from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from rkv_vllm.calibrate import forward, kvsharer
from rkv_vllm.cli.errors import REFUSED, CommandError
from rkv_vllm.cli.progress import progress


class Sharing(NamedTuple):
    """What was found.

    Attributes:
        owners: by number of a layer that reads another layer's cache, the number of that one.
        similarity: mean cosine between the model's last hidden states with it and without.
    """

    owners: dict[int, int]
    similarity: float


def most_readers(readers: int | None, num_layers: int) -> int:
    """Returns how many layers shall read another layer's cache, at most.

    Args:
        readers: as given; None for a quarter.
        num_layers: of the model.

    Raises:
        CommandError: too many.
    """
    if readers is None:
        return max(1, num_layers // 4)
    if readers > num_layers // 2:
        raise CommandError(
            f"--readers: got {readers} of {num_layers} layers, wanted at most {num_layers // 2}; "
            "lower it"
        )
    return readers


def find_sharing(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    context: int,
    hidden: Tensor,
    caches: kvsharer.CacheSums,
    readers: int,
    least_similarity: float,
) -> Sharing:
    """Search, with a bar.

    Args:
        model: made by `forward.load_model`.
        token_ids: of the text.
        context: tokens of a piece, at most.
        hidden: what `forward.read` returned for it.
        caches: looked on while it did.
        readers: layers that shall read another layer's cache, at most.
        least_similarity: below which a pair is not taken.

    Raises:
        CommandError: no pair was taken.
    """
    num_layers = model.config.num_hidden_layers
    numbers = count(1)
    with progress("Trying", num_layers * (num_layers - 1) // 2, "pairs at most") as move:

        def similarity(owners: dict[int, int]) -> float:
            tried = forward.read(model, token_ids, context, [], owners)
            move(next(numbers))
            return kvsharer.mean_cosine(hidden, tried)

        distances = caches.distances()
        owners = kvsharer.choose_owners(distances, readers, similarity, least_similarity)
        if not owners:
            raise CommandError(
                f"--least-similarity: got {least_similarity}, which no pair of layers reaches, "
                "wanted less; lower it or serve this model without shared caches",
                REFUSED,
            )
        return Sharing(owners, similarity(owners))
