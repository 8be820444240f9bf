"""The definition against an independent oracle, and the factored PyTorch version against the definition."""

import gc
import tracemalloc

import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    INF,
    NAN,
    adversarial_logits,
    assert_routes,
    assert_same_bits,
    dtype_name,
    factors,
    is_poisoned,
    layouts,
    oracle_backward,
    oracle_router,
    rounding_ties,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from omni_kernels import brute_force_router, factored_router, reference

SIZES = (1, 2, 3, 7, 16, 33, 64, 100, 128, 130)
COUNTS = (0, 1, 2, 5, 16, 31, 64)
# Every dtype of short rows, one of long ones: their sums take long to sort.
CASES = [(n, dtype) for i, n in enumerate(SIZES) for dtype in (DTYPES if n < 64 else [DTYPES[i % 3]])]
ROUTERS = pytest.mark.parametrize("router", [brute_force_router, factored_router])


def counts(num_expert_sqrt):
    """Every k of the list that exists, and all experts where they are few."""
    experts = num_expert_sqrt**2
    return sorted({k for k in COUNTS if k <= experts} | ({experts} if num_expert_sqrt <= 33 else set()))


def test_nothing_stays_of_a_call_with_fake_tensors():
    x, y = torch.randn(2, 3, 4)
    with FakeTensorMode():
        factored_router(torch.empty(3, 4), torch.empty(3, 4), 7)
    with torch.device("meta"):
        result = factored_router(x, y, 7)
    assert_same_bits(result, brute_force_router(x, y, 7))


def _is_dense(part):
    return type(part) is torch.Tensor and part.layout is torch.strided


def bytes_kept():
    """What Python holds, and all tensors it knows of."""
    gc.collect()
    tensors = sum(part.untyped_storage().nbytes() for part in gc.get_objects() if _is_dense(part))
    return tracemalloc.get_traced_memory()[0] + tensors


def test_nothing_stays_of_a_huge_count():
    x, y = torch.randn(2, 1, 200)
    factored_router(x, y, 200**2 - 4)  # what a first call sets up
    tracemalloc.start()
    try:
        before = bytes_kept()
        for k in range(200**2 - 3, 200**2):
            factored_router(x, y, k)
        assert bytes_kept() - before < 2**17  # the ranks of one count are 640 kB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("num_expert_sqrt", [1, 2, 3, 8, 20])
def test_the_staircase(num_expert_sqrt):
    for k in range(1, num_expert_sqrt**2 + 1):
        ranks = range(1, min(k, num_expert_sqrt) + 1)
        want = [(a - 1, b - 1) for a in ranks for b in ranks if a * b <= k]
        assert (
            list(zip(*(part.tolist() for part in reference._staircase(k, num_expert_sqrt, "cpu")), strict=True)) == want
        )


@ROUTERS
def test_any_integer_counts(router):
    x, y = torch.randn(2, 3, 4)
    assert_same_bits(router(x, y, np.int64(7)), router(x, y, 7))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("num_expert_sqrt", [1, 2, 3, 7, 16])
def test_definition_is_the_oracle(num_expert_sqrt, dtype):
    x, y = adversarial_logits(num_expert_sqrt, dtype)
    want_scores, want_indices = oracle_router(x, y, num_expert_sqrt**2)
    for k in counts(num_expert_sqrt):
        scores, indices = brute_force_router(x, y, k)
        assert (scores.dtype, indices.dtype) == (dtype, torch.int32)
        assert torch.equal(indices, want_indices[:, :k])
        torch.testing.assert_close(scores.float(), want_scores[:, :k], rtol=0, atol=0, equal_nan=True)


@given(factors(), st.data())
@settings(max_examples=150)
def test_both_are_the_oracle_on_any_floats(logits, data):
    x, y = logits
    k = data.draw(st.integers(0, x.shape[1] ** 2), label="k")
    want_scores, want_indices = oracle_router(x, y, k)
    scores, indices = brute_force_router(x, y, k)
    assert torch.equal(indices, want_indices)
    torch.testing.assert_close(scores.float(), want_scores, rtol=0, atol=0, equal_nan=True)
    got = factored_router(x, y, k)
    assert_routes(x, y, k, *got)
    assert_same_bits(reference.eager_router(x, y, k), got)


@pytest.mark.parametrize(("num_expert_sqrt", "dtype"), CASES, ids=str)
def test_factored_is_the_definition(num_expert_sqrt, dtype, device):
    x, y = adversarial_logits(num_expert_sqrt, dtype, device)
    for k in counts(num_expert_sqrt):
        got = factored_router(x, y, k)
        assert_routes(x, y, k, *got)
        assert_same_bits(reference.eager_router(x, y, k), got)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("trouble", [[], [0.0], [-0.0, 0.0], [INF], [-INF], [NAN], [-NAN], [3e38, -3e38, 1.0]])
