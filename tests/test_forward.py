"""The optimized forward kernel against the definition. It sees all N² sums, so even rounding ties must agree."""

import pytest
import torch
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
from omni_kernels.forward import MAX_EXPERT_SQRT, forward

FP32, FP16, BF16 = DTYPES
CASES = [
    (1, 1, FP32), (2, 1, BF16), (2, 4, FP16), (3, 5, BF16), (3, 9, FP32), (7, 2, FP16),
    (16, 16, BF16), (16, 9, FP32), (33, 2, BF16), (33, 16, FP16), (64, 1, FP32), (64, 5, BF16), (100, 1, FP16),
    (100, 5, FP32), (MAX_EXPERT_SQRT, 2, BF16),
]  # fmt: skip
if ON_GPU:
    CASES += [(n, k, d) for n in (33, 64, 100, MAX_EXPERT_SQRT) for k, d in zip((5, 31, 64), DTYPES, strict=True)]
# A GPU tunes for every problem.
SMALL_SIZES, SMALL_COUNTS = ([3], [4]) if ON_GPU else ([2, 3, 7], [1, 3, 4])
CONFIGS = configurations(candidates(get_arch(get_device()), "fwd"), "fwd", 64, 40, 5)


def assert_is_definition(x, y, k):
    torch.testing.assert_close(forward(x, y, k), brute_force_router(x, y, k), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("num_expert_sqrt", "k", "dtype"), CASES, ids=str)
def test_every_kind_of_token(num_expert_sqrt, k, dtype, device):
    assert_is_definition(*adversarial_logits(num_expert_sqrt, dtype, device, seed=k), k)


@given(factors(sizes=st.sampled_from(SMALL_SIZES), max_tokens=5), st.sampled_from(SMALL_COUNTS))
@settings(max_examples=300 if ON_GPU else 10)
def test_any_floats(device, logits, k):
    assert_is_definition(*(part.to(device) for part in logits), k)


@given(factors(sizes=st.sampled_from([1, 2, 3, 5]), max_tokens=3))
@settings(max_examples=30 if ON_GPU else 10)
def test_all_experts(device, logits):
    """Every row is used up, its equal sums one after the other."""
    assert_is_definition(*(part.to(device) for part in logits), logits[0].shape[1] ** 2)


@pytest.mark.parametrize("k", [30, 81])
def test_rows_full_of_ties(k, device):
    """Equal sums in many rows and many times in a row, and a row of their own where the others are masked."""
    x, y = torch.randint(-1, 2, (2, 6, 9), device=device).half()
    x[3:, ::2] = -INF
    y[4:, 1:] = y[4:, :1]
    assert_is_definition(x, y, k)


def test_layout_does_not_matter(device):
    x, y = adversarial_logits(5, BF16, device)
    for views in mixed_layouts(x, y):
        assert_is_definition(*views, 3)


@pytest.mark.parametrize("num_tokens", [1, 2, 17, 300])
def test_token_counts(num_tokens, device):
    """Programs that the tokens do not fill, and more than one program."""
    x, y = torch.randint(-3, 4, (2, num_tokens, 4), device=device).bfloat16()
    assert_is_definition(x, y, 2)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_configuration(config, device, monkeypatch):
    monkeypatch.setattr("omni_kernels.forward.tuned", only(config))
    assert_is_definition(*adversarial_logits(40, BF16, device), 5)


def test_offsets_beyond_2_31_elements(device):
    assert_is_definition(*far_apart_logits(device), 4)
