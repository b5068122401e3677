"""How many pairs of keys the search for the newest similar key looks at, counted without timing."""

import torch
from torch import Tensor

# (rows, columns) of a tile: those of csrc/cpu/rkv.cpp and of kernels/rkv/triton.py.
TILES = {"cpu": (4, 32), "triton": (64, 64)}
_ROWS_AT_ONCE = 512
_NORM_EPSILON = 1e-8


def similar_and_newest(keys: Tensor, threshold: float = 0.5) -> tuple[float, Tensor]:
    """Look at all pairs of one head.

    Args:
        keys: [n, head_size].
        threshold: cosine above which two keys count as similar.

    Returns:
        The share of pairs that are similar, and int64 [n]: the newest other key that is similar
        to each key, -1 without any.
    """
    keys = keys.float()
    unit = keys / (keys.norm(dim=-1, keepdim=True) + _NORM_EPSILON)
    n = len(unit)
    columns = torch.arange(n, device=keys.device)
    newest, num_similar = [], 0
    for first in range(0, n, _ROWS_AT_ONCE):
        rows = unit[first : first + _ROWS_AT_ONCE]
        similar = rows @ unit.T > threshold
        similar[torch.arange(len(rows)), first + torch.arange(len(rows))] = False
        num_similar += int(similar.sum())
        newest.append(torch.where(similar, columns, -1).amax(dim=1))
    return num_similar / max(n * (n - 1), 1), torch.cat(newest)


def share_visited(newest: Tensor, rows: int, columns: int) -> float:
    """Share of all pairs that a search in tiles visits before its last row is served.

    Args:
        newest: as `similar_and_newest` returns it.
        rows: keys that are served together; they stop together.
        columns: keys per step, from the newest backwards.
    """
    n = len(newest)
    # A row without a similar key goes all the way to key 0.
    farthest = torch.stack([part.min() for part in newest.clamp(min=0).split(rows)])
    steps = (n - farthest + columns - 1) // columns
    visited = (steps * columns).clamp(max=n)
    sizes = torch.tensor([len(part) for part in newest.split(rows)], device=newest.device)
    return float((visited * sizes).sum()) / n**2
