"""The optimized split kernel against the definition. It sees all N² sums, so even rounding ties must agree."""

import pytest
import torch
import triton
from cases import (
    DTYPES,
    INF,
    ON_GPU,
    adversarial_logits,
    configurations,
    factors,
    far_apart_logits,
    mixed_layouts,
    only,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_kernels import brute_force_router, get_arch, get_device
from omni_kernels.configs import candidates
from omni_kernels.split_forward import MAX_EXPERTS_PER_TOKEN, padded_count, split_forward, split_forward_kernel

FP32, FP16, BF16 = DTYPES
CASES = [
    (1, 1, FP32), (2, 4, BF16), (3, 9, FP32), (7, 16, BF16), (33, 2, FP32), (64, 5, BF16), (100, 16, FP32),
    (128, 1, FP16), (128, 16, BF16), (40, 31, FP16), (130, 5, FP32),
]  # fmt: skip
if ON_GPU:
    CASES += [(n, k, dtype) for n in (130, 200, 256, 1000) for k, dtype in zip((5, 31, 64), DTYPES, strict=True)]
# A GPU tunes for every problem.
SMALL_SIZES, SMALL_COUNTS = ([3], [4]) if ON_GPU else ([2, 3, 7], [1, 3, 4])
LARGEST_TILES = 130 if ON_GPU else 40  # the N for which none is dropped; too slow in the interpreter
CONFIGS = configurations(candidates(get_arch(get_device()), "fwd_split"), "fwd_split", 64, LARGEST_TILES, 5)


def assert_is_definition(x, y, k):
    torch.testing.assert_close(split_forward(x, y, k), brute_force_router(x, y, k), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("num_expert_sqrt", "k", "dtype"), CASES, ids=str)
def test_every_kind_of_token(num_expert_sqrt, k, dtype, device):
    every = 1 if ON_GPU or num_expert_sqrt < 40 else 2  # the interpreter is slow, and smaller rows are of all kinds
    x, y = (part[::every] for part in adversarial_logits(num_expert_sqrt, dtype, device, seed=k))
    assert_is_definition(x, y, k)


@given(factors(sizes=st.sampled_from(SMALL_SIZES), max_tokens=5), st.sampled_from(SMALL_COUNTS))
@settings(max_examples=300 if ON_GPU else 10)
def test_any_floats(device, logits, k):
    assert_is_definition(*(part.to(device) for part in logits), k)


@pytest.mark.parametrize("k", [100, MAX_EXPERTS_PER_TOKEN])
def test_many_experts(k, device):
    x, y = torch.randint(-2, 3, (2, 3, 130), device=device).half()
    assert_is_definition(x, y, k)


def assert_is_definition_in_tiles(x, y, k, tile_n):
    (num_tokens, n), device = x.shape, x.device
    scores = torch.empty(num_tokens, k, device=device)
    indices = torch.empty(num_tokens, k, dtype=torch.int32, device=device)
    sizes = {"TILE_M": 4, "TILE_N": tile_n, "TILE_K": padded_count(k), "PADDED_SQRT": triton.next_power_of_2(n)}
    grid = (triton.cdiv(num_tokens, 4),)
    split_forward_kernel[grid](x, y, scores, indices, *x.stride(), *y.stride(), num_tokens, n, k, 32, **sizes)
    want = brute_force_router(x, y, k)
    torch.testing.assert_close((scores, indices), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("tile_n", [16, 256, 1024])
def test_any_tile(tile_n, device):
    """Strips of one row, of several and of all; rows searched in pieces and at once."""
    x, y = (part[::5] for part in adversarial_logits(50, FP32, device))
    assert_is_definition_in_tiles(x, y, 7, tile_n)


@given(factors(sizes=st.sampled_from([3, 6]), max_tokens=5, dtypes=(FP32,)), st.sampled_from([1, 4, 9]))
@settings(max_examples=100 if ON_GPU else 15)
def test_any_floats_in_small_tiles(device, logits, k):
    assert_is_definition_in_tiles(*(part.to(device) for part in logits), k, 8)


@pytest.mark.parametrize("k", [30, 81])
def test_rows_full_of_ties(k, device):
    """Equal sums in many rows and many times in a row; strips begin and end among them."""
    x, y = torch.randint(-1, 2, (2, 6, 9), device=device).float()
    x[3:, ::2] = -INF
    y[4:, 1:] = y[4:, :1]
    assert_is_definition_in_tiles(x, y, k, 32)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter needs minutes for so many sums")
def test_long_rows(device):
    """Every row has better experts than the one before, and is longer than the widest tile."""
    n = (1 << 14) + 100
    x = torch.arange(n, device=device).float()[None]
    scores, indices = split_forward(x, x, 3)
    assert scores.tolist() == [[2 * n - 2, 2 * n - 3, 2 * n - 3]]
    assert indices.tolist() == [[n**2 - 1, (n - 2) * n + n - 1, (n - 1) * n + n - 2]]


def test_layout_does_not_matter(device):
    x, y = adversarial_logits(5, BF16, device)
    for views in mixed_layouts(x, y):
        assert_is_definition(*views, 3)


@pytest.mark.parametrize("num_tokens", [1, 2, 17, 65])
def test_token_counts(num_tokens, device):
    """Programs that the tokens do not fill, and more than one program."""
    x, y = torch.randint(-3, 4, (2, num_tokens, 4), device=device).bfloat16()
    assert_is_definition(x, y, 2)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_configuration(config, device, monkeypatch):
    monkeypatch.setattr("omni_kernels.split_forward.tuned", only(config))
    assert_is_definition(*adversarial_logits(LARGEST_TILES, BF16, device), 5)


def test_offsets_beyond_2_31_elements(device):
    assert_is_definition(*far_apart_logits(device), 4)
