"""The original version against the definition. It sees all N² sums, so even rounding ties must agree."""

import pytest
import torch
from cases import (
    DTYPES,
    ON_GPU,
    adversarial_logits,
    assert_routes,
    configurations,
    dtype_name,
    factors,
    far_apart_logits,
    layouts,
    mixed_layouts,
    only,
    oracle_backward,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_kernels import brute_force_router
from omni_kernels.configs import get_configs
from omni_kernels.original import MAX_SPLIT_EXPERTS_PER_TOKEN, original_backward, original_forward

FP32, FP16, BF16 = DTYPES
CASES = [
    (1, 1, FP32), (2, 1, BF16), (2, 4, FP16), (3, 5, BF16), (3, 9, FP32), (7, 2, FP16), (7, 49, BF16), (16, 16, FP32),
    (33, 2, BF16), (64, 5, FP32), (100, 1, FP16), (127, 2, BF16),  # in one tile
    (128, 1, FP16), (128, 5, FP32), (130, 2, FP16), (130, 16, BF16),  # streamed
]  # fmt: skip
if ON_GPU:
    CASES += [(n, k, d) for n in (64, 100, 130, 256) for k, d in zip((5, 16, 31), DTYPES, strict=True)]
# A GPU tunes for every problem.
SMALL_SIZES, SMALL_COUNTS = ([3], [4]) if ON_GPU else ([2, 3, 7], [1, 3, 4])
FORWARD_CONFIGS = [
    (n, config) for n, kind in ((40, "fwd"), (130, "fwd_split"))
    for config in configurations(get_configs("original", kind), kind, 1024, n, 5)
]  # fmt: skip
BACKWARD_CONFIGS = configurations(get_configs("original", "bwd"), "bwd", 1024, 130, 64)


def assert_is_definition(x, y, k):
    torch.testing.assert_close(original_forward(x, y, k), brute_force_router(x, y, k), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("num_expert_sqrt", "k", "dtype"), CASES, ids=str)
def test_every_kind_of_token(num_expert_sqrt, k, dtype, device):
    assert_is_definition(*adversarial_logits(num_expert_sqrt, dtype, device, seed=k), k)


@given(factors(sizes=st.sampled_from(SMALL_SIZES), max_tokens=5), st.sampled_from(SMALL_COUNTS))
@settings(max_examples=300 if ON_GPU else 10)
def test_any_floats(device, logits, k):
    assert_is_definition(*(part.to(device) for part in logits), k)


@pytest.mark.parametrize("k", [31, 64, 100])
def test_streamed_with_many_ties(k, device):
    x, y = torch.randint(-2, 3, (2, 2, 130), device=device).half()
    assert_is_definition(x, y, k)


def test_more_experts_than_the_sorted_list_holds(device):
    x, y = torch.randint(-2, 3, (2, 2, 130), device=device).half()
    k = MAX_SPLIT_EXPERTS_PER_TOKEN + 1
    assert_routes(x, y, k, *original_forward(x, y, k))


@pytest.mark.parametrize(("num_expert_sqrt", "dtype"), [(5, FP32), (128, BF16)])
def test_layout_does_not_matter(num_expert_sqrt, dtype, device):
    x, y = (part[::6] for part in adversarial_logits(num_expert_sqrt, dtype, device))
    for views in mixed_layouts(x, y):
        assert_is_definition(*views, 3)


@pytest.mark.parametrize("num_tokens", [1, 2, 17, 300])
def test_token_counts(num_tokens, device):
    """Programs that the tokens do not fill, and more than one program."""
    x, y = torch.randint(-3, 4, (2, num_tokens, 4), device=device).bfloat16()
    assert_is_definition(x, y, 2)


@pytest.mark.parametrize(("num_expert_sqrt", "config"), FORWARD_CONFIGS, ids=str)
def test_every_configuration(num_expert_sqrt, config, device, monkeypatch):
    monkeypatch.setattr("omni_kernels.original.tuned", only(config))
    x, y = (part[:: 1 if ON_GPU else 6] for part in adversarial_logits(num_expert_sqrt, BF16, device))
    assert_is_definition(x, y, 5)


def test_offsets_beyond_2_31_elements(device):
    assert_is_definition(*far_apart_logits(device), 4)


def pairs(num_tokens, num_expert_sqrt, k, device):
    """Distinct experts of each token, as a forward pass would return them."""
    scores = torch.rand(num_tokens, num_expert_sqrt**2, device=device)
    return scores.argsort(1)[:, :k].int().contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(("num_expert_sqrt", "k"), [(1, 1), (2, 4), (7, 5), (7, 49), (16, 31), (130, 100)])
def test_backward(num_expert_sqrt, k, dtype, device):
    indices = pairs(300, num_expert_sqrt, k, device)
    # Few small integers: their sums are exact, so the order of the atomic adds cannot show.
    grad_scores = torch.randint(-3, 4, (300, k), device=device).to(dtype)
    want = oracle_backward(grad_scores, indices, num_expert_sqrt)
    for _ in range(3):  # a gradient that nothing zeroed would grow
        assert all(map(torch.equal, original_backward(grad_scores, indices, num_expert_sqrt), want))


@pytest.mark.parametrize("config", BACKWARD_CONFIGS, ids=str)
def test_every_configuration_of_the_backward(config, device, monkeypatch):
    monkeypatch.setattr("omni_kernels.original.tuned", only(config))
    indices = pairs(300, 130, 64, device)
    grad_scores = torch.randint(-3, 4, (300, 64), device=device).float()
    want = oracle_backward(grad_scores, indices, 130)
    assert all(map(torch.equal, original_backward(grad_scores, indices, 130), want))


def test_backward_accumulates_in_fp32(device):
    """4096 + 8 + 8 + 8 + 8 is 4096 in a bf16 accumulator."""
    grad_scores = torch.tensor([[4096.0, 8, 8, 8, 8]], device=device).bfloat16()
    grad_x, grad_y = original_backward(grad_scores, torch.arange(5, device=device).int()[None], 5)
    assert grad_x[0].tolist() == [4128, 0, 0, 0, 0]
    assert grad_y[0].tolist() == [4096, 8, 8, 8, 8]


def test_backward_takes_any_strides(device):
    indices = pairs(5, 4, 3, device)
    grad_scores = torch.randint(-3, 4, (5, 3), device=device).float()
    want = oracle_backward(grad_scores, indices, 4)
    for view in layouts(grad_scores):
        assert all(map(torch.equal, original_backward(view, indices, 4), want))
    ones = torch.ones((), device=device).expand(5, 3)
    want = oracle_backward(ones, indices, 4)
    assert all(map(torch.equal, original_backward(ones, indices, 4), want))


def test_backward_offsets_beyond_2_31_elements(device):
    memory = torch.empty((1 << 31) + 8, dtype=FP16, device=device)
    grad_scores, indices = memory.as_strided((2, 3), (1, 1 << 30)), pairs(2, 4, 3, device)
    grad_scores.copy_(torch.arange(6).view(2, 3))
    want = oracle_backward(grad_scores, indices, 4)
    assert all(map(torch.equal, original_backward(grad_scores, indices, 4), want))
