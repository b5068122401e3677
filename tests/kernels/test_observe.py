"""Every version of observe: a token is recorded where its row says, or nowhere."""

import pytest
import torch

from rkv_vllm.kernels.native import library
from rkv_vllm.kernels.observe.cpu import observe_cpu
from rkv_vllm.kernels.observe.naive import observe_naive
from rkv_vllm.kernels.observe.triton import observe_triton

SEATS, LAYERS, RING = 3, 2, 5
VERSIONS = {"naive": observe_naive, "cpp": observe_cpu, "triton": observe_triton}


def expected_ring(ring, layer_idx, query, rows):
    expected = ring.clone()
    for token, row in enumerate(rows.tolist()[: query.shape[0]]):
        if row >= 0:
            expected[row // RING, layer_idx, row % RING] = query[token].to(ring.dtype)
    return expected


def token_rows(num_tokens: int, seed: int) -> torch.Tensor:
    """Distinct rows for some tokens, -1 for the others and for what lies behind the step."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(SEATS * RING, generator=generator).int()
    rows = torch.full((num_tokens + 3,), -1, dtype=torch.int32)
    watched = torch.randperm(num_tokens, generator=generator)[: num_tokens // 2 + 1]
    watched = watched[: places.shape[0]]
    rows[watched] = places[: watched.shape[0]]
    return rows


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_tokens", "heads", "size"), [(1, 1, 32), (7, 6, 80), (63, 9, 128)])
def test_watched_tokens_and_no_others_are_recorded(version, dtype, num_tokens, heads, size):
    assert library() is not None
    generator = torch.Generator().manual_seed(num_tokens)
    fused = torch.randn(num_tokens, 3, heads, size, generator=generator).to(dtype)
    query = fused[:, 1]  # strided as a slice of a fused projection
    ring = torch.full((SEATS, LAYERS, RING, heads, size), float("nan"), dtype=dtype)
    rows = token_rows(num_tokens, seed=num_tokens)
    expected = expected_ring(ring, 1, query, rows)
    assert not expected[:, 1].isnan().all()
    VERSIONS[version](ring, 1, query, rows)
    torch.testing.assert_close(ring, expected, rtol=0, atol=0, equal_nan=True)


# Triton's interpreter cuts where a GPU rounds.
@pytest.mark.parametrize("version", ["naive", "cpp"])
def test_a_query_of_another_dtype_is_rounded(version):
    ring = torch.zeros(SEATS, LAYERS, RING, 2, 32, dtype=torch.bfloat16)
    query = torch.randn(1, 2, 32)
    VERSIONS[version](ring, 0, query, torch.tensor([7], dtype=torch.int32))
    assert ring[1, 0, 2].equal(query[0].bfloat16())


@pytest.mark.parametrize("version", VERSIONS)
def test_an_empty_step_records_nothing(version):
    ring = torch.full((SEATS, LAYERS, RING, 2, 32), float("nan"))
    rows = torch.tensor([4], dtype=torch.int32)
    VERSIONS[version](ring, 0, torch.randn(0, 2, 32), rows)
    assert ring.isnan().all()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("layer", "shape", "rows"),
    [(2, (4, 2, 32), 4), (0, (4, 3, 32), 4), (0, (4, 2, 16), 4), (0, (4, 2, 32), 3)],
    ids=["layer", "heads", "head_size", "rows"],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(version, layer, shape, rows):
    ring = torch.full((SEATS, LAYERS, RING, 2, 32), float("nan"))
    with pytest.raises(ValueError, match="observe: expected ring"):
        VERSIONS[version](ring, layer, torch.randn(shape), torch.zeros(rows, dtype=torch.int32))
    assert ring.isnan().all()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("num_scales", [1, 3])
@pytest.mark.parametrize("ring_dtype", [torch.float32, torch.bfloat16])
def test_fp8_queries_are_recorded_as_the_numbers_they_stand_for(
    version, dtype, num_scales, ring_dtype
):
    """Six query heads of three KV heads: neighbours share a factor."""
    if version == "triton" and ring_dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts where a GPU rounds")
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(7, 6, 32, generator=generator).to(dtype)
    scale = torch.tensor([0.3, 1.7, 0.05])[:num_scales]
    ring = torch.full((SEATS, LAYERS, RING, 6, 32), float("nan"), dtype=ring_dtype)
    rows = token_rows(7, seed=7)
    of_heads = scale.repeat_interleave(6 // num_scales).view(-1, 1)
    expected = expected_ring(ring, 1, query.float() * of_heads, rows)
    VERSIONS[version](ring, 1, query, rows, scale)
    torch.testing.assert_close(ring, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_factor_comes_with_fp8_queries_and_fits_their_heads(version):
    ring = torch.zeros(SEATS, LAYERS, RING, 6, 32)
    rows, query = token_rows(3, seed=1), torch.randn(3, 6, 32).to(torch.float8_e4m3fn)
    for wrong_query, scale in ((query, None), (query.half(), torch.ones(1))):
        with pytest.raises(ValueError, match="expected a query_scale with queries of"):
            VERSIONS[version](ring, 0, wrong_query, rows, scale)
    for scale in (torch.ones(4), torch.ones(1).half(), torch.ones(4)[::2]):
        with pytest.raises(ValueError, match="expected query_scale float32 on cpu, contiguous"):
            VERSIONS[version](ring, 0, query, rows, scale)
