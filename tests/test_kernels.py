"""The factored kernels: the bits of the factored PyTorch version, and the definition's result, on every kind of token.
Then which kernel routes what.

Without a GPU no test here runs frontier_kernel, which is PTX for the most part, and lanes_kernel reads rows logit by
logit; test_ptx.py runs the code that GPUs run.
"""

import pytest
import torch
from cases import (
    DTYPES,
    ON_GPU,
    ON_NVIDIA,
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
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from omni_kernels import explain, factored, factored_router
from omni_kernels.checks import MAX_EXPERT_SQRT
from omni_kernels.configs import compares_doubles, kernel_input
from omni_kernels.factored import frontier, lanes, rows, tile

FP32, FP16, BF16 = DTYPES
# How to route, and the sizes for which every kind of token is.
SIZES = [
    (1, 1, BF16), (2, 1, FP16), (2, 4, FP32), (3, 2, BF16), (3, 9, FP32), (7, 5, FP16), (16, 16, FP32), (33, 1, FP16),
    (33, 31, BF16), (64, 5, FP32), (100, 2, FP32), (128, 16, BF16),
]  # fmt: skip
LANES = [*SIZES, (5, 25, BF16), (20, 7, FP32), (64, 32, FP16), (130, 32, FP32)]
ROUTES = {
    "2 lanes": [*LANES, (64, 16, BF16), (33, 5, FP16)],
    "16 lanes": LANES,
    "frontier": [],
    "tile": [case for case in SIZES if case[0] * case[1] <= 1000] + [(20, 7, FP32), (130, 5, FP16)],
    "PyTorch": [],
}
if ON_GPU:
    LANES = [  # staged and not, in one tile and several, in chunks, ragged, logit by logit
        (1, 1, BF16), (3, 9, FP32), (33, 31, FP16), (64, 1, BF16), (64, 32, BF16), (100, 10, BF16), (256, 16, BF16),
        (256, 16, FP32), (512, 8, FP16), (1000, 5, FP32), (8192, 32, BF16),
    ]  # fmt: skip
    ROUTES |= {
        "2 lanes": LANES,
        "16 lanes": LANES,
        "frontier": [  # one piece, several, several tiles of them; pieces that do not fill a row; fewer tokens a warp
            (1, 1, BF16), (7, 49, FP16), (33, 256, FP32), (64, 256, FP32), (100, 40, BF16), (256, 64, BF16),
            (300, 100, FP16), (1000, 256, FP32),
        ],
        "tile": [  # one tile and streamed, all columns and chunks
            (1, 1, BF16), (7, 49, BF16), (16, 16, FP32), (100, 2, FP16), (130, 64, FP32), (257, 16, BF16),
            (1000, 5, FP32), (9000, 2, FP16),
        ],
    }  # fmt: skip
SMALL = {
    "2 lanes": [(64, 4, BF16), (40, 7, FP32), (5, 3, BF16)],
    "4 lanes": [(64, 4, BF16), (40, 7, FP32)],
    "8 lanes": [(64, 4, BF16), (40, 7, FP32)],
    "16 lanes": [(64, 4, BF16)],
    "frontier": [(100, 40, BF16)],
    "tile": [(5, 3, BF16), (5, 3, FP32), (5, 3, FP16)],
}
LONG = {
    "16 lanes": [(8200, 4, FP16), *([(1 << 15, 2, BF16), (1 << 14, 8, FP32)] if ON_GPU else [])],
    "frontier": [(MAX_EXPERT_SQRT, 33, FP16)],
    "tile": [(700, 2, FP32), (9000, 2, FP16)],
}


def plan_of(route, x, y, k, scores_dtype):
    """The plan for these logits of a kernel, or of PyTorch."""
    if route == "PyTorch":
        return factored.PyTorchPlan(x.shape[1], k, x.dtype, scores_dtype, num_warps=0)
    x, y = kernel_input(x), kernel_input(y)
    if route in ("frontier", "tile"):
        return {"frontier": frontier, "tile": tile}[route].plan_for(x, y, k, scores_dtype)
    layout = rows.row_alignment(x, y), rows.columns_are_vectors(x, y)
    num_lanes = int(route.removesuffix(" lanes"))
    return lanes.plan_of(x.shape[1], k, x.dtype, scores_dtype, *layout, compares_doubles(x.device), num_lanes)


def route_by(route, x, y, k, scores_dtype=None):
    return factored.run(plan_of(route, x, y, k, scores_dtype or x.dtype), x, y)


def needs(route):
    """What a test of this way to route is marked with."""
    runs = ON_NVIDIA or (route != "frontier" and not ON_GPU) or route in ("tile", "PyTorch")
    return pytest.mark.skipif(not runs, reason="needs an NVIDIA GPU from Ampere on")


def every(sizes):
    """Parameters of all sizes of each way to route."""
    cases = [(route, *size) for route, listed in sizes.items() for size in listed]
    cases = [pytest.param(*case, marks=needs(case[0]), id="-".join(map(case_id, case))) for case in cases]
    return pytest.mark.parametrize(("route", "num_expert_sqrt", "k", "dtype"), cases)


def first(sizes):
    """Parameters of one size of each way to route."""
    return every({route: listed[:1] for route, listed in sizes.items()})


def assert_routed(route, x, y, k, scores_dtype=None):
    assert_same_bits(route_by(route, x, y, k, scores_dtype), factored_router(x, y, k, scores_dtype))


# Every way to route ---------------------------------------------------------------------------------------------------


@every({route: [*sizes, *SMALL.get(route, [])] for route, sizes in (ROUTES | {"4 lanes": [], "8 lanes": []}).items()})
def test_every_kind_of_token(route, num_expert_sqrt, k, dtype, device):
    repeats = 20 if ON_GPU and num_expert_sqrt < 1000 else 1
    x, y = adversarial_logits(num_expert_sqrt, dtype, device, seed=k, repeats=repeats)
    kinds = len(x) // repeats
    if ON_GPU:  # once more, so that some warps route no token that is extreme and some only such
        order = by_magnitude(x, y)
        x, y = torch.cat((x, x[order])), torch.cat((y, y[order]))
    with dirty_memory():
        result = route_by(route, x, y, k)
    assert_same_bits(result, factored_router(x, y, k))
    if num_expert_sqrt < 1000:  # the definition takes long
        assert_routes(x[:kinds], y[:kinds], k, *(part[:kinds] for part in result))


@every(
    {route: [size for size in sizes if size[2] == FP32] for route, sizes in ROUTES.items()}
    | ({} if ON_GPU else {"tile": [(20, 7, FP32)]})  # the interpreter takes long
)
def test_logits_that_differ_in_their_lowest_bits(route, num_expert_sqrt, k, dtype, device):
    x, y = close_logits(num_expert_sqrt, k, device, repeats=20 if ON_GPU else 1)
    assert_routed(route, x, y, k)


@every(
    {route: [(n, n * n, FP16) for n in (2, 3, 5)] for route in ("2 lanes", "16 lanes", "frontier")}
    | {"tile": [(n, n * n, FP16) for n in (2, 3, *([5] if ON_GPU else []))]}
)
def test_all_experts(route, num_expert_sqrt, k, dtype, device):
    x, y = adversarial_logits(num_expert_sqrt, dtype, device)
    scores, indices = route_by(route, x, y, k)
    assert torch.equal(indices.sort(1).values, torch.arange(k, device=device).int().expand(len(x), k))
    assert_same_bits((scores, indices), factored_router(x, y, k))


@every({"2 lanes": [(3, 4, None)], "frontier": [(7, 40, None)], "tile": [(3, 4, None)]})
def test_any_floats(route, num_expert_sqrt, k, dtype, device):
    @given(factors(sizes=st.just(num_expert_sqrt), max_tokens=20 if ON_GPU else 5))
    @settings(max_examples=300 if ON_GPU else 12, phases=list(Phase) if ON_GPU else [Phase.generate])  # no slow ones
    def check(logits):
        x, y = (part.to(device) for part in logits)
        result = route_by(route, x, y, k)
        assert_same_bits(result, factored_router(x, y, k))
        assert_routes(x, y, k, *result)

    check()


@first(SMALL)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 15, 16, 17, 32, 64, 65, 600, *([1500] if ON_GPU else [])])
def test_token_counts(num_tokens, route, num_expert_sqrt, k, dtype, device):
    """Warps and tiles that the tokens do not fill, and more than one program."""
    x, y = torch.randint(-3, 4, (2, num_tokens, num_expert_sqrt), device=device).to(dtype)
    assert_routed(route, x, y, k)


