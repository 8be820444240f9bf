"""Adaptive routing against its definition over all N² experts; groups of pairs against lists made in a loop."""

import functools
import re

import numpy as np
import pytest
import torch
from cases import (
    BITS,
    DTYPES,
    INF,
    NAN,
    ON_GPU,
    adversarial_logits,
    assert_same_bits,
    dirty_memory,
    dtype_name,
    factors,
    is_poisoned,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jvp
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from omni_kernels import adaptive, adaptive_router, omni_router, to_csr

pytestmark = pytest.mark.usefixtures("pytorch_routes")

FP32, FP16, BF16 = DTYPES
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
LIMITS = ("top_p", "min_p", "threshold")
SOME_LIMITS = [("top_p", 0.5), ("top_p", 1.0), ("min_p", 0.3), ("threshold", 0.05)]
EVERY_LIMIT = pytest.mark.parametrize(("limit", "value"), SOME_LIMITS)
TINY = 2.0**-148  # smaller probabilities may be 0 in fp32
BACKENDS = ["aot_eager", "inductor"] if ON_GPU else ["aot_eager"]  # without a GPU inductor asks for a C++ compiler


def random_logits(*shape, dtype=FP32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple((2 * torch.randn(2, *shape, generator=generator)).to(dtype).to(device).unbind())


def probabilities(x, y):
    """Of all N² experts, fp64; 0 of a token all of whose experts are masked, NaN of one with NaN or +inf."""
    parts = []
    for logits in (x, y):
        best = logits.detach().double().amax(-1, keepdim=True)
        parts.append(logits.double() - best.masked_fill(best == -INF, 0.0))
    sums = (parts[0][..., :, None] + parts[1][..., None, :]).flatten(-2)
    masked = (sums == -INF).all(-1, keepdim=True)
    return sums.masked_fill(masked, 0.0).softmax(-1).masked_fill(masked, 0.0)


def definition(chances, limit, value):
    """How many of a token's experts are kept, given their probabilities in order; None where rounding may decide."""
    chances = chances.tolist()
    if any(chance != chance for chance in chances):
        return len(chances)
    total = 0.0
    for count, chance in enumerate(chances):
        if chance < TINY / 8:
            return count
        have, need = {
            "top_p": (value if value < 1 else INF, total),
            "min_p": (chance, value * chances[0]),
            "threshold": (chance, value),
        }[limit]
        if chance < TINY or abs(have - need) <= 1e-5 * need + TINY:
            return None
        if have < need:
            return count
        total += chance
    return len(chances)


def assert_adaptive(x, y, k, limit, value, scores_dtype=None):
    """The count is the definition's, the rest is omni_router's. Returns the counts and how many are beyond doubt."""
    with dirty_memory():
        scores, indices, counts = adaptive_router(x, y, k, **{limit: value}, scores_dtype=scores_dtype)
    assert scores.shape == indices.shape == (len(x), k)
    assert counts.shape == (len(x),)
    assert (scores.dtype, indices.dtype, counts.dtype) == (scores_dtype or x.dtype, torch.int32, torch.int32)
    all_scores, all_indices = omni_router(x, y, k, scores_dtype=FP32, normalize="softmax")
    kept = torch.arange(k, device=x.device) < counts[:, None]
    want = torch.where(kept, all_scores, 0.0).to(scores.dtype), torch.where(kept, all_indices, -1)
    assert_same_bits((scores, indices), want)

    chances = probabilities(x, y).gather(1, all_indices.long())
    want = [definition(token, limit, value) for token in chances]
    wrong = [pair for pair in zip(counts.tolist(), want, strict=True) if pair[1] is not None and pair[0] != pair[1]]
    assert not wrong
    return counts, sum(count is not None for count in want)


# How many are kept ---------------------------------------------------------------------------------------------------


@EVERY_LIMIT
@ALL_DTYPES
@pytest.mark.usefixtures("kernels")
def test_kernels_keep_what_pytorch_does(dtype, limit, value, device):
    x, y = adversarial_logits(5, dtype, device)
    for k in (1, 7):
        got = adaptive_router(x, y, k, **{limit: value})
        probabilities, experts = omni_router(x, y, k, FP32, "softmax")
        dropped = adaptive._dropped(probabilities, limit, value)
        want = probabilities.masked_fill(dropped, 0.0).to(dtype), experts.masked_fill(dropped, -1)
        assert_same_bits(got[:2], want)
        assert torch.equal(got[2], (~dropped).sum(-1, dtype=torch.int32))


@given(factors(sizes=st.integers(1, 6)), st.data())
def test_counts_of_any_logits(device, both, data):
    x, y = (part.to(device) for part in both)
    k = data.draw(st.integers(0, x.shape[1] ** 2), "k")
    limit = data.draw(st.sampled_from(LIMITS), "limit")
    special = st.sampled_from([1, 1.0, 0.5, 0.1, 1e-10, 2.0**-149, 5e-324])
    value = data.draw(st.one_of(special, st.floats(0, 1, exclude_min=True)), "value")
    assert_adaptive(x, y, k, limit, value, data.draw(st.sampled_from([None, *DTYPES]), "scores_dtype"))


@EVERY_LIMIT
@ALL_DTYPES
def test_counts_of_every_kind_of_token(dtype, limit, value, device):
    assert_adaptive(*adversarial_logits(5, dtype, device, seed=1), 12, limit, value)


@pytest.mark.parametrize(("limit", "value"), [("top_p", 0.7), ("min_p", 0.2), ("threshold", 0.03)])
@ALL_DTYPES
def test_counts_of_random_logits(dtype, limit, value, device):
    """Nearly all are beyond doubt, and there are many different ones."""
    x, y = random_logits(200, 6, dtype=dtype, device=device)
    counts, num_clear = assert_adaptive(x, y, 20, limit, value)
    assert num_clear >= 195
    assert len(counts.unique()) >= 8


def test_counts_where_probabilities_are_exact(device):
    """16 experts of probability 1/16: what reaches the limit exactly is enough."""
    x = torch.zeros(1, 4, device=device)
    for limit, value, k, want in [
        ("top_p", 0.5, 16, 8),
        ("top_p", 0.5 + 2.0**-50, 16, 9),
        ("top_p", 0.5 - 2.0**-50, 16, 8),
        ("top_p", 1 - 2.0**-53, 16, 16),
        ("top_p", 2.0**-1000, 16, 1),
        ("top_p", 1 / 16, 16, 1),
        ("top_p", 0.5, 5, 5),
        ("top_p", 1, 16, 16),
        ("min_p", 1, 16, 16),
        ("min_p", 0.5, 7, 7),
        ("threshold", 1 / 16, 16, 16),
        ("threshold", 0.063, 16, 0),
        ("threshold", 1, 16, 0),
    ]:
        scores, indices, counts = adaptive_router(x, x, k, **{limit: value})
        assert counts.tolist() == [want]
        assert indices.tolist() == [[*range(want)] + [-1] * (k - want)]
        assert scores.tolist() == [[1 / 16] * want + [0.0] * (k - want)]


def test_threshold_and_probability_are_rounded_alike(device):
    """1/9 in fp32 is no 1/9, on either side."""
    x = torch.zeros(1, 3, device=device)
    assert adaptive_router(x, x, 9, threshold=1 / 9)[2].tolist() == [9]


def test_top_p_of_one_keeps_all_that_are_possible(device):
    """Also past the expert at which the rounded sum is 1."""
    x = torch.tensor([[30.0, 0.0, -INF], [0.0, -200.0, -INF]], device=device)
    y = torch.tensor([[0.0, -1.0, -INF], [0.0, -INF, -INF]], device=device)
    scores, _, counts = adaptive_router(x, y, 9, top_p=1.0)
    assert counts.tolist() == [4, 1]  # exp(-200) is 0 in fp32
    assert (scores[0, :4] > 0).all()
    assert adaptive_router(x, y, 3, top_p=1)[2].tolist() == [3, 1]
    x, y = (torch.tensor([row], device=device) for row in ([80.0, 0.0], [0.0, -INF]))
    assert adaptive_router(x, y, 4, top_p=1.0)[2].tolist() == [2]
    assert adaptive_router(x, y, 4, top_p=1 - 2.0**-53)[2].tolist() == [1]  # what has probability 1 in fp32 is enough


def test_an_expert_is_kept_only_if_all_before_it_are(device):
    """In fp32 both sums are 2**24, so the lower row comes first, though the other is e times as probable."""
    x, y = (torch.tensor([row], device=device) for row in ([0.0, 1.0], [2.0**24, -INF]))
    for limit, value, want in [("threshold", 0.5, 0), ("threshold", 0.25, 2), ("min_p", 1.0, 2), ("top_p", 0.3, 2)]:
        scores, indices, counts = adaptive_router(x, y, 3, **{limit: value})
        assert counts.tolist() == [want]
        assert indices.tolist() == [[0, 2, -1] if want else [-1, -1, -1]]
        if want:
            torch.testing.assert_close(scores.cpu(), torch.tensor([[0.26894142, 0.73105858, 0.0]]))


@EVERY_LIMIT
def test_masked_and_poisoned_tokens(limit, value, device):
    x, y = random_logits(6, 4, device=device)
    x[0] = -INF
    y[1] = -INF
    x[2, 1] = y[3, 0] = NAN
    x[4, 3] = INF
    scores, indices, counts = adaptive_router(x, y, 5, **{limit: value})
    assert counts.tolist()[:5] == [0, 0, 5, 5, 5]
    assert not scores[:2].any()
    assert (indices[:2] == -1).all()
    assert scores[2:5].isnan().all()
    assert ((indices[2:5] >= 0) & (indices[2:5] < 16)).all()
    others = ~is_poisoned(x, y)
    assert_same_bits(
        [part[others] for part in (scores, indices, counts)],
        adaptive_router(x[others], y[others], 5, **{limit: value}),
    )


@EVERY_LIMIT
@pytest.mark.parametrize("shape", [(4,), (0, 4), (0, 3, 4), (2, 3, 4), (1, 2, 3, 4)])
@pytest.mark.parametrize("k", [0, 5])
def test_leading_dimensions(shape, k, limit, value, device):
    x, y = random_logits(*shape, device=device)
    scores, indices, counts = adaptive_router(x, y, k, **{limit: value})
    assert scores.shape == indices.shape == (*shape[:-1], k)
    assert counts.shape == shape[:-1]
    flat = adaptive_router(x.reshape(-1, 4), y.reshape(-1, 4), k, **{limit: value})
    num_tokens = flat[2].shape
    assert_same_bits((scores.view(*num_tokens, k), indices.view(*num_tokens, k), counts.view(num_tokens)), flat)


# Gradients -----------------------------------------------------------------------------------------------------------


@EVERY_LIMIT
@ALL_DTYPES
def test_gradients(dtype, limit, value, device):
    """Those of the definition in fp64, with the experts and counts given."""
    x, y = (part.requires_grad_() for part in random_logits(20, 5, dtype=dtype, device=device))
    scores, indices, counts = adaptive_router(x, y, 12, **{limit: value}, scores_dtype=FP32)
    assert not indices.requires_grad
    assert not counts.requires_grad
    weights = torch.randn(20, 12, generator=torch.Generator().manual_seed(1)).to(device)
    got = torch.autograd.grad(scores, (x, y), weights)
    assert [part.dtype for part in got] == [dtype, dtype]

    leaves = [part.detach().double().requires_grad_() for part in (x, y)]
    kept = indices >= 0
    loss = (probabilities(*leaves).gather(1, indices.long().clamp(min=0)) * weights)[kept].sum()
    want = torch.autograd.grad(loss, leaves)
    tolerance = {FP32: 1e-6, FP16: 1e-3, BF16: 1e-2}[dtype]
    torch.testing.assert_close([part.double() for part in got], list(want), rtol=tolerance, atol=1e-6)
    assert counts.sum() == kept.sum()


@EVERY_LIMIT
def test_no_gradient_comes_from_what_is_not_kept(limit, value, device):
    x, y = (part.requires_grad_() for part in random_logits(20, 5, device=device))
    with torch.no_grad():
        x[0], y[1, :4], x[2, 1:] = -INF, -INF, -INF
    scores, indices, counts = adaptive_router(x, y, 12, **{limit: value})
    weights = torch.randn(20, 12, device=device)
    got, want = (
        torch.autograd.grad(scores, (x, y), torch.where(indices < 0, other, weights), retain_graph=True)
        for other in (NAN, 0.0)
    )
    assert (counts < 12).any()
    assert_same_bits(got, want)
    assert all(part.isfinite().all() for part in got)
    assert not got[0][0].any()


# Arguments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [True, torch.tensor(0.5), np.float32(0.5), "0.5", [0.5], 0.5j])
@pytest.mark.parametrize("limit", LIMITS)
def test_limits_of_wrong_types(limit, value):
    x = torch.zeros(2, 3)
    with pytest.raises(TypeError, match=re.escape(f"{limit} must be a float, got {type(value).__name__} {value!r}")):
        adaptive_router(x, x, 2, **{limit: value})


@pytest.mark.parametrize("value", [0, 0.0, -0.5, 2, 1.0000001, NAN, INF, 10**400])
@pytest.mark.parametrize("limit", LIMITS)
def test_limits_out_of_range(limit, value):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=re.escape(f"{limit} must be above 0 and at most 1, got {value!r}")):
        adaptive_router(x, x, 2, **{limit: value})


def test_one_limit_and_no_more():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="exactly one of top_p, min_p, threshold must be given, got none"):
        adaptive_router(x, x, 2)
    with pytest.raises(ValueError, match="must be given, got top_p and threshold"):
        adaptive_router(x, x, 2, top_p=0.5, threshold=0.5)


