"""How many pairs of keys the search for the newest similar key looks at, counted without timing."""

from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """How a search goes through the pairs.

    Attributes:
        rows: keys that are served together; they stop together.
        columns: keys per step, from the newest backwards; steps end at multiples of it.
    """

    rows: int
    columns: int


# Those of csrc/cpu/rkv.cpp and of kernels/rkv/triton/; tests/kernels/test_early_stop.py compares.
TILES = {"cpu": Tile(4, 32), "triton": Tile(64, 64)}
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


def tiles_visited(newest: Tensor, tile: Tile, lead: int = 0) -> Tensor:
    """Steps that a search takes for each group of rows before its last row is served.

    Args:
        newest: as `similar_and_newest` returns it.
        tile: how the search goes.
        lead: places before key 0 in the first group of rows and in the last step.

    Returns:
        int64 [groups of rows].
    """
    # A row without a similar key goes all the way to key 0.
    newest = lead + newest.clamp(min=0)
    newest = torch.cat([newest.new_full((lead,), newest.max()), newest])
    n = len(newest)
    farthest = torch.stack([part.min() for part in newest.split(tile.rows)])
    return (n - 1) // tile.columns - farthest // tile.columns + 1


def share_visited(newest: Tensor, tile: Tile) -> float:
    """Share of all pairs that a search in tiles visits before its last row is served."""
    n = len(newest)
    # The newest tile is not full.
    start = n % tile.columns - tile.columns if n % tile.columns else 0
    visited = (start + tiles_visited(newest, tile) * tile.columns).clamp(max=n)
    sizes = torch.tensor([len(part) for part in newest.split(tile.rows)], device=newest.device)
    return float((visited * sizes).sum()) / n**2