@every(SMALL)
def test_layout_does_not_matter(route, num_expert_sqrt, k, dtype, device):
    x, y = adversarial_logits(num_expert_sqrt, dtype, device, repeats=2 if ON_GPU else 1)
    for view_x, view_y in mixed_layouts(x, y):
        assert_routed(route, view_x, view_y, k)


@first(SMALL)
@pytest.mark.parametrize("offset", [0, 1, 2, 4])
def test_alignment_does_not_matter(offset, route, num_expert_sqrt, k, dtype, device):
    """Rows that begin at any multiple of 2 bytes, and some apart."""
    x, y = adversarial_logits(num_expert_sqrt, dtype, device)
    wide_x, wide_y = torch.full((2, len(x), num_expert_sqrt + 8), float("nan"), dtype=dtype, device=device)
    columns = slice(offset, offset + num_expert_sqrt)
    wide_x[:, columns], wide_y[:, columns] = x, y
    assert_same_bits(route_by(route, wide_x[:, columns], wide_y[:, columns], k), factored_router(x, y, k))


@first(SMALL | {"PyTorch": [(5, 3, BF16)]})
@pytest.mark.parametrize("scores_dtype", DTYPES, ids=dtype_name)
def test_dtype_of_the_scores(scores_dtype, route, num_expert_sqrt, k, dtype, device):
    assert_routed(route, *adversarial_logits(num_expert_sqrt, dtype, device), k, scores_dtype)