def test_other_bad_arguments(monkeypatch):
    """Nothing is routed before they are found."""
    x = torch.zeros(2, 3)
    for args, options, error, message in [
        ((x, x, 10), {}, ValueError, "max_experts_per_token must be from 0 to num_expert_sqrt² = 9, got 10"),
        ((x, x, 2.0), {}, TypeError, "max_experts_per_token must be an int, got float 2.0"),
        ((x, x[:1], 2), {}, ValueError, "router_logits_y must have the shape of router_logits_x"),
        ((x, None, 2), {}, TypeError, "router_logits_y must be a torch.Tensor, got NoneType"),
        ((x, x, 2), {"scores_dtype": torch.float64}, TypeError, "scores_dtype must be None, float32"),
    ]:
        with monkeypatch.context() as patch, pytest.raises(error, match=re.escape(message)):
            patch.setattr("omni_kernels.router._OMNI_ROUTER", None)
            adaptive_router(*args, top_p=0.5, **options)


# Compilers, transforms, graphs ---------------------------------------------------------------------------------------


def route_and_group(x, y, limit="top_p", value=0.6):
    scores, indices, counts = adaptive_router(x, y, 5, **{limit: value})
    return scores, indices, counts, *to_csr(scores, indices, counts, x.shape[-1] ** 2)


