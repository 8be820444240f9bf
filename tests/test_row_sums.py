"""Sums of rows in their order, by the kernel and by PyTorch."""

import pytest
import torch
from cases import DTYPES, INF, NAN, NEEDS_INTERPRETER, ON_GPU, assert_same_bits, case_id, dirty_memory
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_kernels.row_sums import _by_pytorch, row_sums

pytestmark = [] if ON_GPU else NEEDS_INTERPRETER


@settings(max_examples=30)
@given(st.integers(0, 6), st.integers(1, 40), st.integers(0, 5), st.integers(1, 9), st.data())
def test_sums_are_those_of_pytorch(device, num_rows, num_columns, num_sums, most, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    dtype, out = data.draw(st.sampled_from(DTYPES), "dtype"), data.draw(st.sampled_from(DTYPES), "of sums")
    values = torch.randn(num_rows, num_columns, generator=generator).to(dtype).to(device)
    which = torch.randint(-1, max(num_rows, 1), (num_sums, most), generator=generator).to(device)
    which = which.masked_fill(which >= num_rows, -1)
    weights = None
    if data.draw(st.booleans(), "weighted"):  # 16-bit numbers, whose products are exact
        values, weights = values.bfloat16(), torch.rand(num_rows, generator=generator).bfloat16().to(device)
    with dirty_memory():
        got = row_sums(values, which, out, weights)
    want = _by_pytorch(values, which, weights) if num_rows else torch.zeros(num_sums, num_columns, device=device)
    assert_same_bits([got], [want.to(out)])


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_only_rows_that_are_asked_for_count(dtype, device):
    values = torch.tensor([[1.0, 2.0], [NAN, INF], [3.0, -0.0]], dtype=dtype, device=device)
    which = torch.tensor([[0, 2, -1], [-1, -1, -1], [1, 0, -1]], device=device)
    weights = torch.tensor([2.0, 1.0, 1.0], dtype=dtype, device=device)
    want = torch.tensor([[5.0, 4.0], [0.0, 0.0], [NAN, INF]], device=device)
    assert_same_bits([row_sums(values, which, torch.float32, weights)], [want])