@pytest.mark.parametrize(("num_expert_sqrt", "k"), [(30, 7), (30, 29), (30, 30), (5, 24), (5, 25), (40, 300)])
def test_looking_at_the_numbers_changes_nothing(num_expert_sqrt, k, trouble, dtype, monkeypatch):
    """Tokens without equal logits, and among them, in either factor, tokens with equals and with what is not finite."""
    generator = torch.Generator().manual_seed(k)
    x, y = torch.randn(2, 12, num_expert_sqrt, generator=generator).to(dtype)
    for token, value in enumerate(trouble * 2):
        factor = (x, y)[token % 2]
        factor[1 + 3 * token : 3 + 3 * token, : num_expert_sqrt // (1 + token)] = value
    want = factored_router(x, y, k, torch.float32)
    assert_same_bits(reference.eager_router(x, y, k, torch.float32), want)
    monkeypatch.setattr(reference, "CANDIDATES_PER_SLICE", 5 * (num_expert_sqrt + 2 * k))
    assert_same_bits(reference.eager_router(x, y, k, torch.float32), want)


@given(factors(sizes=st.integers(1, 6), max_tokens=2), st.data())
@settings(max_examples=75)
def test_one_more_expert_leaves_the_others(logits, data):
    """The k best begin the k + 1 best: in the definition always, in the factored version the scores do."""
    x, y = logits
    k = data.draw(st.integers(0, x.shape[1] ** 2 - 1), label="k")
    few, more = brute_force_router(x, y, k), brute_force_router(x, y, k + 1)
    assert_same_bits(few, [part[:, :k] for part in more])
    clean = ~is_poisoned(x, y)
    assert torch.equal(factored_router(x, y, k)[0][clean], factored_router(x, y, k + 1)[0][clean, :k])


@given(
    st.sampled_from(DTYPES), st.sampled_from([1, 2, 7, 64, 100, 4096, 5000]), st.sampled_from([1, 2, 5, 16, 40]),
    st.lists(st.sampled_from(["normal", "coarse", "equal", "huge", "tiny", "negative", "few"]), min_size=1),
    st.integers(0, 99),
)  # fmt: skip
def test_a_host_that_looks_finds_the_same(dtype, num_expert_sqrt, k, kinds, seed):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(2, len(kinds), num_expert_sqrt, generator=generator)
    changed = {
        "normal": lambda row: row, "coarse": lambda row: (row * 2).round() / 2, "equal": torch.sign,
        "huge": lambda row: row.sign() * torch.finfo(dtype).max * (1 - row.abs() / 8),
        "tiny": lambda row: row * torch.finfo(dtype).smallest_normal, "negative": lambda row: -row.abs(),
        "few": lambda row: row - 2.5,
    }  # fmt: skip
    rows = [changed[kind](normal[:, token]) for token, kind in enumerate(kinds)]
    x, y = torch.stack(rows, 1).to(dtype)
    k = min(k, num_expert_sqrt**2)
    assert_same_bits(reference.eager_router(x, y, k), factored_router(x, y, k))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_only_tokens_in_doubt_are_routed_by_packed_keys(dtype, monkeypatch):
    routed = []
    slowly = reference._route_slice
    monkeypatch.setattr(
        reference, "_route_slice", lambda x, *args, **kw: routed.append(len(x)) or slowly(x, *args, **kw)
    )
    x, y = torch.randn(2, 50, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[7:9] = -x[7:9].abs() if dtype != torch.float32 else 1.0  # no 16 above 0; equals
    result = reference.eager_router(x, y, 16)
    assert sum(routed) == 2
    assert_same_bits(result, factored_router(x, y, 16))


@ROUTERS
def test_layout_does_not_matter(router, device):
    x, y = adversarial_logits(7, torch.float32, device)
    want = router(x, y, 10)
    for view_x in layouts(x):
        for view_y in layouts(y):
            assert_same_bits(router(view_x, view_y, 10), want)
    row = x[:1].expand(5, 7)
    assert_same_bits(router(row, y[:5], 10), router(row.contiguous(), y[:5], 10))


@ROUTERS
@pytest.mark.parametrize("shape, k", [((0, 3), 4), ((0, 1), 0), ((4, 3), 0), ((1, 1), 1), ((1, 3), 9)])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_smallest_batches(router, shape, k, dtype, device):
    x, y = torch.randn(2, *shape, device=device).to(dtype)
    assert_routes(x, y, k, *router(x, y, k))


def test_slices_join(monkeypatch, device):
    x, y = adversarial_logits(16, torch.float32, device)
    want = factored_router(x, y, 20)
    monkeypatch.setattr(reference, "CANDIDATES_PER_SLICE", 500)
    assert_same_bits(factored_router(x, y, 20), want)
    monkeypatch.setattr(reference, "CANDIDATES_PER_SLICE", 1)
    assert_same_bits(factored_router(x, y, 20), want)


@ROUTERS
@pytest.mark.parametrize("num_expert_sqrt, k", [(7, 12), (64, 31)])
def test_a_bad_token_leaves_the_others(router, num_expert_sqrt, k, device):
    x, y = torch.randn(2, 40, num_expert_sqrt, device=device).bfloat16()
    want = router(x, y, k)
    bad_x, bad_y = adversarial_logits(num_expert_sqrt, torch.bfloat16, device)
    bad = is_poisoned(bad_x, bad_y)
    at = torch.arange(int(bad.sum()), device=device) * 3
    x[at], y[at] = bad_x[bad], bad_y[bad]
    scores, indices = router(x, y, k)
    assert_routes(x, y, k, scores, indices)
    others = ~is_poisoned(x, y)
    assert others.sum() == 40 - len(at)
    assert_same_bits((scores[others], indices[others]), [part[others] for part in want])


@ROUTERS
def test_largest_size(router, device):
    """Expert indices up to 46340² - 1 fit in int32. The definition would need 2.1 billion sums, so it stops earlier."""
    num_expert_sqrt = 46340 if router is factored_router else 2000
    x, y = torch.randn(2, 1, num_expert_sqrt, device=device)
    x[0, -1], y[0, -1] = 100.0, 100.0
    scores, indices = router(x, y, 3)
    assert indices[0, 0] == num_expert_sqrt**2 - 1
    rows, columns = indices[0].long() // num_expert_sqrt, indices[0].long() % num_expert_sqrt
    assert torch.equal(scores[0], x[0, rows] + y[0, columns])
    second = max(x[0, -1] + y[0, :-1].max(), x[0, :-1].max() + y[0, -1])
    assert scores[0, 0] == 200.0 and scores[0, 1] == second


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("num_expert_sqrt, k", [(1, 1), (3, 9), (7, 5), (33, 64)])
def test_backward_is_the_oracle(num_expert_sqrt, k, dtype, device):
    """Small whole numbers add up exactly in any order, so the comparison is exact."""
    x, y = torch.randn(2, 9, num_expert_sqrt, device=device)
    indices = factored_router(x, y, k)[1]
    grad = torch.randint(-8, 9, (9, k), device=device).to(dtype)
    for got, want in zip(
        reference.backward_router(grad, indices, num_expert_sqrt),
        oracle_backward(grad, indices, num_expert_sqrt),
        strict=True,
    ):
        assert torch.equal(got, want)


# The checker decides what counts as right, so what it lets pass is tested too.


def spoil_order(scores, indices):
    return scores, indices.flip(1)


def spoil_score(scores, indices):
    return scores.nextafter(torch.tensor(INF)), indices


def spoil_index(scores, indices):
    return scores, indices.clone().index_fill_(1, torch.tensor([0]), 100)


def spoil_distinct(scores, indices):
    return scores, indices[:, :1].expand_as(indices)


def spoil_dtype(scores, indices):
    return scores, indices.long()


def spoil_negative(scores, indices):
    return scores, indices - 10


def spoil_length(scores, indices):
    return scores[:, :-1], indices[:, :-1]


@pytest.mark.parametrize(
    "spoil", [spoil_order, spoil_score, spoil_index, spoil_distinct, spoil_dtype, spoil_negative, spoil_length]
)
@pytest.mark.parametrize("ties", [False, True])
def test_checker_refuses(spoil, ties):
    x, y = torch.randn(2, 4, 5)
    if ties:
        x, y = torch.zeros(2, 4, 5)
    result = brute_force_router(x, y, 6)
    assert_routes(x, y, 6, *result)
    with pytest.raises(AssertionError):
        assert_routes(x, y, 6, *spoil(*result))


def test_checker_refuses_a_hidden_nan():
    x, y = torch.randn(2, 1, 5)
    x[0, 2] = float("nan")
    scores, indices = brute_force_router(x, y, 6)
    assert_routes(x, y, 6, scores, indices)
    with pytest.raises(AssertionError, match="hides"):
        assert_routes(x, y, 6, torch.zeros_like(scores), indices)


def test_checker_frees_only_rounding_ties():
    """2²⁴ + 1 and 2²⁴ are one fp32 number: those experts may change places, the exact ones may not."""
    x = torch.tensor([[2.0**24, 2.0**24, 1.0]])
    y = torch.tensor([[1.0, 0.0, -(2.0**24)]])
    # The sums: 2²⁴ four times, two of them rounded; then 2, 1, 0 twice (exactly), 1 - 2²⁴.
    assert rounding_ties(x, y, 9).tolist() == [[True] * 4 + [False] * 5]
    scores, indices = brute_force_router(x, y, 9)
    assert indices.tolist() == [[0, 1, 3, 4, 6, 7, 2, 5, 8]]
    for allowed in ([0, 1, 4], [1, 0, 3], [1, 3, 4], [3, 1, 4]):
        assert_routes(x, y, 3, scores[:, :3], torch.tensor([allowed], dtype=torch.int32))
    with pytest.raises(AssertionError, match="lower index first"):
        assert_routes(x, y, 3, scores[:, :3], torch.tensor([[0, 4, 1]], dtype=torch.int32))
    with pytest.raises(AssertionError, match="experts differ"):
        assert_routes(x, y, 7, scores[:, :7], torch.tensor([[0, 1, 3, 4, 6, 7, 5]], dtype=torch.int32))
