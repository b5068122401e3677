"""The search for the newest similar key stops as soon as a tile of rows is served, and no sooner.

What it finds does not show where it stopped, so these tests count the tiles that the kernels
themselves look at and compare with the model of benchmarks/pairs_visited.py.
"""

import pytest
import torch

from benchmarks.pairs_visited import TILES, similar_and_newest, tiles_visited
from rkv_vllm.kernels.rkv.cpu import redundancy_cpu
from rkv_vllm.kernels.rkv.triton import redundancy_triton, search
from tests.kernels.cases import BLOCK_SIZE, Case, new_case


def tiles_of_cpu(case: Case, center: bool, monkeypatch) -> int:
    count = torch.zeros(1, dtype=torch.int64)
    redundancy_cpu(case.states, case.batch, threshold=0.5, center=center, num_tiles=count)
    return int(count)


def tiles_of_triton(case: Case, center: bool, monkeypatch) -> int:
    products = []
    product = search.product

    def counted(*args):
        products.append(args)
        return product(*args)

    monkeypatch.setattr(search, "product", counted)
    redundancy_triton(case.states, case.batch, threshold=0.5, center=center)
    return len(products)


VERSIONS = {"cpu": tiles_of_cpu, "triton": tiles_of_triton}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("similar", "opposite", "center", "most"),
    [(1.2, 0.0, False, 0.5), (0.0, 0.0, False, 1.0), (1.2, 0.0, True, 1.0), (5.0, 1.2, True, 0.5)],
    ids=["similar keys", "hardly any", "centred: hardly any", "centred: two halves"],
)
def test_as_many_tiles_are_looked_at_as_the_newest_similar_keys_ask_for(
    version, similar, opposite, center, most, monkeypatch
):
    lengths = [(200, 200, 60), (333, 335, 60, 60)]
    case = new_case(lengths, similar=similar, num_layers=1, num_heads=2, seed=1)
    expected, all_tiles = 0, 0
    tile = TILES[version]
    for eviction, dense in zip(case.batch.evictions, case.dense, strict=True):
        n = eviction.num_judged
        # Triton's tiles begin where blocks do.
        lead = eviction.prefix_len % BLOCK_SIZE if version == "triton" else 0
        # Every other token on the other side of the mean.
        dense[:, :, ::2] += opposite
        dense[:, :, 1::2] -= opposite
        case.states.write(torch.tensor(eviction.old_block_ids), dense)
        for keys in dense[0, :, eviction.prefix_len : eviction.settled_len]:
            _, newest = similar_and_newest(keys - keys.mean(dim=0) if center else keys)
            expected += int(tiles_visited(newest, tile, lead).sum())
            all_tiles += -(-(n + lead) // tile.rows) * -(-(n + lead) // tile.columns)
    assert 0 < expected <= most * all_tiles
    assert VERSIONS[version](case, center, monkeypatch) == expected
