"""The router inside its layer: normalized scores, any leading dimensions, scores of experts chosen before."""

import functools

import pytest
import torch
from cases import (
    DTYPES,
    INF,
    DispatchMode,
    adversarial_logits,
    assert_accurate,
    assert_same_bits,
    case_id,
    dtype_name,
    factors,
    oracle_backward,
    oracle_scores,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import omni_kernels
from omni_kernels import brute_force_router, configs, explain, omni_router, operators, reference, replay
from omni_kernels.checks import NORMALIZE

pytestmark = pytest.mark.usefixtures("pytorch_routes")

FP32, FP16, BF16 = DTYPES
OPERATORS = torch.ops.omni_kernels
EVERY_NORMALIZE = pytest.mark.parametrize("normalize", [None, *NORMALIZE])
NORMALIZED = pytest.mark.parametrize("normalize", NORMALIZE)
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


def random_logits(*shape, device, dtype=FP32, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(shape, generator=generator) * scale).to(device, dtype) for _ in range(2))


def leaves(x, y):
    return x.detach().requires_grad_(), y.detach().requires_grad_()


def gradients(function, x, y, grad):
    """Of the first thing that the function returns."""
    x, y = leaves(x, y)
    result = function(x, y)
    return torch.autograd.grad(result[0] if isinstance(result, tuple) else result, (x, y), grad)


# Oracles -------------------------------------------------------------------------------------------------------------


def naive(x, y, indices, normalize):
    """The scores by autograd's own functions, over all N² experts, in the logits' dtype."""
    sums = (x[:, :, None] + y[:, None, :]).flatten(1)
    if normalize == "topk":
        return sums.gather(1, indices.long()).softmax(1)
    return getattr(sums, normalize)(1).gather(1, indices.long())


def factored_naive(x, y, indices, normalize):
    """The same as people write it: a log_softmax of each factor."""
    rows, columns = indices.long() // x.shape[1], indices.long() % x.shape[1]
    if normalize == "topk":
        return (x.gather(1, rows) + y.gather(1, columns)).softmax(1)
    logs = x.log_softmax(1).gather(1, rows) + y.log_softmax(1).gather(1, columns)
    return logs if normalize == "log_softmax" else logs.exp()


def assert_same_but_for_rounding(got, want, normalize):
    """Bit for bit, unless kernels normalize: what transforms PyTorch's operators, PyTorch normalizes."""
    if normalize is None:
        assert_same_bits(got, want)
    else:
        torch.testing.assert_close(tuple(got), tuple(want), rtol=4e-6, atol=4e-6)


# Normalized scores ---------------------------------------------------------------------------------------------------


@NORMALIZED
@given(logits=factors(), data=st.data())
@settings(max_examples=100)
def test_normalized_scores_of_any_floats(normalize, logits, data):
    x, y = logits
    k = data.draw(st.integers(0, x.shape[1] ** 2), label="k")
    scores_dtype = data.draw(st.sampled_from([None, *DTYPES]), label="scores_dtype")
    scores, indices = omni_router(x, y, k, scores_dtype, normalize)
    assert scores.dtype == (scores_dtype or x.dtype)
    assert torch.equal(indices, omni_router(x, y, k)[1])
    assert_accurate(scores, oracle_scores(x, y, indices, normalize), normalize)


@NORMALIZED
@ALL_DTYPES
@pytest.mark.parametrize(("num_expert_sqrt", "k"), [(1, 1), (7, 49), (33, 16), (130, 40)])
def test_normalized_scores_of_every_kind_of_token(num_expert_sqrt, k, dtype, normalize, device):
    x, y = adversarial_logits(num_expert_sqrt, dtype, device, seed=k)
    scores, indices = omni_router(x, y, k, FP32, normalize)
    assert torch.equal(indices, omni_router(x, y, k)[1])
    assert_accurate(scores, oracle_scores(x, y, indices, normalize), normalize)
    rounded, _ = omni_router(x, y, k, normalize=normalize)
    assert_same_bits([rounded], [scores.to(dtype)])


LARGE = {
    "normal": lambda x: x,
    "spread": lambda x: x * 20,
    "magnitudes": lambda x: x * 1e4,
    "offset": lambda x: x + 1e4,
    "equal": lambda x: x * 0 - 1e4,
    "one above equals": lambda x: (x * 0 - 10.1).index_fill(1, torch.zeros(1, dtype=int, device=x.device), 0.3),
    "one below another": lambda x: x.sort(1).values * 5,
}


