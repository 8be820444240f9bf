"""The optimized split kernel against the definition. It sees all N² sums, so even rounding ties must agree."""

import pytest
import torch
from cases import (
    DTYPES,
    ON_GPU,
    adversarial_logits,
    configurations,
    dtype_name,
    factors,
    far_apart_logits,
    mixed_layouts,
    only,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_kernels import brute_force_router, get_arch, get_arch_specific_configs, get_device
from omni_kernels.split_forward import MAX_EXPERTS_PER_TOKEN, split_forward, split_forward_kernel

FP32, FP16, BF16 = DTYPES
CASES = [
    (1, 1, FP32), (2, 4, BF16), (3, 5, FP16), (3, 9, FP32), (7, 16, BF16), (16, 16, FP16), (33, 2, FP32), (64, 5, BF16),
    (100, 16, FP32), (128, 1, FP16), (128, 2, FP32), (128, 16, BF16), (130, 5, FP32), (130, 31, FP16), (130, 64, BF16),
]  # fmt: skip
if ON_GPU:
    CASES += [(n, k, dtype) for n in (200, 256, 1000) for k, dtype in zip((5, 31, 64), DTYPES, strict=True)]
# A GPU tunes for every problem.
SMALL_SIZES, SMALL_COUNTS = ([3], [4]) if ON_GPU else ([2, 3, 7], [1, 3, 4])
LARGEST_TILES = 130 if ON_GPU else 40  # the N for which none is dropped; too slow in the interpreter
CONFIGS = configurations(
    get_arch_specific_configs(get_arch(get_device()), "fwd_split"), "fwd_split", 64, LARGEST_TILES, 5
)


def assert_is_definition(x, y, k):
    torch.testing.assert_close(split_forward(x, y, k), brute_force_router(x, y, k), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("num_expert_sqrt", "k", "dtype"), CASES, ids=str)
def test_every_kind_of_token(num_expert_sqrt, k, dtype, device):
    assert_is_definition(*adversarial_logits(num_expert_sqrt, dtype, device, seed=k), k)


@given(factors(sizes=st.sampled_from(SMALL_SIZES), max_tokens=5), st.sampled_from(SMALL_COUNTS))
@settings(max_examples=300 if ON_GPU else 10)
def test_any_floats(device, logits, k):
    assert_is_definition(*(part.to(device) for part in logits), k)


@pytest.mark.parametrize("k", [100, MAX_EXPERTS_PER_TOKEN])
def test_many_experts(k, device):
    x, y = torch.randint(-2, 3, (2, 3, 130), device=device).half()
    assert_is_definition(x, y, k)


@pytest.mark.parametrize("tile_n", [32, 64, 256])
def test_any_tile(tile_n, device):
    """Tiles that hold a piece of a row, one row, and several."""
    x, y = (part[::5] for part in adversarial_logits(50, FP32, device))
    num_tokens = len(x)
    scores = torch.empty(num_tokens, 3, device=device)
    indices = torch.empty(num_tokens, 3, dtype=torch.int32, device=device)
    tiles = {"TILE_M": 32, "TILE_N": tile_n, "TILE_K": 4, "PADDED_SQRT": 64}
    split_forward_kernel[(1,)](x, y, scores, indices, *x.stride(), *y.stride(), num_tokens, 50, 3, 32, **tiles)
    want = brute_force_router(x, y, 3)
    torch.testing.assert_close((scores, indices), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter needs minutes for so many sums")
def test_long_rows(device):
    """Every row has better experts than the one before, and is longer than the widest tile."""
    n = (1 << 14) + 100
    x = torch.arange(n, device=device).float()[None]
    scores, indices = split_forward(x, x, 3)
    assert scores.tolist() == [[2 * n - 2, 2 * n - 3, 2 * n - 3]]
    assert indices.tolist() == [[n**2 - 1, (n - 2) * n + n - 1, (n - 1) * n + n - 2]]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_layout_does_not_matter(dtype, device):
    x, y = adversarial_logits(5, dtype, device)
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
