"""The kernels around the router of candidates, against PyTorch's operators."""

import pytest
import torch
from cases import DTYPES, INF, NEEDS_INTERPRETER, ON_GPU, adversarial_logits, assert_same_bits, case_id, dirty_memory

from omni_kernels import reference, sharded
from omni_kernels.factored import candidates
from omni_kernels.reference import factored_router

pytestmark = [] if ON_GPU else NEEDS_INTERPRETER


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize(("n", "k", "num_ranks"), [(12, 5, 2), (40, 3, 4), (30, 8, 3), (9, 1, 2)])
def test_candidates_of_several_ranks(n, k, num_ranks, dtype, device):
    x, y = adversarial_logits(n, dtype, device)
    x[:4, 1:], y[4:8, 2:] = -INF, -INF  # more are masked than are not
    parts = zip(x.chunk(num_ranks, 1), y.chunk(num_ranks, 1), strict=True)
    first, keys = 0, []
    for part_x, part_y in parts:
        keys.append(torch.cat([sharded._keys_by_column(part, k, first) for part in (part_x, part_y)], 1))
        first += part_x.shape[1]
    keys = torch.stack(keys)
    lists = [part.transpose(0, 1).flatten(1) for part in keys.split(k, 2)]
    (all_x, rows), (all_y, columns) = (reference.unpack_keys(part, dtype) for part in lists)
    with dirty_memory():
        got = candidates.matrices(keys, dtype)
    assert_same_bits(got, (all_x.to(dtype), all_y.to(dtype)))
    _, places = factored_router(*got, k)
    with dirty_memory():
        experts = candidates.experts(keys, places, dtype, n)
    assert torch.equal(experts, sharded._experts(all_x, all_y, rows, columns, places, n))


def test_no_tokens(device):
    keys = torch.empty(2, 0, 6, dtype=torch.int32, device=device)
    assert [part.shape for part in candidates.matrices(keys, torch.bfloat16)] == [(0, 6), (0, 6)]
    places = torch.empty(0, 3, dtype=torch.int32, device=device)
    assert candidates.experts(keys, places, torch.bfloat16, 40).shape == (0, 3)
