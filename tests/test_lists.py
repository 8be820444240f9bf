"""The kernel that lists the best columns of each factor, against PyTorch's sorting."""

import pytest
import torch
from cases import DTYPES, NEEDS_INTERPRETER, ON_GPU, adversarial_logits, case_id
from conftest import DEVICE

from omni_kernels import sharded
from omni_kernels.factored import lists

pytestmark = [] if ON_GPU else NEEDS_INTERPRETER


def by_pytorch(x, y, k, first_column):
    return torch.cat([sharded._keys_by_column(logits, k, first_column) for logits in (x, y)], 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 5), (40, 16), (100, 3)])
def test_lists_are_those_of_pytorch(n, k, dtype):
    x, y = adversarial_logits(n, dtype, DEVICE)
    assert lists.runs_on(x, k)
    assert torch.equal(lists.best_columns(x, y, k, 1000), by_pytorch(x, y, k, 1000))


def test_any_strides_and_no_tokens():
    x, y = adversarial_logits(40, torch.float32, DEVICE)
    x, y = x.t().contiguous().t(), y.repeat(1, 2)[:, ::2]
    assert torch.equal(lists.best_columns(x, y, 4, 8), by_pytorch(x, y, 4, 8))
    assert lists.best_columns(x[:0], y[:0], 4, 8).shape == (0, 8)


def test_more_than_the_kernel_takes_are_pytorchs():
    x, y = adversarial_logits(100, torch.bfloat16, DEVICE)
    assert not lists.runs_on(x, 65)
    assert torch.equal(sharded._best_columns(x, y, 65, 0), by_pytorch(x, y, 65, 0))