@NORMALIZED
@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize("num_expert_sqrt", [1000, 46340])
def test_accuracy_of_long_rows(num_expert_sqrt, kind, normalize, device):
    x, y = map(LARGE[kind], random_logits(2, num_expert_sqrt, device=device, scale=1.0))
    scores, indices = omni_router(x, y, 16, normalize=normalize)
    assert_accurate(scores, oracle_scores(x, y, indices, normalize), normalize)
    anywhere = torch.randint(num_expert_sqrt**2, (2, 50), device=device)
    if normalize != "topk":
        assert_accurate(replay(x, y, anywhere, None, normalize), oracle_scores(x, y, anywhere, normalize), normalize)


@NORMALIZED
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (30.0, 0.0), (3.0, 1e4), (1e4, 0.0)])
def test_accuracy_before_rounding(scale, offset, normalize, device):
    """In fp64, as the definition has them."""
    x, y = (part + offset for part in random_logits(20, 50, device=device, scale=scale))
    best = reference.best_logits(x, y)
    _, indices = omni_router(x, y, 500)
    sums = reference.sums_of_pairs(x, y, indices, *reference.origins(*best))
    got, want = reference.normalize_sums(sums, x, y, *best, normalize), oracle_scores(x, y, indices, normalize)
    assert got.dtype == torch.float64
    bound = 1e-6 * want.abs().clamp(min=1) if normalize == "log_softmax" else 2e-6 * want
    assert ((got.cpu() - want).abs() <= bound + 1e-307).all()


@NORMALIZED
@given(logits=factors(sizes=st.integers(1, 6)), data=st.data())
def test_the_definition_is_the_oracle(normalize, logits, data):
    """That of all N² experts agrees, where no logit is so large that fp64 sums lose the other."""
    x, y = (torch.where(part.abs() < INF, part.float().clamp(-6e4, 6e4).to(part.dtype), part) for part in logits)
    k = data.draw(st.integers(0, x.shape[1] ** 2), label="k")
    scores, indices = brute_force_router(x, y, k, normalize)
    assert torch.equal(indices, brute_force_router(x, y, k)[1])
    assert_accurate(scores, oracle_scores(x, y, indices, normalize), normalize)


@NORMALIZED
@pytest.mark.usefixtures("kernels")
def test_what_rounding_takes_from_a_large_difference_is_no_probability(normalize, device):
    x, y = torch.zeros(1, 2, device=device), torch.tensor([[-7.3, 3.2484e9]], device=device)
    scores, indices = omni_router(x, y, 3, FP32, normalize)
    assert_accurate(scores, oracle_scores(x, y, indices, normalize), normalize)


@ALL_DTYPES
def test_probabilities_of_all_experts_add_up(dtype, device):
    x, y = random_logits(5, 6, device=device, dtype=dtype)
    for normalize in ("softmax", "topk"):
        total = omni_router(x, y, 36, FP32, normalize)[0].double().sum(1)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=3e-6)
    assert_same_bits([omni_router(x, y, 1, normalize="topk")[0]], [torch.ones(5, 1, device=device, dtype=dtype)])


@NORMALIZED
@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("num_tokens", [0, 4])
def test_normalized_scores_of_nothing(num_tokens, k, normalize, device):
    x, y = leaves(*random_logits(num_tokens, 3, device=device, dtype=BF16))
    scores, indices = omni_router(x, y, k, FP32, normalize)
    assert scores.shape == indices.shape == (num_tokens, k)
    assert (scores.dtype, indices.dtype) == (FP32, torch.int32)
    assert_same_bits([replay(x, y, indices, FP32, normalize)], [scores])
    scores.sum().backward()
    for leaf in (x, y):
        assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, BF16)
        assert k or not leaf.grad.any()


# Gradients -----------------------------------------------------------------------------------------------------------