@every(SMALL)
def test_a_token_depends_on_no_neighbour_and_on_no_run(route, num_expert_sqrt, k, dtype, device):
    x, y = adversarial_logits(num_expert_sqrt, dtype, device, repeats=20 if ON_GPU else 1)
    want = route_by(route, x, y, k)
    assert_same_bits(route_by(route, x, y, k), want)
    order = torch.randperm(len(x), device=device)
    assert_same_bits(route_by(route, x[order], y[order], k), [part[order] for part in want])
    assert_same_bits(route_by(route, x[5:6], y[5:6], k), [part[5:6] for part in want])


@pytest.mark.parametrize(
    "route", [pytest.param(route, marks=needs(route)) for route in ("2 lanes", "frontier", "tile")]
)
def test_offsets_beyond_2_31_elements(route, device):
    assert_routed(route, *far_apart_logits(device), 4)


@every(LONG)
def test_long_rows(route, num_expert_sqrt, k, dtype, device):
    """Columns whose numbers take many bits of a key, and the longest rows."""
    x, y = torch.randn(2, 3, num_expert_sqrt, device=device).to(dtype)
    x[0, -1] = x[2, -1] = y[0, -1] = y[1, -1] = 10.0
    assert_routed(route, x, y, k)


# How lanes_kernel and frontier_kernel read rows -----------------------------------------------------------------------


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
    assert_same_bits(route_by("2 lanes", columns_x, columns_y, k), want)
    assert_same_bits(route_by("2 lanes", columns_x, y, k), want)


