"""The networks sort whatever they are given: as lists of comparators, and as Triton runs them."""

import dataclasses
import itertools

import pytest
import torch
import triton
import triton.language as tl
from cases import ON_NVIDIA
from hypothesis import given
from hypothesis import strategies as st

from omni_kernels.factored import lanes, networks

LENGTHS = st.integers(1, 40)
KEYS = st.integers(-(1 << 31), (1 << 31) - 1)


def run(keys, kind, first, k):
    """What a network leaves of the k best keys."""
    comparators, outputs = networks._network(kind, len(keys), first, k)
    keys = list(keys)
    for i, j in comparators:
        keys[i], keys[j] = max(keys[i], keys[j]), min(keys[i], keys[j])
    return [keys[wire] for wire in outputs]


def descending(keys):
    return sorted(keys, reverse=True)


@given(st.lists(KEYS, min_size=1, max_size=70), LENGTHS)
def test_the_k_best_are_sorted(keys, k):
    assert run(keys, "sort", 0, k) == descending(keys)[:k]


@given(st.lists(KEYS, max_size=40), st.lists(KEYS, max_size=40), LENGTHS)
def test_the_k_best_of_two_lists_are_merged(a, b, k):
    assert run(descending(a) + descending(b), "merge", len(a), k) == descending(a + b)[:k]


@given(st.integers(0, 6).flatmap(lambda n: st.lists(KEYS, min_size=1 << n, max_size=1 << n)), st.data())
def test_as_many_as_the_first_list_has_are_taken_and_then_sorted(a, data):
    b = data.draw(st.lists(KEYS, max_size=len(a)))
    kept = run(descending(a) + descending(b), "best of", len(a), len(a))
    assert run(kept, "bitonic", 0, len(a)) == descending(a + b)[: len(a)]


@given(st.lists(KEYS, min_size=1, max_size=40))
def test_settling_sorts_at_last(keys):
    settled = keys
    for _ in range(len(keys) // 2 + 1):
        settled = run(settled, "settle", 0, len(keys))
    assert settled == descending(keys)


@pytest.mark.parametrize(
    ("kind", "count", "first", "k", "want"),
    [("sort", 16, 0, 16, 63), ("sort", 32, 0, 32, 191), ("sort", 64, 0, 1, 63), ("merge", 32, 16, 32, 65),
     ("merge", 2, 1, 1, 1), ("best of", 32, 16, 16, 16), ("bitonic", 16, 0, 16, 32), ("settle", 5, 0, 5, 4),
     ("merge", 8, 0, 8, 0)],
)  # fmt: skip
def test_no_comparator_is_wasted(kind, count, first, k, want):
    """Knuth's numbers of comparators, and those of the k best alone."""
    assert len(networks._network(kind, count, first, k)[0]) == want


@triton.jit
def sort_kernel(keys_ptr, best_ptr, turned_ptr, COUNT: tl.constexpr, K: tl.constexpr, PLAN: tl.constexpr,
                TILE_M: tl.constexpr):  # fmt: skip
    """The keys of a token are a column."""
    tokens, keys = tl.arange(0, TILE_M), ()
    for i in tl.static_range(COUNT):
        keys = keys + (tl.load(keys_ptr + i * TILE_M + tokens),)
    best = networks.sort(keys, K, PLAN)
    for rank in tl.static_range(len(best)):
        tl.store(best_ptr + rank * TILE_M + tokens, best[rank])
    tl.store(turned_ptr + tokens, networks.is_turned(keys, PLAN))


@pytest.mark.parametrize(("dtype", "doubles"), [(torch.int32, False), (torch.int64, False), (torch.int64, True)])
@pytest.mark.parametrize(("count", "k"), [(1, 1), (2, 1), (7, 3), (8, 8)])
def test_every_order_is_sorted_where_kernels_run(device, count, k, dtype, doubles):
    if doubles and not ON_NVIDIA:
        pytest.skip("keys are compared as doubles on NVIDIA GPUs alone")
    orders = list(itertools.permutations(range(-(count // 2), count - count // 2)))[:1024]
    keys = torch.tensor((orders * 1024)[:1024], device=device).T
    # Powers of two lie far apart as doubles, too, whose patterns these are.
    patterns = (keys.double().sign() * 2.0 ** keys.double().abs()).view(torch.int64) if doubles else keys.to(dtype)
    patterns = patterns.contiguous()
    best, turned = torch.empty_like(patterns[:k]), torch.empty(1024, dtype=torch.int32, device=device)
    plan = lanes.plan_of(8, 8, torch.float32, torch.float32, 0, False, doubles, 2)
    plan = dataclasses.replace(plan, ptx=ON_NVIDIA)
    sort_kernel[(1,)](patterns, best, turned, COUNT=count, K=k, PLAN=plan, TILE_M=1024)
    want = (patterns.view(torch.float64) if doubles else patterns).sort(0, descending=True).values[:k]
    assert torch.equal(best.view(want.dtype), want)
    assert torch.equal(turned, (keys.diff(dim=0) > 0).any(0).int())