def with_gradients(function, x, y):
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    results = function(x, y)
    loss = sum(
        (part * torch.linspace(-1, 1, part.numel(), device=x.device).view_as(part)).sum() for part in results[:4:3]
    )
    return [part.detach() for part in results], torch.autograd.grad(loss, (x, y))


def assert_alike(got, want):
    """The same experts and groups; probabilities may be rounded in another order."""
    for left, right in zip(got[0], want[0], strict=True):
        torch.testing.assert_close(left, right)
        assert left.is_floating_point() or torch.equal(left, right)
    torch.testing.assert_close(got[1], want[1])


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@EVERY_LIMIT
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend, limit, value, device):
    function = functools.partial(route_and_group, limit=limit, value=value)
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=False)
    x, y = random_logits(6, 4, device=device)
    assert_alike(with_gradients(compiled, x, y), with_gradients(function, x, y))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_once_for_all_token_counts(backend, device):
    compiled = torch.compile(route_and_group, fullgraph=True, backend=backend, dynamic=True)
    with_gradients(compiled, *random_logits(6, 4, device=device))
    with torch.compiler.set_stance("fail_on_recompile"):
        for num_tokens in (2, 7, 100):
            x, y = random_logits(num_tokens, 4, device=device)
            assert_alike(with_gradients(compiled, x, y), with_gradients(route_and_group, x, y))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("limit", LIMITS)
