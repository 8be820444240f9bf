"""The kernel for many experts a token: the bits of the factored PyTorch version on every kind of token. It is PTX for
the most part, so these tests need a GPU; test_ptx.py runs the same code without one."""

import pytest
import torch
from cases import (
    DTYPES,
    ON_GPU,
    adversarial_logits,
    assert_routes,
    assert_same_bits,
    by_magnitude,
    case_id,
    close_logits,
    dirty_memory,
    dtype_name,
    factors,
    far_apart_logits,
    mixed_layouts,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_kernels import factored_router, frontier
from omni_kernels.checks import MAX_EXPERT_SQRT
from omni_kernels.frontier import frontier_forward

FP32, FP16, BF16 = DTYPES
# One piece, several, several tiles of them; rows of pieces that do not fill them; fewer tokens a warp.
CASES = [
    (1, 1, BF16), (7, 49, FP16), (33, 256, FP32), (64, 256, FP32), (100, 40, BF16), (256, 64, BF16), (300, 100, FP16),
    (1000, 256, FP32),
]  # fmt: skip
ON_NVIDIA = pytest.mark.skipif(
    not (ON_GPU and frontier.runs_on(torch.device("cuda"), 64, 40)), reason="needs an NVIDIA GPU from Ampere on"
)


def spread(x, y):
    """Tokens in order of magnitude, so that some warps route none that are extreme and some only such."""
    order = by_magnitude(x, y)
    return x[order], y[order]


@ON_NVIDIA
@pytest.mark.parametrize(("num_expert_sqrt", "k", "dtype"), CASES, ids=case_id)
def test_every_kind_of_token(num_expert_sqrt, k, dtype, device):
    x, y = spread(*adversarial_logits(num_expert_sqrt, dtype, device, seed=k, repeats=5))
    with dirty_memory():
        result = frontier_forward(x, y, k, dtype)
    assert_same_bits(result, factored_router(x, y, k))
    few = slice(0, len(x), 5 if num_expert_sqrt < 1000 else 50)  # the definition takes long
    assert_routes(x[few], y[few], k, *(part[few] for part in result))


@ON_NVIDIA
@pytest.mark.parametrize(("num_expert_sqrt", "k"), [(n, k) for n, k, dtype in CASES if dtype == FP32])
def test_logits_that_differ_in_their_lowest_bits(num_expert_sqrt, k, device):
    x, y = close_logits(num_expert_sqrt, k, device, repeats=10)
    assert_same_bits(frontier_forward(x, y, k, FP32), factored_router(x, y, k))


@ON_NVIDIA
@given(factors(sizes=st.just(7), max_tokens=20), st.just(40))
@settings(max_examples=300)
def test_any_floats(device, logits, k):
    x, y = (part.to(device) for part in logits)
    result = frontier_forward(x, y, k, x.dtype)
    assert_same_bits(result, factored_router(x, y, k))
    assert_routes(x, y, k, *result)


@ON_NVIDIA
@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 17, 1500])
def test_token_counts(num_tokens, device):
    x, y = torch.randint(-3, 4, (2, num_tokens, 100), device=device).bfloat16()
    assert_same_bits(frontier_forward(x, y, 40, BF16), factored_router(x, y, 40))


@ON_NVIDIA
def test_layout_does_not_matter(device):
    x, y = spread(*adversarial_logits(100, BF16, device, repeats=2))
    for view_x, view_y in mixed_layouts(x, y):
        assert_same_bits(frontier_forward(view_x, view_y, 40, BF16), factored_router(view_x, view_y, 40))


@ON_NVIDIA
@pytest.mark.parametrize("scores_dtype", DTYPES, ids=dtype_name)
def test_dtype_of_the_scores(scores_dtype, device):
    x, y = adversarial_logits(100, BF16, device)
    assert_same_bits(frontier_forward(x, y, 40, scores_dtype), factored_router(x, y, 40, scores_dtype))


@ON_NVIDIA
def test_offsets_beyond_2_31_elements(device):
    x, y = far_apart_logits(device)
    assert_same_bits(frontier_forward(x, y, 4, FP16), factored_router(x, y, 4))


@ON_NVIDIA
def test_longest_rows(device):
    x, y = torch.randn(2, 3, MAX_EXPERT_SQRT, device=device).half()
    x[0, -1] = y[0, -1] = y[1, -1] = 10.0
    assert_same_bits(frontier_forward(x, y, 33, FP16), factored_router(x, y, 33))


def test_limits(device):
    device = torch.device(device)
    takes = ON_GPU and frontier.on_nvidia(device)
    assert frontier.runs_on(device, MAX_EXPERT_SQRT, frontier.MAX_EXPERTS_PER_TOKEN) == takes
    assert not frontier.runs_on(device, 1000, frontier.MAX_EXPERTS_PER_TOKEN + 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("num_expert_sqrt", [16, 33, 64, 256, 1000, MAX_EXPERT_SQRT])
def test_lists_fit_in_shared_memory(num_expert_sqrt, dtype):
    for k in (1, 33, 64, 128, frontier.MAX_EXPERTS_PER_TOKEN):
        constants = frontier.kernel_constants(num_expert_sqrt, k, dtype, 16, True)
        ranks, key_bytes = min(k, num_expert_sqrt), 8 if dtype == torch.float32 else 4
        pitch = ((k + 1) // 2 | 1) * 4
        num_bytes = constants["TOKENS"] * (pitch + 2 * (ranks + 1) * key_bytes)
        assert num_bytes <= frontier.SHARED_BYTES
        assert constants["TOKENS"] == 16 or num_bytes * 2 > frontier.SHARED_BYTES