@NORMALIZED
@ALL_DTYPES
@pytest.mark.parametrize(("num_expert_sqrt", "k"), [(1, 1), (4, 16), (9, 5), (40, 64)])
@pytest.mark.parametrize("scale", [0.5, 3.0, 30.0])
def test_gradients_are_those_of_the_definition(scale, num_expert_sqrt, k, dtype, normalize, device):
    """In fp64 by autograd; as near to them as PyTorch's own fp32 functions."""
    x, y = random_logits(20, num_expert_sqrt, device=device, dtype=dtype, scale=scale)
    _, indices = omni_router(x, y, k)
    grad = random_logits(20, k, device=device, seed=1)[0]
    want = gradients(lambda x, y: naive(x, y, indices, normalize), x.double(), y.double(), grad.double())
    own = gradients(lambda x, y: factored_naive(x, y, indices, normalize), x.float(), y.float(), grad)
    got = gradients(lambda x, y: omni_router(x, y, k, FP32, normalize), x, y, grad)
    size = grad.abs().sum(1, keepdim=True).double()
    for part, right, fp32 in zip(got, want, own, strict=True):
        assert part.dtype == dtype
        allowed = 2 * ((fp32 - right).abs() / size).amax() + 2**-21  # a GPU's powers of 2 are 2 units off
        rounding = 0 if dtype == FP32 else torch.finfo(dtype).eps / 2 * right.abs() + torch.finfo(dtype).tiny
        assert ((part - right).abs() <= allowed * size + rounding).all()


@NORMALIZED
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=dtype_name)
def test_gradients_by_kernels_are_those_by_pytorch(dtype, normalize, device, monkeypatch):
    """Of masked and of poisoned tokens, too."""
    x, y = adversarial_logits(9, dtype, device)
    grad = random_logits(len(x), 5, device=device)[0]
    found = []
    for has_kernels in (configs.has_kernels, lambda _: False):
        monkeypatch.setattr(operators, "has_kernels", has_kernels)
        found.append(gradients(lambda x, y: omni_router(x, y, 5, FP32, normalize), x, y, grad))
    torch.testing.assert_close(*found, rtol=4e-6 if dtype == FP32 else 0.008, atol=4e-6, equal_nan=True)


@pytest.mark.usefixtures("kernels")
def test_no_gradient_of_a_best_score_of_infinity(device):
    x, y = torch.tensor([[[3e38, 0.0, -1.0], [1.0, 0.0, -1.0]]] * 2, device=device)
    grad_x, grad_y = gradients(
        lambda x, y: omni_router(x, y, 2, normalize="topk"), x, y, torch.ones(2, 2, device=device)
    )
    assert grad_x[0, 0].isnan() and grad_y[0, 0].isnan()
    assert not grad_x[1].isnan().any() and not grad_y[1].isnan().any()


@NORMALIZED
@given(logits=factors(), data=st.data())
@settings(max_examples=60)
def test_no_gradient_is_nan(normalize, logits, data):
    """Whatever is masked, unless the scores are; and a token that is masked altogether has none."""
    x, y = (part.nan_to_num(1.0, -INF, -INF) for part in logits)
    k = data.draw(st.integers(0, x.shape[1] ** 2), label="k")
    x, y = leaves(x, y)
    scores, _ = omni_router(x, y, k, FP32, normalize)
    grads = torch.autograd.grad(scores, (x, y), torch.linspace(-1, 1, scores.numel()).view_as(scores))
    masked = (x == -INF).all(1) | (y == -INF).all(1)
    for grad in grads:
        assert not grad[~scores.isnan().any(1)].isnan().any()
        assert not grad[masked].any()


@NORMALIZED
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=dtype_name)
def test_second_derivatives_of_masked_tokens(dtype, normalize, device):
    x, y = random_logits(4, 3, device=device, dtype=dtype)
    x[0], y[1], x[2, 1], y[2, 2] = -INF, -INF, -INF, -INF
    x, y = leaves(x, y)
    scores, _ = omni_router(x, y, 9, FP32, normalize)
    grads = torch.autograd.grad(scores[scores > -INF].square().sum(), (x, y), create_graph=True)
    for grad in torch.autograd.grad(sum(grad.square().sum() for grad in grads), (x, y)):
        assert not grad.isnan().any()
        assert not grad[:2].any()
        assert normalize == "topk" or grad[3].any()