def test_compiles_for_limits_that_change(limit, device):
    def route(x, y, value):
        return adaptive_router(x, y, 5, **{limit: value})

    compiled = torch.compile(route, fullgraph=True, backend="aot_eager")
    x, y = random_logits(6, 4, device=device)
    for value in (0.1, 0.5, 0.7, 1.0, 1):
        assert_alike((compiled(x, y, value), ()), (route(x, y, value), ()))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_compiles_for_hardly_any_tokens(num_tokens, device):
    x, y = random_logits(num_tokens, 4, device=device)
    compiled = torch.compile(route_and_group, fullgraph=True, backend="aot_eager")
    assert_alike(with_gradients(compiled, x, y), with_gradients(route_and_group, x, y))


@pytest.mark.usefixtures("fresh_compiler")
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_token_counts_that_the_data_tells(device):
    x, y = random_logits(6, 4, device=device)
    some = torch.tensor([1, 0, 1, 1, 0, 1], device=device).bool()
    compiled = torch.compile(lambda x, y, some: route_and_group(x[some], y[some]), fullgraph=True, backend="aot_eager")
    got = with_gradients(lambda x, y: compiled(x, y, some), x, y)
    assert_alike(got, with_gradients(lambda x, y: route_and_group(x[some], y[some]), x, y))


