"""The factored kernel: the bits of the factored PyTorch version, and the definition's result, on every kind of token.

A GPU runs the whole matrix. The interpreter takes seconds for a call however few its tokens, so it runs each size,
each k and each dtype a few times, on batches that hold every kind of token.
"""

import pytest
import torch
from cases import (
    DTYPES,
    ON_GPU,
    adversarial_logits,
    assert_routes,
    assert_same_bits,
    case_id,
    dirty_memory,
    dtype_name,
    factors,
    layouts,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from omni_kernels import factored, factored_router
from omni_kernels.factored import factored_forward

SIZES = (1, 2, 3, 7, 16, 33, 64, 100, 128, 130)
COUNTS = (1, 2, 4, 5, 9, 16, 31, 49, 64)  # with the squares of 1, 2, 3, 7
MATRIX = [(n, k, dtype) for n in SIZES for k in COUNTS if k <= n * n for dtype in DTYPES]
FP32, FP16, BF16 = DTYPES
SPARSE = [
    (1, 1, BF16), (2, 1, FP16), (2, 4, FP32), (3, 2, BF16), (3, 9, FP32), (7, 5, FP16), (7, 49, BF16), (16, 16, FP32),
    (33, 1, FP16), (33, 31, BF16), (64, 5, FP32), (100, 2, FP32), (128, 16, BF16), (130, 5, FP16), (130, 64, FP32),
]  # fmt: skip
CASES = MATRIX if ON_GPU else SPARSE


@pytest.mark.parametrize(("num_expert_sqrt", "k", "dtype"), CASES, ids=case_id)
def test_every_kind_of_token(num_expert_sqrt, k, dtype, device):
    x, y = adversarial_logits(num_expert_sqrt, dtype, device, seed=k, repeats=20 if ON_GPU else 1)
    with dirty_memory():
        result = factored_forward(x, y, k)
    assert_same_bits(result, factored_router(x, y, k))
    assert_routes(x, y, k, *result)


@pytest.mark.parametrize("num_expert_sqrt", [1, 2, 3, 5, 7])
def test_all_experts(num_expert_sqrt, device):
    k = num_expert_sqrt**2
    x, y = adversarial_logits(num_expert_sqrt, torch.float16, device)
    scores, indices = factored_forward(x, y, k)
    assert torch.equal(indices.sort(1).values, torch.arange(k, device=device).int().expand(len(x), k))
    assert_same_bits((scores, indices), factored_router(x, y, k))


@given(factors(sizes=st.sampled_from([2, 3, 7]), max_tokens=5), st.sampled_from([1, 3, 4]))
@settings(max_examples=300 if ON_GPU else 8, phases=list(Phase) if ON_GPU else [Phase.generate])  # shrinking is slow
def test_any_floats(device, logits, k):
    x, y = (part.to(device) for part in logits)
    result = factored_forward(x, y, k)
    assert_same_bits(result, factored_router(x, y, k))
    assert_routes(x, y, k, *result)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 17, 64, 65, 1500])
def test_token_counts(num_tokens, device):
    """Tiles that the tokens do not fill, and more than one program."""
    x, y = torch.randint(-3, 4, (2, num_tokens, 5), device=device).bfloat16()
    assert_same_bits(factored_forward(x, y, 3), factored_router(x, y, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_layout_does_not_matter(dtype, device):
    x, y = adversarial_logits(5, dtype, device)
    want = factored_router(x, y, 3)
    for view_x, view_y in zip(layouts(x), layouts(y)[::-1], strict=True):
        assert_same_bits(factored_forward(view_x, view_y, 3), want)
    row = y[:1].expand_as(x)
    assert_same_bits(factored_forward(x, row, 3), factored_router(x, row, 3))


def test_same_bits_on_every_run(device):
    x, y = adversarial_logits(33, torch.float32, device, repeats=20 if ON_GPU else 1)
    assert_same_bits(factored_forward(x, y, 7), factored_forward(x, y, 7))


def test_a_token_does_not_depend_on_its_neighbours(device):
    x, y = adversarial_logits(3, torch.bfloat16, device)
    want = factored_forward(x, y, 4)
    order = torch.randperm(len(x), device=device)
    assert_same_bits(factored_forward(x[order], y[order], 4), [part[order] for part in want])
    assert_same_bits(factored_forward(x[5:6], y[5:6], 4), [part[5:6] for part in want])


@pytest.mark.parametrize(("num_expert_sqrt", "k"), [(700, 2), (4096, 1), (9000, 2)])
def test_long_rows(num_expert_sqrt, k, device):
    x, y = torch.randn(2, 3, num_expert_sqrt, device=device)
    x[:, -1], y[0, -1] = 10.0, 10.0
    assert_same_bits(factored_forward(x, y, k), factored_router(x, y, k))


@pytest.mark.skipif(not ON_GPU, reason="the interpreter needs minutes for the largest tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("num_expert_sqrt", [255, 256, 257, 1000, 1024, 2049, 4096, 9000])
@pytest.mark.parametrize("k", [1, 16, 33, factored.MAX_EXPERTS_PER_TOKEN])
def test_large_tiles(num_expert_sqrt, k, dtype, device):
    x, y = adversarial_logits(num_expert_sqrt, dtype, device)
    assert_same_bits(factored_forward(x, y, k), factored_router(x, y, k))