@EVERY_NORMALIZE
@pytest.mark.usefixtures("kernels")
def test_gradients_without_atomics(normalize, device):
    """First and second derivatives come to the rows through the backward kernel alone, and so with the same bits."""
    x, y = random_logits(30, 4, device=device)
    weights = random_logits(30, 9, device=device, seed=1)[0].requires_grad_()

    def derivatives():
        leaf_x, leaf_y = leaves(x, y)
        scores, indices = omni_router(leaf_x, leaf_y, 9, normalize=normalize)
        again = replay(leaf_x, leaf_y, indices, normalize=normalize)
        grads = torch.autograd.grad(scores, (leaf_x, leaf_y), weights, create_graph=True)
        grads += torch.autograd.grad(again, (leaf_x, leaf_y), weights, create_graph=True)
        total = sum(grad.square().sum() for grad in grads)
        return *grads, *torch.autograd.grad(total, (leaf_x, leaf_y, weights), allow_unused=normalize is None)[-1:]

    with DispatchMode() as watching:
        got = derivatives()
    assert OPERATORS.omni_router_backward.default in watching.seen
    names = " ".join(function.name() for function in watching.seen)
    assert not any(word in names for word in ("scatter", "index_add", "index_put", "gather_backward"))
    assert_same_bits(derivatives(), got)


# Leading dimensions --------------------------------------------------------------------------------------------------

SHAPES = [(5,), (6, 5), (2, 3, 5), (1, 5), (3, 1, 2, 5), (0, 5), (2, 0, 5), (0, 0, 3, 5)]


@EVERY_NORMALIZE
@pytest.mark.parametrize("k", [0, 4, 25])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_leading_dimensions(shape, k, normalize, device):
    """As of one dimension of tokens."""
    x, y = random_logits(*shape, device=device, dtype=BF16)
    scores, indices = omni_router(x, y, k, FP32, normalize)
    assert scores.shape == indices.shape == (*shape[:-1], k)
    matrices = x.reshape(-1, 5), y.reshape(-1, 5)
    want = omni_router(*matrices, k, FP32, normalize)
    assert_same_bits((scores, indices), [part.view(scores.shape) for part in want])
    assert_same_bits([replay(x, y, indices, FP32, normalize)], [scores])

    grad = random_logits(*scores.shape, device=device, seed=1)[0]
    got = gradients(lambda x, y: omni_router(x, y, k, FP32, normalize), x, y, grad)
    flat = grad.view(want[0].shape)
    want = gradients(lambda x, y: omni_router(x, y, k, FP32, normalize), *matrices, flat)
    assert_same_bits(got, [part.view(shape) for part in want])
    assert_same_bits(gradients(lambda x, y: replay(x, y, indices, FP32, normalize), x, y, grad), got)


VIEWS = {
    "transposed": lambda logits: logits.transpose(0, 1),
    "columns first": lambda logits: logits.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "every other column": lambda logits: torch.stack((logits, logits + 1), -1).flatten(-2)[..., ::2],
    "repeated": lambda logits: logits[:, :1].expand(-1, 4, -1),
    "one token": lambda logits: logits[1, 2],
    "heads": lambda logits: logits.flatten(0, 1).unflatten(0, (2, 3)).transpose(0, 1)[None],
}


@EVERY_NORMALIZE
@pytest.mark.parametrize("view", VIEWS)
def test_views_of_leading_dimensions(view, normalize, device):
    x, y = map(VIEWS[view], random_logits(2, 3, 5, device=device))
    got = omni_router(x, y, 4, normalize=normalize)
    want = omni_router(x.contiguous(), y.contiguous(), 4, normalize=normalize)
    same = assert_same_bits
    if x.stride(-1) > 1:  # columns that are read one by one are added up in another order
        same = functools.partial(assert_same_but_for_rounding, normalize=normalize)
    same(got, want)
    backwards = got[1].flip(-1).transpose(0, -1).contiguous().transpose(0, -1)
    assert_same_bits([replay(x, y, backwards, normalize=normalize).flip(-1)], got[:1])


@EVERY_NORMALIZE
@pytest.mark.parametrize("in_dims", [0, 1, 2])
def test_vmap_of_leading_dimensions(in_dims, normalize, device):
    x, y = random_logits(2, 3, 4, 5, device=device)
    route = functools.partial(omni_router, num_experts_per_token=4, normalize=normalize)
    got = torch.vmap(route, in_dims, in_dims)(x, y)
    assert_same_but_for_rounding(got, route(x, y), normalize)