@pytest.mark.parametrize("strict", [False, True])
def test_exports(strict, device):
    class Layer(torch.nn.Module):
        def forward(self, x, y):
            return route_and_group(x, y)

    tokens = torch.export.Dim("tokens", min=2)
    example = random_logits(6, 4, device=device)
    program = torch.export.export(Layer(), example, dynamic_shapes=({0: tokens}, {0: tokens}), strict=strict)
    for num_tokens in (2, 9):
        x, y = random_logits(num_tokens, 4, device=device)
        assert_alike((program.module()(x, y), ()), (route_and_group(x, y), ()))


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(tracing_mode, device):
    x, y = random_logits(6, 4, device=device)
    traced = make_fx(lambda x, y: route_and_group(x, y), tracing_mode=tracing_mode)(x, y)
    assert_alike((traced(y, x), ()), (route_and_group(y, x), ()))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # searchsorted is run once for every part of a batch
def test_transforms(device):
    """vmap is a loop; a functional gradient is autograd's; a tangent is what the gradient says."""
    x, y = random_logits(3, 6, 4, device=device)
    loop = [torch.stack(parts) for parts in zip(*map(route_and_group, x, y), strict=True)]
    assert_alike((torch.vmap(route_and_group)(x, y), ()), (loop, ()))

    def loss(x, y):
        scores, *_, grouped, offsets, _ = route_and_group(x, y)
        return (scores**2).sum() + (grouped * torch.arange(grouped.numel(), device=device)).sum() + offsets.sum()

    leaves = [part[0].clone().requires_grad_() for part in (x, y)]
    want = torch.autograd.grad(loss(*leaves), leaves)
    assert all(part.any() for part in want)
    torch.testing.assert_close(grad(loss, (0, 1))(x[0], y[0]), want)
    torch.testing.assert_close(torch.vmap(grad(loss))(x, y)[0], want[0])
    _, tangent = jvp(loss, (x[0], y[0]), (x[1], y[1]))
    torch.testing.assert_close(tangent, (want[0] * x[1]).sum() + (want[1] * y[1]).sum())


WAIT = {"_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim"}
ADD_IN_NO_ORDER = {"scatter_add", "scatter_reduce", "index_add", "index_put", "bincount", "histc"}