def test_which_columns_are_vectors():
    logits = torch.zeros(64, 40, dtype=BF16)
    assert rows.columns_are_vectors(logits.t(), logits.t())
    assert rows.columns_are_vectors(logits.t()[:32], logits.t()[8:])
    assert not rows.columns_are_vectors(logits, logits)
    assert not rows.columns_are_vectors(logits.t(), logits[:40, :40])
    assert not rows.columns_are_vectors(logits.t()[1:9], logits.t()[:8])  # begin in the middle of a vector
    assert not rows.columns_are_vectors(logits.t()[:36], logits.t()[:36])  # end in the middle of one
    assert not rows.columns_are_vectors(logits[:, :36].clone().t(), logits[:, :36].clone().t())


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("num_expert_sqrt", [16, 33, 64, 256, 1000, MAX_EXPERT_SQRT])
def test_lists_fit_in_shared_memory(num_expert_sqrt, dtype):
    for k in (1, 33, 64, 128, frontier.MAX_EXPERTS_PER_TOKEN):
        plan = frontier.plan_of(num_expert_sqrt, k, dtype, dtype, 16, True)
        ranks, key_bytes = min(k, num_expert_sqrt), 8 if dtype == torch.float32 else 4
        pitch = ((k + 1) // 2 | 1) * 4
        num_bytes = plan.tokens * (pitch + 2 * (ranks + 1) * key_bytes)
        assert plan.shared_bytes == num_bytes <= frontier.SHARED_BYTES
        assert plan.tokens == 16 or num_bytes * 2 > frontier.SHARED_BYTES


# The choice of a kernel -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["NVIDIA", "elsewhere", "interpreter"])
def place(request, monkeypatch):
    """Where the choice believes to be. Nothing is launched there."""
    for kernel in (lanes, frontier):
        monkeypatch.setattr(kernel, "interpreting", lambda: request.param == "interpreter", raising=False)
        monkeypatch.setattr(kernel, "on_nvidia", lambda _: request.param == "NVIDIA")
    monkeypatch.setattr(factored, "has_kernels", lambda _: True)
    lanes.plan_of.cache_clear()
    yield request.param
    lanes.plan_of.cache_clear()


@pytest.mark.parametrize(
    ("num_expert_sqrt", "k", "on_nvidia", "elsewhere", "interpreter"),
    [
        (1, 1, "lanes", "tile", "lanes"),
        (256, 32, "lanes", "tile", "lanes"),
        (8192, 32, "lanes", "tile", "lanes"),
        (8193, 32, "frontier", "tile", "tile"),
        (256, 33, "frontier", "tile", "tile"),
        (256, 64, "frontier", "tile", "tile"),
        (256, 65, "frontier", "PyTorch", "PyTorch"),
        (256, 256, "frontier", "PyTorch", "PyTorch"),
        (256, 257, "PyTorch", "PyTorch", "PyTorch"),
        (1 << 15, 2, "lanes", "tile", "lanes"),
        ((1 << 15) + 1, 1, "frontier", "tile", "tile"),
        (MAX_EXPERT_SQRT, 1, "frontier", "tile", "tile"),
        (MAX_EXPERT_SQRT, 65, "frontier", "PyTorch", "PyTorch"),
        (MAX_EXPERT_SQRT, 256, "frontier", "PyTorch", "PyTorch"),
    ],
)
def test_choice(num_expert_sqrt, k, on_nvidia, elsewhere, interpreter, place):
    want = {"NVIDIA": on_nvidia, "elsewhere": elsewhere, "interpreter": interpreter}[place]
    kernels = {"lanes": lanes.lanes_kernel, "frontier": frontier.frontier_kernel, "tile": tile.tile_kernel}
    x = torch.zeros(1, num_expert_sqrt)
    assert explain(x, x, k).kernel is kernels.get(want)


def test_choice_without_kernels(monkeypatch):
    monkeypatch.setattr(factored, "has_kernels", lambda _: False)
    assert explain(torch.zeros(1, 8), torch.zeros(1, 8), 4).kernel is None


def test_many_lanes_share_a_token_where_there_are_few(device):
    for num_expert_sqrt in (1, 2, 7, 64, 256, 4096):
        for dtype in DTYPES:
            row = torch.zeros(1, num_expert_sqrt, dtype=dtype, device=device)
            most_few = lanes.most_few_tokens(num_expert_sqrt, row.device)

            def num_lanes(num_tokens, **few_tokens):
                logits = row.expand(num_tokens, -1)  # noqa: B023
                return lanes.plan_for(logits, logits, 1, dtype, **few_tokens).lanes  # noqa: B023

            counts = [num_lanes(1 << i) for i in range(25)]
            assert counts == sorted(counts, reverse=True)
            assert set(counts) <= {2, 4, 8, 16}
            assert counts[-1] == num_lanes(most_few + 1) == num_lanes(1, few_tokens=False) == 2
            if most_few:
                assert counts[0] == num_lanes(most_few) == num_lanes(1 << 20, few_tokens=True)
                assert counts[0] == 2 or counts[0] * 8 <= num_expert_sqrt * dtype.itemsize
    row = torch.zeros(1, 256, dtype=BF16, device=device)
    assert lanes.plan_for(row, row, 1, BF16).lanes == 16