@EVERY_NORMALIZE
def test_leading_dimensions_compile_once(normalize, device):
    @functools.partial(torch.compile, fullgraph=True, backend="aot_eager", dynamic=True)
    def compiled(x, y):
        scores, indices = omni_router(x, y, 4, normalize=normalize)
        return scores, replay(x, y, indices, normalize=normalize)

    torch.compiler.reset()
    compiled(*leaves(*random_logits(2, 3, 5, device=device)))
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in ((3, 4, 5), (7, 2, 5)):
            x, y = leaves(*random_logits(*shape, device=device))
            scores, again = compiled(x, y)
            want = omni_router(x, y, 4, normalize=normalize)[0]
            torch.testing.assert_close((scores, again), (want, want))
            grad = torch.autograd.grad(scores.square().sum() + again.square().sum(), (x, y))
            want = torch.autograd.grad(2 * want.square().sum(), (x, y))
            torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_explain_takes_leading_dimensions(shape, device):
    x, y = random_logits(*shape, device=device)
    assert explain(x, y, 4) == explain(x.reshape(-1, 5), y.reshape(-1, 5), 4)


# Experts chosen before -----------------------------------------------------------------------------------------------


@EVERY_NORMALIZE
@given(logits=factors(), data=st.data())
@settings(max_examples=100)
def test_replay_has_the_routers_bits(normalize, logits, data):
    """Also of tokens with NaN and infinities, and backward."""
    x, y = leaves(*logits)
    k = data.draw(st.integers(0, x.shape[1] ** 2), label="k")
    scores_dtype = data.draw(st.sampled_from([None, *DTYPES]), label="scores_dtype")
    scores, indices = omni_router(x, y, k, scores_dtype, normalize)
    again = replay(x, y, indices.to(data.draw(st.sampled_from([torch.int32, torch.int64]))), scores_dtype, normalize)
    assert_same_bits([again], [scores])
    grad = torch.linspace(-1, 1, scores.numel()).view_as(scores).to(scores.dtype)
    assert_same_bits(torch.autograd.grad(again, (x, y), grad), torch.autograd.grad(scores, (x, y), grad))


@EVERY_NORMALIZE
@ALL_DTYPES
@pytest.mark.parametrize(("num_expert_sqrt", "k"), [(1, 1), (7, 49), (7, 5), (64, 16), (130, 70)])
def test_replay_of_every_kind_of_token(num_expert_sqrt, k, dtype, normalize, device):
    assert_replays(*adversarial_logits(num_expert_sqrt, dtype, device, seed=k), k, normalize)


@EVERY_NORMALIZE
@ALL_DTYPES
@pytest.mark.usefixtures("kernels")
def test_replay_has_the_kernels_bits(dtype, normalize, device):
    assert_replays(*adversarial_logits(3, dtype, device), 4, normalize)


def assert_replays(x, y, k, normalize):
    """The scores and the gradients of the router, bit for bit."""
    x, y = leaves(x, y)
    scores, indices = omni_router(x, y, k, normalize=normalize)
    again = replay(x, y, indices, normalize=normalize)
    assert_same_bits([again], [scores])
    grad = random_logits(*scores.shape, device=x.device, dtype=x.dtype)[0]
    assert_same_bits(torch.autograd.grad(again, (x, y), grad), torch.autograd.grad(scores, (x, y), grad))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=dtype_name)
@pytest.mark.parametrize(("num_expert_sqrt", "k", "dtype"), [(1, 3, FP32), (4, 30, BF16), (9, 5, FP16)], ids=case_id)
def test_replay_of_any_experts(num_expert_sqrt, k, dtype, index_dtype, device):
    """In any order, some of them twice."""
    x, y = random_logits(8, num_expert_sqrt, device=device, dtype=dtype)
    indices = torch.randint(num_expert_sqrt**2, (8, k), device=device, dtype=index_dtype)
    rows, columns = indices.long() // num_expert_sqrt, indices.long() % num_expert_sqrt
    sums = x.float().gather(1, rows) + y.float().gather(1, columns)
    assert_same_bits([replay(x, y, indices), replay(x, y, indices, FP32)], [sums.to(dtype), sums])
    grad = random_logits(8, k, device=device, seed=1)[0]
    want = [part.to(dtype) for part in oracle_backward(grad, indices, num_expert_sqrt)]
    assert_same_bits(gradients(lambda x, y: replay(x, y, indices, FP32), x, y, grad), want)
    for normalize in NORMALIZE:
        scores = replay(x, y, indices, FP32, normalize)
        assert_accurate(scores, oracle_scores(x, y, indices, normalize), normalize)
        got = gradients(lambda x, y, n=normalize: replay(x, y, indices, FP32, n), x, y, grad)
        want = gradients(lambda x, y, n=normalize: naive(x, y, indices, n), x.double(), y.double(), grad.double())
        torch.testing.assert_close(got, tuple(part.to(dtype) for part in want), atol=1e-5, rtol=torch.finfo(dtype).eps)