class Refusing(TorchDispatchMode):
    """Sees every operator, and refuses those that wait for a GPU or add up in no order there."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__.removesuffix("_")
        self.seen.add(name)
        assert name not in WAIT | ADD_IN_NO_ORDER, name
        if name == "index":
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "index by a mask waits"
        if name == "cumsum":
            assert not args[0].is_floating_point(), "cumsum adds floats in no order"
        results = function(*args, **(kwargs or {}))
        if name == "_to_copy":
            assert results.device == args[0].device, "a copy to another device waits"
        return results


@EVERY_LIMIT
def test_nothing_waits_or_adds_in_no_order(limit, value, device):
    x, y = (part.requires_grad_() for part in random_logits(6, 4, device=device))
    with Refusing() as watching:
        scores, *_, grouped, _, _ = route_and_group(x, y, limit, value)
        (scores.sum() + (grouped**2).sum()).backward()
    assert {"omni_router", "omni_router_backward", "sort", "scatter", "gather"} <= watching.seen
    for refused in (lambda: scores[scores > 0], lambda: scores.sum().item(), lambda: scores.detach().cumsum(1)):
        with pytest.raises(AssertionError), Refusing():
            refused()


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_cuda_graph():
    x, y = random_logits(64, 16, device="cuda")
    others = random_logits(64, 16, device="cuda", seed=1)
    route_and_group(x, y)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = route_and_group(x, y)
    for part, other in zip((x, y), others, strict=True):
        part.copy_(other)
    graph.replay()
    assert_same_bits(results, route_and_group(*others))


# Groups --------------------------------------------------------------------------------------------------------------


@st.composite
def pairs(draw):
    """scores, indices, counts or None, num_experts: as a router chooses, and less orderly."""
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3))) + (draw(st.integers(0, 5)),)
    num_experts = draw(st.sampled_from([1, 2, 5, 30, 2**17]))
    numel = int(np.prod(shape))
    experts = draw(st.lists(st.integers(-1, min(num_experts - 1, 9)), min_size=numel, max_size=numel))
    indices = torch.tensor(experts, dtype=draw(st.sampled_from([torch.int32, torch.int64]))).view(shape)
    if num_experts > 1000:
        indices[indices >= 0] += num_experts - 10
    counts = None
    if draw(st.booleans()):
        numel = int(np.prod(shape[:-1]))
        counts = draw(st.lists(st.integers(0, shape[-1]), min_size=numel, max_size=numel))
        counts = torch.tensor(counts, dtype=draw(st.sampled_from([torch.int32, torch.int64]))).view(shape[:-1])
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(numel)).to(draw(st.sampled_from(DTYPES)))
    return scores, indices, counts, num_experts


def kept_pairs(scores, indices, counts):
    """Whether each is to be found in the groups, (num_tokens, k)."""
    k = scores.shape[-1]
    kept = indices.reshape(scores.shape[:-1].numel(), k) >= 0
    return kept if counts is None else kept & (torch.arange(k, device=scores.device) < counts.reshape(-1, 1))


@given(pairs())
def test_groups_of_any_pairs(device, problem):
    """As lists that a loop over tokens appends to."""
    *tensors, num_experts = problem
    scores, indices, counts = (part if part is None else part.to(device) for part in tensors)
    with dirty_memory():
        groups = to_csr(scores, indices, counts, num_experts)
    kept = kept_pairs(scores, indices, counts)
    k, length = scores.shape[-1], scores.numel()
    lists = {}
    for token, slot in kept.nonzero().tolist():
        expert = indices.reshape(kept.shape)[token, slot].item()
        lists.setdefault(expert, []).append((token, scores.reshape(kept.shape)[token, slot].item(), token * k + slot))

    tokens, grouped, offsets, positions = groups
    assert (tokens.shape, tokens.dtype) == ((length,), torch.int32)
    assert (grouped.shape, grouped.dtype) == ((length,), scores.dtype)
    assert (offsets.shape, offsets.dtype) == ((num_experts + 1,), torch.int32)
    assert (positions.shape, positions.dtype) == (indices.shape, torch.int64)
    assert offsets[0] == 0
    assert offsets[-1] == kept.sum()
    order = positions.flatten().argsort().tolist()
    assert sorted(positions.flatten().tolist()) == [*range(length)]
    ends = offsets[1:].tolist()
    starts = offsets.tolist()
    assert {expert for expert in range(num_experts) if ends[expert] > starts[expert]} == set(lists)
    for expert, want in lists.items():
        part = range(starts[expert], ends[expert])
        assert [(tokens[i].item(), grouped[i].item(), order[i]) for i in part] == want
    assert (tokens[offsets[-1] :] == -1).all()
    assert (grouped[offsets[-1] :] == 0).all()


@given(pairs())
def test_round_trip(device, problem):
    """The padded form comes back from the groups alone, and by the positions."""
    *tensors, num_experts = problem
    scores, indices, counts = (part if part is None else part.to(device) for part in tensors)
    tokens, grouped, offsets, positions = to_csr(scores, indices, counts, num_experts)
    kept = kept_pairs(scores, indices, counts).view(scores.shape)
    assert_same_bits((grouped[positions],), (torch.where(kept, scores, 0),))
    experts = torch.repeat_interleave(torch.arange(num_experts, device=device), offsets.diff())
    experts = torch.cat((experts, experts.new_full((scores.numel() - len(experts),), -1)))
    assert torch.equal(experts[positions], torch.where(kept, indices, -1).long())
    own = torch.arange(scores.shape[:-1].numel(), device=device).view(*scores.shape[:-1], 1).expand(scores.shape)
    assert torch.equal(tokens[positions].long(), torch.where(kept, own, -1))


def test_groups_are_the_same_on_every_run(device):
    x, y = random_logits(2000, 8, device=device)
    scores, indices, counts = adaptive_router(x, y, 16, top_p=0.8)
    want = to_csr(scores, indices, counts, 64)
    for _ in range(3):
        assert_same_bits(to_csr(scores, indices, counts, 64), want)
    with dirty_memory():
        assert_same_bits(to_csr(scores, indices, counts, 64), want)


@ALL_DTYPES
def test_gradient_of_groups_is_a_permutation(dtype, device):
    """Bit for bit, NaN and zeros of both signs too; 0 of what is not there."""
    x, y = random_logits(30, 4, dtype=dtype, device=device)
    scores, indices, counts = adaptive_router(x, y, 9, min_p=0.2)
    leaf = scores.clone().requires_grad_()
    _, grouped, offsets, positions = to_csr(leaf, indices, counts, 16)
    incoming = torch.randn(grouped.shape, device=device).to(dtype)
    incoming[:3] = torch.tensor([NAN, -0.0, INF])
    incoming[offsets[-1] :] = NAN
    (got,) = torch.autograd.grad(grouped, leaf, incoming, create_graph=True)
    kept = indices >= 0
    assert not kept.all()
    assert_same_bits((got,), (incoming[positions].masked_fill(~kept, 0.0),))
    assert got[kept].view(BITS[dtype]).tolist() == incoming[positions][kept].view(BITS[dtype]).tolist()


def test_groups_of_the_plain_router(device):
    """All k, without counts; a masked expert is an expert, -1 is none."""
    x, y = random_logits(7, 4, device=device)
    x[0] = -INF
    scores, indices = omni_router(x, y, 5)
    groups = to_csr(scores, indices, None, 16)
    assert groups.offsets[-1] == 35
    all_of_them = torch.full((7,), 5, device=device)
    assert_same_bits(groups, to_csr(scores, indices, all_of_them, 16))
    scores, indices, counts = adaptive_router(x, y, 5, threshold=0.1)
    assert_same_bits(to_csr(scores, indices, None, 16), to_csr(scores, indices, counts, 16))


def test_grouped_experts_are_the_dense_layer(device):
    """A layer of 9 small experts: every one on its group of tokens alone, and all experts on all tokens."""
    generator = torch.Generator().manual_seed(0)

    def parameters():
        generator.manual_seed(0)
        sizes = (2, 3, 8), (2, 3, 8), (9, 8, 8)
        return [torch.randn(size, generator=generator).to(device).requires_grad_() for size in sizes]

    tokens = torch.randn(2, 10, 8, generator=generator).to(device)

    def dense(gate_x, gate_y, experts):
        x, y = tokens @ gate_x[0].T, tokens @ gate_y[0].T
        chances = probabilities(x, y)
        with torch.no_grad():
            best = chances.topk(4, dim=-1)
            used = best.values.cumsum(-1) - best.values < 0.6
        weights = torch.zeros_like(chances).scatter(-1, best.indices, used.double()) * chances
        outputs = torch.einsum("bte, bti, eio -> bto", weights, tokens.double(), experts.double())
        return outputs.float(), used.sum(-1)

    def grouped(gate_x, gate_y, experts):
        scores, indices, counts = adaptive_router(tokens @ gate_x[0].T, tokens @ gate_y[0].T, 4, top_p=0.6)
        groups = to_csr(scores, indices, counts, 9)
        rows = tokens.flatten(0, 1)[groups.tokens]
        ends = groups.offsets.tolist()
        parts = [rows[first:last] @ expert for first, last, expert in zip(ends, ends[1:], experts, strict=False)]
        outputs = torch.cat([*parts, torch.zeros_like(rows[ends[-1] :])]) * groups.scores[:, None]
        return outputs[groups.positions].sum(-2), counts

    results = []
    for layer in (grouped, dense):
        leaves = parameters()
        outputs, counts = layer(*leaves)
        results.append((outputs, *torch.autograd.grad((outputs * tokens).sum(), leaves)))
        results[-1] += (counts.long(),)
    torch.testing.assert_close(*results)
    assert len(results[0][-1].unique()) > 1
    assert results[0][1].any()


SCORES, INDICES, COUNTS = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
META = {"device": "meta", "dtype": torch.int32}
BAD_PAIRS = [
    ((None, INDICES, COUNTS, 4), TypeError, "scores must be a torch.Tensor, got NoneType"),
    (
        (SCORES.double(), INDICES, COUNTS, 4),
        TypeError,
        "scores must be float32, float16 or bfloat16, got torch.float64",
    ),
    ((SCORES.to_sparse(), INDICES, COUNTS, 4), TypeError, "scores must be dense, got torch.sparse_coo"),
    (
        (SCORES.sum(), INDICES, COUNTS, 4),
        ValueError,
        "scores must have shape (..., num_experts_per_token), got shape ()",
    ),
    ((SCORES, INDICES.tolist(), COUNTS, 4), TypeError, "indices must be a torch.Tensor, got list"),
    ((SCORES, INDICES.short(), COUNTS, 4), TypeError, "indices must be int32 or int64, got torch.int16"),
    ((SCORES, INDICES[:1], COUNTS, 4), ValueError, "indices must have shape (2, 3), as scores has shape (2, 3), got"),
    (
        (SCORES, torch.empty(2, 3, **META), COUNTS, 4),
        ValueError,
        "indices must have the device of scores, cpu, got meta",
    ),
    ((SCORES, INDICES, 3, 4), TypeError, "counts must be a torch.Tensor, got int"),
    ((SCORES, INDICES, COUNTS.float(), 4), TypeError, "counts must be int32 or int64, got torch.float32"),
    ((SCORES, INDICES, COUNTS[:, None], 4), ValueError, "counts must have shape (2,), as scores has shape (2, 3), got"),
    ((SCORES, INDICES, torch.empty(2, **META), 4), ValueError, "counts must have the device of scores, cpu, got meta"),
    ((SCORES, INDICES, COUNTS, 4.0), TypeError, "num_experts must be an int, got float 4.0"),
    ((SCORES, INDICES, COUNTS, True), TypeError, "num_experts must be an int, got bool True"),
    ((SCORES, INDICES, COUNTS, 0), ValueError, "num_experts must be from 1 to 2³¹ - 1, got 0"),
    ((SCORES, INDICES, COUNTS, 2**31), ValueError, "num_experts must be from 1 to 2³¹ - 1, got 2147483648"),
    ((SCORES, INDICES + 4, COUNTS, 4), ValueError, "indices must be from -1 to 3, got 4"),
    ((SCORES, INDICES - 2, None, 4), ValueError, "indices must be from -1 to 3, got -2"),
    ((SCORES, INDICES, COUNTS + 3, 4), ValueError, "counts must be from 0 to 3, got 4"),
    ((SCORES, INDICES, COUNTS - 2, 4), ValueError, "counts must be from 0 to 3, got -1"),
    (
        (torch.empty(2**30, 2, device="meta"), torch.empty(2**30, 2, **META), None, 4),
        ValueError,
        "scores must have at most 2³¹ - 1 elements, got shape (1073741824, 2)",
    ),
]


@pytest.mark.parametrize(("args", "error", "message"), BAD_PAIRS, ids=[message for *_, message in BAD_PAIRS])
def test_bad_pairs(args, error, message):
    with pytest.raises(error, match=re.escape(message)):
        to_csr(*args)


def test_as_many_experts_as_there_may_be():
    groups = to_csr(torch.empty(2, 3, device="meta"), torch.empty(2, 3, **META), None, 2**31 - 1)
    assert groups.offsets.shape == (2**31,)


def test_indices_past_the_count_are_not_looked_at(device):
    indices = torch.tensor([[3, 2**31 - 1], [0, -(2**31)]], dtype=torch.int32, device=device)
    groups = to_csr(torch.ones(2, 2, device=device), indices, torch.ones(2, dtype=torch.int32, device=device), 4)
    assert groups.tokens.tolist() == [1, 0, -1, -1]
    assert groups.scores.tolist() == [1, 1, 0, 0]
    assert groups.offsets.tolist() == [0, 1, 1, 1, 2]


def test_where_nobody_looks_an_index_out_of_range_is_no_expert(device):
    indices = torch.tensor([[3, 4, 2**40], [0, -2, -(2**40)]], device=device)
    with Refusing():
        groups = to_csr(torch.ones(2, 3, device=device), indices, None, 4)
    assert groups.tokens.tolist() == [1, 0, -1, -1, -1, -1]
    assert groups.scores.tolist() == [1, 1, 0, 0, 0, 0]
    assert groups.offsets.tolist() == [0, 1, 1, 1, 2]
