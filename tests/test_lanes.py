"""The kernel whose lanes share a token: the bits of the factored PyTorch version on every kind of token, however many
lanes there are. In the interpreter rows are read logit by logit; test_ptx.py runs the other ways without a GPU."""

import pytest
import torch
from cases import (
    DTYPES,
    ON_GPU,
    adversarial_logits,
    assert_routes,
    assert_same_bits,
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

from omni_kernels import factored_router, lanes, rows

FP32, FP16, BF16 = DTYPES
CASES = [
    (1, 1, BF16), (2, 1, FP16), (2, 4, FP32), (3, 2, BF16), (3, 9, FP32), (5, 25, BF16), (7, 5, FP16), (16, 16, FP32),
    (33, 1, FP16), (33, 31, BF16), (64, 5, FP32), (64, 32, FP16), (100, 2, FP32), (128, 16, BF16), (130, 32, FP32),
]  # fmt: skip
if ON_GPU:  # staged and not, in one tile and several, in chunks, ragged, logit by logit
    CASES = [
        (1, 1, BF16), (3, 9, FP32), (33, 31, FP16), (64, 1, BF16), (64, 32, BF16), (100, 10, BF16), (256, 16, BF16),
        (256, 16, FP32), (512, 8, FP16), (1000, 5, FP32), (8192, 32, BF16),
    ]  # fmt: skip
LANES = (2, 16)
SMALL = [(64, 4, BF16), (40, 7, FP32)]


def route(x, y, k, num_lanes, scores_dtype=None):
    """By a given number of lanes a token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "lanes_per_token", lambda *_: num_lanes)
        return lanes.lanes_forward(x, y, k, scores_dtype or x.dtype)


@pytest.mark.parametrize("num_lanes", LANES)
@pytest.mark.parametrize(("num_expert_sqrt", "k", "dtype"), CASES, ids=case_id)
def test_every_kind_of_token(num_expert_sqrt, k, dtype, num_lanes, device):
    repeats = 20 if ON_GPU and num_expert_sqrt < 1000 else 1
    x, y = adversarial_logits(num_expert_sqrt, dtype, device, seed=k, repeats=repeats)
    with dirty_memory():
        result = route(x, y, k, num_lanes)
    assert_same_bits(result, factored_router(x, y, k))
    if num_expert_sqrt < 1000:
        few = slice(len(x) // repeats)  # of every kind one
        assert_routes(x[few], y[few], k, *(part[few] for part in result))


@pytest.mark.parametrize("num_lanes", LANES)
@pytest.mark.parametrize(("num_expert_sqrt", "k"), [(n, k) for n, k, dtype in CASES if dtype == FP32])
def test_logits_that_differ_in_their_lowest_bits(num_expert_sqrt, k, num_lanes, device):
    x, y = close_logits(num_expert_sqrt, k, device, repeats=20 if ON_GPU else 1)
    assert_same_bits(route(x, y, k, num_lanes), factored_router(x, y, k))


@pytest.mark.parametrize("num_lanes", [4, 8])
@pytest.mark.parametrize(("num_expert_sqrt", "k", "dtype"), SMALL, ids=case_id)
def test_any_number_of_lanes(num_expert_sqrt, k, dtype, num_lanes, device):
    x, y = adversarial_logits(num_expert_sqrt, dtype, device)
    assert_same_bits(route(x, y, k, num_lanes), factored_router(x, y, k))


@given(factors(sizes=st.just(3), max_tokens=20), st.just(4))
@settings(max_examples=300 if ON_GPU else 15)
def test_any_floats(device, logits, k):
    x, y = (part.to(device) for part in logits)
    result = route(x, y, k, 2)
    assert_same_bits(result, factored_router(x, y, k))
    assert_routes(x, y, k, *result)


@pytest.mark.parametrize("num_lanes", [2, 16])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 15, 17, 32, 65, 600])
def test_token_counts(num_tokens, num_lanes, device):
    """Warps that the tokens do not fill, and more than one program."""
    num_expert_sqrt, k, dtype = SMALL[0]
    x, y = torch.randint(-3, 4, (2, num_tokens, num_expert_sqrt), device=device).to(dtype)
    assert_same_bits(route(x, y, k, num_lanes), factored_router(x, y, k))


@pytest.mark.parametrize(("num_expert_sqrt", "k", "dtype"), [(5, 3, BF16), SMALL[1]], ids=case_id)
def test_layout_does_not_matter(num_expert_sqrt, k, dtype, device):
    x, y = adversarial_logits(num_expert_sqrt, dtype, device)
    for view_x, view_y in mixed_layouts(x, y):
        assert_same_bits(route(view_x, view_y, k, 2), factored_router(view_x, view_y, k))


@pytest.mark.parametrize(
    ("num_expert_sqrt", "k", "dtype"),
    [
        (32, 4, FP32),
        *([(64, 10, FP16), (256, 16, BF16), (256, 16, FP32), (192, 8, BF16), (1024, 32, BF16)] if ON_GPU else []),
    ],
    ids=case_id,
)
@pytest.mark.parametrize("num_tokens", [8, 41, *([72, 136] if ON_GPU else [])])
def test_transposed_logits(num_expert_sqrt, k, dtype, num_tokens, device):
    """Columns that are vectors, and some that are not."""
    x, y = (part[-num_tokens:] for part in adversarial_logits(num_expert_sqrt, dtype, device, repeats=4))
    assert len(x) == num_tokens
    want = factored_router(x, y, k)
    columns_x, columns_y = (part.t().contiguous().t() for part in (x, y))
    assert rows.columns_are_vectors(columns_x, columns_y) == (num_tokens % 8 == 0)
    assert_same_bits(route(columns_x, columns_y, k, 2), want)
    assert_same_bits(route(columns_x, y, k, 2), want)


def test_which_columns_are_vectors():
    logits = torch.zeros(64, 40, dtype=BF16)
    assert rows.columns_are_vectors(logits.t(), logits.t())
    assert rows.columns_are_vectors(logits.t()[:32], logits.t()[8:])
    assert not rows.columns_are_vectors(logits, logits)
    assert not rows.columns_are_vectors(logits.t(), logits[:40, :40])
    assert not rows.columns_are_vectors(logits.t()[1:9], logits.t()[:8])  # begin in the middle of a vector
    assert not rows.columns_are_vectors(logits.t()[:36], logits.t()[:36])  # end in the middle of one
    assert not rows.columns_are_vectors(logits[:, :36].clone().t(), logits[:, :36].clone().t())


@pytest.mark.parametrize("offset", [0, 1, 2, 4])
def test_alignment_does_not_matter(offset, device):
    """Rows that begin at any multiple of 2 bytes, and some apart."""
    num_expert_sqrt, k, dtype = SMALL[0]
    x, y = adversarial_logits(num_expert_sqrt, dtype, device)
    wide_x, wide_y = torch.full((2, len(x), num_expert_sqrt + 8), float("nan"), dtype=dtype, device=device)
    columns = slice(offset, offset + num_expert_sqrt)
    wide_x[:, columns], wide_y[:, columns] = x, y
    assert_same_bits(route(wide_x[:, columns], wide_y[:, columns], k, 2), factored_router(x, y, k))


@pytest.mark.parametrize("scores_dtype", DTYPES, ids=dtype_name)
def test_dtype_of_the_scores(scores_dtype, device):
    num_expert_sqrt, k, dtype = SMALL[0]
    x, y = adversarial_logits(num_expert_sqrt, dtype, device)
    assert_same_bits(route(x, y, k, 2, scores_dtype), factored_router(x, y, k, scores_dtype))


def test_a_token_does_not_depend_on_its_neighbours(device):
    num_expert_sqrt, k, dtype = SMALL[1]
    x, y = adversarial_logits(num_expert_sqrt, dtype, device)
    want = route(x, y, k, 2)
    order = torch.randperm(len(x), device=device)
    assert_same_bits(route(x[order], y[order], k, 2), [part[order] for part in want])
    assert_same_bits(route(x[5:6], y[5:6], k, 2), [part[5:6] for part in want])


def test_offsets_beyond_2_31_elements(device):
    x, y = far_apart_logits(device)
    assert_same_bits(route(x, y, 4, 2), factored_router(x, y, 4))


@pytest.mark.parametrize(
    ("num_expert_sqrt", "k", "dtype"),
    [(8200, 4, FP16), *([(1 << 15, 2, BF16), (1 << 14, 8, FP32)] if ON_GPU else [])],
    ids=case_id,
)
def test_long_rows(num_expert_sqrt, k, dtype, device):
    """Columns whose numbers take many bits of a key, and the longest rows."""
    x, y = torch.randn(2, 3, num_expert_sqrt, device=device).to(dtype)
    x[0, -1] = y[0, -1] = y[1, -1] = 10.0
    assert_same_bits(route(x, y, k, 16), factored_router(x, y, k))


def test_limits(device):
    device = torch.device(device)
    takes = not ON_GPU or lanes.on_nvidia(device)
    for num_expert_sqrt, k in ((1, 1), (1 << 15, 1), (1 << 15, 2), (1 << 13, 32), (1, lanes.MAX_EXPERTS_PER_TOKEN)):
        assert lanes.runs_on(device, num_expert_sqrt, k) == takes
    for num_expert_sqrt, k in (((1 << 15) + 1, 1), ((1 << 13) + 1, 32), (100, lanes.MAX_EXPERTS_PER_TOKEN + 1)):
        assert not lanes.runs_on(device, num_expert_sqrt, k)


def test_many_lanes_share_a_token_where_there_are_few(device):
    device = torch.device(device)
    for num_expert_sqrt in (1, 2, 7, 64, 256, 4096):
        for dtype in DTYPES:
            counts = [lanes.lanes_per_token(1 << i, num_expert_sqrt, dtype.itemsize, device) for i in range(25)]
            assert counts == sorted(counts, reverse=True)
            assert set(counts) <= {2, 4, 8, 16}
            assert counts[-1] == 2
            assert counts[0] == 2 or counts[0] * 8 <= num_expert_sqrt * dtype.itemsize
    assert lanes.lanes_per_token(1, 256, 2, device) == 16