def test_replay_where_all_that_is_asked_for_is_masked(device):
    x, y = leaves(torch.tensor([[-INF, 1.0]], device=device), torch.tensor([[2.0, -INF]], device=device))
    masked = torch.tensor([[0, 1, 3]], device=device)
    for normalize, value in ((None, -INF), ("log_softmax", -INF), ("softmax", 0.0), ("topk", 0.0)):
        scores = replay(x, y, masked, normalize=normalize)
        assert scores.tolist() == [[value] * 3]
        grads = torch.autograd.grad(scores, (x, y), torch.ones_like(scores))
        assert not any(grad.isnan().any() for grad in grads)


@EVERY_NORMALIZE
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, None, 2), (None, None, 2), (0, 1, None)])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_vmap_of_replay(num_tokens, in_dims, normalize, device):
    """Batches of logits or of indices, in any dimension."""
    x, y = random_logits(4, num_tokens, 5, device=device)
    indices = torch.randint(25, (4, num_tokens, 6), device=device, dtype=torch.int32)
    parts = [
        part[0] if dim is None else part.movedim(0, dim).contiguous()
        for part, dim in zip((x, y, indices), in_dims, strict=True)
    ]
    x, y = leaves(*parts[:2])
    got = torch.vmap(functools.partial(replay, normalize=normalize), in_dims)(x, y, parts[2])
    slices = [
        [part if dim is None else part.select(dim, index) for part, dim in zip((x, y, parts[2]), in_dims, strict=True)]
        for index in range(4)
    ]
    want = torch.stack([replay(*part, normalize=normalize) for part in slices])
    assert_same_but_for_rounding([got], [want], normalize)
    grad = random_logits(*got.shape, device=device, seed=1)[0]
    torch.testing.assert_close(torch.autograd.grad(got, (x, y), grad), torch.autograd.grad(want, (x, y), grad))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=dtype_name)
def test_opcheck_of_pairs(dtype, device):
    x, y = leaves(*random_logits(5, 4, device=device, dtype=dtype))
    indices = torch.randint(16, (5, 3), device=device, dtype=torch.int32)
    best = reference.best_logits(x, y)
    for origins in ((None, None), best):
        torch.library.opcheck(OPERATORS.omni_router_pairs.default, (x, y, indices, *origins))


def test_replay_of_experts_changed_in_place_is_noticed(device):
    x, y = leaves(*random_logits(5, 4, device=device))
    indices = torch.zeros(5, 3, device=device, dtype=torch.int32)
    scores = replay(x, y, indices)
    indices += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scores.sum().backward()


@pytest.mark.parametrize("value", [-1, 16, 2**31, -(2**40)])
def test_experts_out_of_range(value):
    """Looked at on the CPU."""
    x, y = random_logits(2, 3, 4, device="cpu")
    indices = torch.zeros(2, 3, 5, dtype=torch.int64)
    indices[1, 2, 3] = value
    with pytest.raises(ValueError, match=rf"^indices must be from 0 to num_expert_sqrt² - 1 = 15, got {value}$"):
        replay(x, y, indices)


def test_every_way_has_one_definition(device, monkeypatch):
    """omni_router and replay take what they give from the same function, wherever no kernel normalizes."""
    x, y = random_logits(3, 4, device=device)
    calls = []
    monkeypatch.setattr(operators, "has_kernels", lambda _: False)
    kernels = omni_kernels.router._NORMALIZED
    monkeypatch.setattr(kernels, "in_pytorch", lambda *args: calls.append(args[-1]) or args[0][:, :2])
    for normalize in NORMALIZE:
        _, indices = omni_router(x, y, 2, normalize=normalize)
        replay(x, y, indices, normalize=normalize)
    assert calls == [normalize for normalize in NORMALIZE for _ in range(2)]
