"""The public functions: results, gradients, dispatch and bad input; each of the three does all of it."""

import contextlib
import re

import numpy as np
import pytest
import torch
import triton
from cases import (
    DTYPES,
    NAN,
    NO_GPU,
    ON_GPU,
    ON_NVIDIA,
    adversarial_logits,
    assert_routes,
    assert_same_bits,
    case_id,
    dirty_memory,
    dtype_name,
    is_poisoned,
    layouts,
    oracle_backward,
    run_python,
)
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

from omni_kernels import (
    brute_force_router,
    explain,
    factored_router,
    omni_router,
    reference,
    replay,
    triton_omni_router_func,
    triton_omni_router_func_optimized,
)
from omni_kernels.factored import frontier, tile
from omni_kernels.factored.plan import Launch


def original(x, y, k):
    return triton_omni_router_func(x, y, x.shape[1], k)


def optimized(x, y, k):
    return triton_omni_router_func_optimized(x, y, x.shape[1], k)


ROUTERS = pytest.mark.parametrize("router", [omni_router, original, optimized], ids=lambda router: router.__name__)
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
FP32, FP16, BF16 = DTYPES
# Every size and dtype is the kernels' own tests' matter; these take each path of each router.
SIZES = [(1, 1, FP32), (3, 9, BF16), (7, 5, FP16), (16, 3, FP32)]
GRADIENT_SIZES = [(1, 1, BF16), (3, 9, BF16), (7, 5, FP16), (40, 3, FP32)]
if ON_GPU:
    LARGER = [(16, 64, FP16), (64, 16, BF16), (100, 31, FP32), (130, 64, BF16), (256, 16, BF16), (256, 33, FP32)]
    SIZES, GRADIENT_SIZES = SIZES + LARGER, GRADIENT_SIZES + LARGER


def exact_logits(num_tokens, num_expert_sqrt, dtype, device, seed=0):
    """Multiples of 1/8 with many ties: their sums are exact, so every router returns the same bits."""
    generator = torch.Generator().manual_seed(seed)
    shape = 2, num_tokens, num_expert_sqrt
    return (torch.randint(-20, 21, shape, generator=generator) / 8).to(dtype).to(device).unbind()


def gradients(router, x, y, k, grad):
    """d (scores · grad) / d x and / d y."""
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    return torch.autograd.grad(router(x, y, k)[0], (x, y), grad)


@contextlib.contextmanager
def count_launches(monkeypatch):
    """A list that grows by one with every kernel launch, compiled or interpreted. (A warm-up only compiles.)"""
    launches = []
    with monkeypatch.context() as patch:
        for kind, name in ((triton.JITFunction, "run"), (InterpretedFunction, "run"), (Launch, "__call__")):

            def run(kernel, *args, _run=getattr(kind, name), **kwargs):
                if not kwargs.get("warmup"):
                    launches.append(kernel)
                return _run(kernel, *args, **kwargs)

            patch.setattr(kind, name, run)
        yield launches


# Results -------------------------------------------------------------------------------------------------------------


@ROUTERS
@pytest.mark.parametrize(("num_expert_sqrt", "k", "dtype"), SIZES, ids=case_id)
def test_every_kind_of_token(router, num_expert_sqrt, k, dtype, device):
    x, y = adversarial_logits(num_expert_sqrt, dtype, device, seed=k)
    before = x.clone(), y.clone()
    with dirty_memory():
        scores, indices = router(x, y, k)
    assert_routes(x, y, k, scores, indices)
    assert_same_bits((x, y), before)


@ALL_DTYPES
@pytest.mark.parametrize(("num_expert_sqrt", "k"), [(5, 4), (100, 3), (130, 2)])
def test_all_three_are_equal(num_expert_sqrt, k, dtype, device):
    x, y = exact_logits(4, num_expert_sqrt, dtype, device)
    grad = torch.randn(4, k, device=device).to(dtype)
    want, want_grads = brute_force_router(x, y, k), None
    for router in (omni_router, original, optimized):
        assert_same_bits(router(x, y, k), want)
        want_grads = want_grads or oracle_backward(grad, want[1], num_expert_sqrt)
        assert_gradients(gradients(router, x, y, k, grad), want_grads, grad)


@ROUTERS
def test_a_bad_token_leaves_the_others(router, device):
    x, y = exact_logits(30, 6, BF16, device)
    want = router(x, y, 4)
    bad_x, bad_y = adversarial_logits(6, BF16, device)
    bad = is_poisoned(bad_x, bad_y)
    at = torch.arange(int(bad.sum()), device=device) * 3
    x[at], y[at] = bad_x[bad], bad_y[bad]
    others = ~is_poisoned(x, y)
    assert others.sum() == 30 - len(at)
    assert_same_bits([part[others] for part in router(x, y, 4)], [part[others] for part in want])


@ROUTERS
def test_layout_does_not_matter(router, device):
    x, y = exact_logits(5, 6, FP16, device)
    want = brute_force_router(x, y, 4)
    for view_x, view_y in zip(layouts(x), layouts(y)[::-1], strict=True):
        assert_same_bits(router(view_x, view_y, 4), want)


@ROUTERS
def test_same_bits_on_every_run(router, device):
    x, y = adversarial_logits(4, FP32, device)
    assert_same_bits(router(x, y, 3), router(x, y, 3))


@ROUTERS
@ALL_DTYPES
@pytest.mark.parametrize(("num_tokens", "num_expert_sqrt", "k"), [(0, 3, 4), (0, 1, 0), (4, 3, 0), (0, 130, 16)])
def test_empty_results(router, num_tokens, num_expert_sqrt, k, dtype, device):
    x, y = exact_logits(num_tokens, num_expert_sqrt, dtype, device)
    x.requires_grad_(), y.requires_grad_()
    scores, indices = router(x, y, k)
    assert scores.shape == indices.shape == (num_tokens, k)
    assert (scores.dtype, indices.dtype) == (dtype, torch.int32)
    assert scores.device == indices.device == x.device
    scores.sum().backward()
    for leaf in (x, y):
        assert leaf.grad.shape == leaf.shape
        assert leaf.grad.dtype == dtype
        assert not leaf.grad.any()


# Dispatch ------------------------------------------------------------------------------------------------------------


def test_omni_router_takes_the_kernel_up_to_its_limit(device, monkeypatch):
    x, y = exact_logits(2, 17, FP32, device)
    limit = (frontier if ON_NVIDIA else tile).MAX_EXPERTS_PER_TOKEN
    for k in (1, limit + 1, 289):
        with count_launches(monkeypatch) as launches:
            result = omni_router(x, y, k)
        assert bool(launches) == (k <= limit)
        assert_same_bits(result, brute_force_router(x, y, k))


@ROUTERS
@pytest.mark.parametrize(("num_expert_sqrt", "k"), [(128, 257), (130, 300)])
def test_large_k_takes_pytorch(router, num_expert_sqrt, k, device, monkeypatch):
    x, y = exact_logits(2, num_expert_sqrt, FP32, device)
    with count_launches(monkeypatch) as launches:
        result = router(x, y, k)
    assert not launches
    assert_same_bits(result, brute_force_router(x, y, k))


def test_no_interpreter_and_no_gpu():
    """The whole package on a CPU without Triton's interpreter, in a process of its own."""
    program = """
import torch, triton
from cases import DTYPES, adversarial_logits, assert_routes, oracle_backward, assert_same_bits
from omni_kernels import omni_router, triton_omni_router_func, triton_omni_router_func_optimized
from omni_kernels.configs import has_kernels

assert not triton.knobs.runtime.interpret
for dtype in DTYPES:
    for n, k in ((1, 1), (7, 5), (16, 256), (130, 64)):
        x, y = (part.requires_grad_() for part in adversarial_logits(n, dtype))
        assert not has_kernels(x)
        for router in (omni_router, triton_omni_router_func, triton_omni_router_func_optimized):
            scores, indices = router(x, y, k) if router is omni_router else router(x, y, n, k)
            assert_routes(x.detach(), y.detach(), k, scores.detach(), indices)
            grad = torch.ones_like(scores)
            assert_same_bits(torch.autograd.grad(scores, (x, y), grad), oracle_backward(grad, indices, n))
print("done")
"""
    assert run_python("-c", program, **NO_GPU) == "done\n"


# Gradients -----------------------------------------------------------------------------------------------------------


def assert_gradients(got, want, grad):
    """Tolerance: the fp32 rounding of at most k additions, then one unit in the last place of grad's dtype."""
    k = grad.shape[1]
    largest = grad.abs().max().item() if grad.numel() else 0.0
    tolerance = {"rtol": torch.finfo(grad.dtype).eps, "atol": k * k * largest * torch.finfo(torch.float32).eps}
    torch.testing.assert_close(got, want, **tolerance)


@ROUTERS
@pytest.mark.parametrize(("num_expert_sqrt", "k", "dtype"), GRADIENT_SIZES, ids=case_id)
def test_gradients_are_autograds(router, num_expert_sqrt, k, dtype, device):
    x, y = exact_logits(9, num_expert_sqrt, dtype, device)
    whole = torch.randint(-8, 9, (9, k), device=device).to(dtype)  # adds up exactly in any order
    for got, want in zip(gradients(router, x, y, k, whole), gradients(brute_force_router, x, y, k, whole), strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, want)
    grad = torch.randn(9, k, device=device).to(dtype)
    assert_gradients(gradients(router, x, y, k, grad), gradients(brute_force_router, x, y, k, grad), grad)


@pytest.mark.parametrize("router", [omni_router, optimized], ids=lambda router: router.__name__)
@ALL_DTYPES
def test_gradients_have_the_bits_of_the_sequential_sum(router, dtype, device):
    """Every run gives them; the original adds atomically, so its last bits may differ."""
    x, y = exact_logits(9, 3, dtype, device)
    grad = (torch.randn(9, 8, device=device) * 10 ** torch.randn(9, 8, device=device)).to(dtype)
    want = oracle_backward(grad, brute_force_router(x, y, 8)[1], 3)
    for _ in range(2):
        assert_same_bits(gradients(router, x, y, 8, grad), want)


@ROUTERS
def test_second_backward_through_a_retained_graph(router, device):
    x, y = exact_logits(6, 4, FP32, device)
    x.requires_grad_(), y.requires_grad_()
    scores = router(x, y, 3)[0]
    grad = torch.randn_like(scores)
    first = torch.autograd.grad(scores, (x, y), grad, retain_graph=True)
    with dirty_memory():
        second = torch.autograd.grad(scores, (x, y), grad, retain_graph=True)
        doubled = torch.autograd.grad(scores, (x, y), 2 * grad)
    for once, again, twice in zip(first, second, doubled, strict=True):
        assert_gradients([again, twice], [once, 2 * once], grad)
    assert_gradients(first, gradients(brute_force_router, x, y, 3, grad), grad)
    with pytest.raises(RuntimeError, match="second time"):
        scores.sum().backward()


@ROUTERS
def test_calls_do_not_disturb_each_other(router, device):
    """Two graphs of different sizes alive at once, run backward in the other order, into accumulating leaves."""
    x, y = exact_logits(6, 4, FP32, device)
    x.requires_grad_(), y.requires_grad_()
    scores_a, scores_b = router(x, y, 3)[0], router(x[:3, :2], y[:3, :2], 2)[0]
    scores_b.sum().backward()
    scores_a.sum().backward()
    want_x, want_y = gradients(brute_force_router, x, y, 3, torch.ones_like(scores_a))
    part_x, part_y = gradients(brute_force_router, x[:3, :2], y[:3, :2], 2, torch.ones_like(scores_b))
    want_x[:3, :2] += part_x
    want_y[:3, :2] += part_y
    assert torch.equal(x.grad, want_x)
    assert torch.equal(y.grad, want_y)


@ROUTERS
@pytest.mark.parametrize("wanted", [0, 1])
def test_gradient_of_one_input(router, wanted, device):
    logits = exact_logits(6, 4, FP32, device)
    logits[wanted].requires_grad_()
    scores, _ = router(*logits, 3)
    grad = torch.randn_like(scores)
    scores.backward(grad)
    assert_gradients(logits[wanted].grad, gradients(brute_force_router, *logits, 3, grad)[wanted], grad)
    assert logits[1 - wanted].grad is None


@ROUTERS
def test_same_tensor_as_both_inputs(router, device):
    x = exact_logits(6, 4, FP32, device)[0].requires_grad_()
    router(x, x, 3)[0].sum().backward()
    ones = torch.ones(6, 3, device=device)
    assert torch.equal(x.grad, sum(gradients(brute_force_router, x, x, 3, ones)))


INCOMING = {
    "transposed": lambda scores, weights: (scores.t() * weights.t().contiguous()).sum(),
    "expanded": lambda scores, weights: scores.sum() * weights[0, 0],
    "rows": lambda scores, weights: (scores.sum(1) * weights[:, 0]).sum(),
    "columns": lambda scores, weights: (scores.sum(0) * weights[0]).sum(),
    "one slot": lambda scores, weights: (scores[:, 1] * weights[:, 1]).sum(),
    "one token": lambda scores, weights: (scores[2] * weights[2]).sum(),
    "flipped": lambda scores, weights: (scores.flip(1) * weights).sum(),
    "nothing": lambda scores, weights: (scores * 0.0).sum(),
}


@ROUTERS
@pytest.mark.parametrize("loss", INCOMING.values(), ids=INCOMING.keys())
def test_incoming_gradients_of_any_layout(router, loss, device):
    weights = torch.randint(-8, 9, (6, 3), device=device).float()
    grads = []
    for route in (router, brute_force_router):
        x, y = (part.requires_grad_() for part in exact_logits(6, 4, FP32, device))
        loss(route(x, y, 3)[0], weights).backward()
        grads.append((x.grad, y.grad))
    for got, want in zip(*grads, strict=True):
        assert torch.equal(got, want)


@ROUTERS
def test_strided_incoming_gradients(router, device):
    x, y = exact_logits(6, 4, BF16, device)
    grad = torch.randint(-8, 9, (6, 3), device=device).bfloat16()
    wide = torch.full((6, 7), NAN, dtype=BF16, device=device)
    wide[:, 1::2] = grad
    want = gradients(brute_force_router, x, y, 3, grad)
    for view in (grad.t().contiguous().t(), wide[:, 1::2]):
        assert not view.is_contiguous()
        for got, right in zip(gradients(router, x, y, 3, view), want, strict=True):
            assert torch.equal(got, right)


@ROUTERS
def test_gradients_reach_the_leaf_behind_a_view(router, device):
    x, y = exact_logits(6, 4, FP32, device)
    leaf = x.t().contiguous().requires_grad_()
    router(leaf.t(), y, 3)[0].sum().backward()
    assert torch.equal(leaf.grad.t(), gradients(brute_force_router, x, y, 3, torch.ones(6, 3, device=device))[0])


@ROUTERS
def test_masked_experts_get_no_gradient(router, device):
    x, y = exact_logits(6, 4, FP32, device)
    x[:, 2:], y[:, ::2] = -torch.inf, -torch.inf
    grad_x, grad_y = gradients(router, x, y, 3, torch.ones(6, 3, device=device))
    assert grad_x.sum() == grad_y.sum() == 6 * 3
    assert not grad_x[:, 2:].any()
    assert not grad_y[:, ::2].any()


@ROUTERS
def test_no_gradient(router, device):
    x, y = exact_logits(6, 4, FP32, device)
    assert not router(x, y, 3)[0].requires_grad
    x.requires_grad_()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            scores, indices = router(x, y, 3)
        assert not scores.requires_grad
        assert_routes(x.detach(), y, 3, scores, indices)


@ROUTERS
@pytest.mark.parametrize("k", [0, 3])
def test_indices_are_not_differentiable(router, k, device):
    x, y = (part.requires_grad_() for part in exact_logits(6, 4, FP32, device))
    scores, indices = router(x, y, k)
    assert scores.requires_grad
    assert not indices.requires_grad


@ROUTERS
def test_double_backward(router, device):
    """As autograd finds it through the definition: the scores are linear, their squares are not."""
    results = []
    for function in (router, brute_force_router):
        x, y = (part.requires_grad_() for part in exact_logits(6, 4, FP32, device))
        (grad_x,) = torch.autograd.grad((function(x, y, 3)[0] ** 2).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(grad_x.sum(), (x, y)))
    assert_same_bits(*results)


@ROUTERS
def test_indices_changed_in_place_are_noticed(router, device):
    """The backward pass needs them, so a silent change would give wrong gradients."""
    x, y = (part.requires_grad_() for part in exact_logits(6, 4, FP32, device))
    scores, indices = router(x, y, 3)
    indices += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scores.sum().backward()


# Sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not ON_GPU, reason="test_ptx runs the compiled kernel on rows as long")
def test_largest_expert_sqrt(device):
    x, y = torch.randn(2, 1, 46340, device=device)
    x[0, -1], y[0, -1] = 100.0, 100.0
    x.requires_grad_(), y.requires_grad_()
    scores, indices = omni_router(x, y, 3)
    assert indices[0, 0] == 46340**2 - 1
    assert_same_bits((scores.detach(), indices), reference.factored_router(x.detach(), y.detach(), 3))
    scores[:, 0].sum().backward()
    for leaf in (x, y):
        assert leaf.grad[0, -1] == 1.0
        assert leaf.grad.sum() == 1.0


@pytest.mark.skipif(not ON_GPU, reason="two billion sums take the interpreter hours")
@pytest.mark.parametrize("router", [original, optimized], ids=["original", "optimized"])
def test_largest_expert_sqrt_by_brute_force(router, device):
    x, y = torch.randn(2, 1, 46340, device=device)
    assert_routes_like_factored(x, y, 3, *router(x, y, 3))


def assert_routes_like_factored(x, y, k, scores, indices):
    """Where the definition is out of reach: the scores of the PyTorch version, from the experts they claim to be."""
    indices = indices.long()
    assert torch.equal(scores, reference.factored_router(x, y, k)[0])
    sums = x.float().gather(1, indices // x.shape[1]) + y.float().gather(1, indices % x.shape[1])
    assert torch.equal(sums.to(x.dtype), scores)
    assert (indices.sort(1).values.diff(dim=1) > 0).all()


@pytest.fixture
def whole_gpu():
    """What a test took of the GPU's memory, the next one finds free, in whatever process it runs."""
    yield
    torch.cuda.empty_cache()


@pytest.mark.xdist_group("large")  # one after the other: together they would not fit in memory
@pytest.mark.usefixtures("whole_gpu")
@ROUTERS
@pytest.mark.parametrize("axis", [0, 1])
def test_strides_beyond_int32(router, axis, device):
    """A view of 2³¹ elements and more, of which a CPU maps only the pages that are touched."""
    step = 1 << 30
    logits = exact_logits(3, 3, FP16, device)
    storage = torch.empty(2 * step + 8, dtype=FP16, device=device)
    views = [storage[start:].as_strided((3, 3), (step, 1) if axis == 0 else (1, step)) for start in (0, 4)]
    for view, part in zip(views, logits, strict=True):
        view.copy_(part)
    assert_same_bits(router(*views, 4), brute_force_router(*logits, 4))


def gpu_memory():
    return torch.cuda.get_device_properties(0).total_memory if ON_GPU else 0


LARGE = [(omni_router, 1), (omni_router, 64), (original, 1), (optimized, 1)]


@pytest.mark.xdist_group("large")
@pytest.mark.usefixtures("whole_gpu")
@pytest.mark.skipif(gpu_memory() < 60 << 30, reason="needs a GPU with 60 GiB")
@pytest.mark.parametrize(("router", "k"), LARGE, ids=lambda part: getattr(part, "__name__", str(part)))
def test_more_than_two_to_the_31_elements(router, k):
    """Logits and gradients, and with k = 64 scores and indices too, end beyond 2³¹."""
    num_tokens = (1 << 25) + 3
    x = torch.randn(num_tokens, 64, dtype=BF16, device="cuda").requires_grad_()
    y = torch.randn(num_tokens, 64, dtype=BF16, device="cuda")
    scores, indices = router(x, y, k)
    scores.sum().backward()
    for some in (slice(0, 5), slice(num_tokens // 2, num_tokens // 2 + 5), slice(num_tokens - 5, num_tokens)):
        assert_routes(x.detach()[some], y[some], k, scores.detach()[some], indices[some])
        ones = torch.ones(5, k, dtype=BF16, device="cuda")
        assert torch.equal(x.grad[some], oracle_backward(ones, indices[some], 64)[0])


# Bad input -----------------------------------------------------------------------------------------------------------


class NothingRuns(TorchDispatchMode):
    """Fails on any PyTorch operation."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} ran")


def logits(*shape, dtype=FP32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


OK = logits(4, 3)
TOO_LARGE = logits(1, 46341)
# What is passed, the error, and what its message says: the argument, what it got, what it needs.
BAD_INPUTS = {
    "x is a list": ([[1.0]], OK, 2, TypeError, ["router_logits_x", "list", "torch.Tensor"]),
    "x is an array": (OK.numpy(), OK, 2, TypeError, ["router_logits_x", "ndarray", "torch.Tensor"]),
    "y is None": (OK, None, 2, TypeError, ["router_logits_y", "NoneType", "torch.Tensor"]),
    "x is integer": (OK.long(), OK.long(), 2, TypeError, ["router_logits_x", "torch.int64", "float32"]),
    "x is bool": (OK.bool(), OK.bool(), 2, TypeError, ["router_logits_x", "torch.bool", "bfloat16"]),
    "x is double": (OK.double(), OK.double(), 2, TypeError, ["router_logits_x", "torch.float64", "float16"]),
    "x is complex": (OK.cfloat(), OK.cfloat(), 2, TypeError, ["router_logits_x", "torch.complex64", "float32"]),
    "y is integer": (OK, OK.int(), 2, TypeError, ["router_logits_y", "torch.int32", "float32"]),
    "x is sparse": (OK.to_sparse(), OK, 2, TypeError, ["router_logits_x", "torch.sparse_coo", "dense"]),
    "y is sparse": (OK, OK.to_sparse(), 2, TypeError, ["router_logits_y", "torch.sparse_coo", "dense"]),
    "x is 0-D": (logits(), logits(), 1, ValueError, ["router_logits_x", "()", "(..., num_expert_sqrt)"]),
    "y is 1-D": (OK, logits(3), 2, ValueError, ["router_logits_y", "shape", "(4, 3)", "(3,)"]),
    "tokens differ": (OK, logits(5, 3), 2, ValueError, ["router_logits_y", "shape", "(4, 3)", "(5, 3)"]),
    "experts differ": (OK, logits(4, 2), 2, ValueError, ["router_logits_y", "shape", "(4, 3)", "(4, 2)"]),
    "broadcastable": (OK, logits(1, 3), 2, ValueError, ["router_logits_y", "shape", "(4, 3)", "(1, 3)"]),
    "dtypes differ": (OK, OK.half(), 2, ValueError, ["router_logits_y", "dtype", "torch.float32", "torch.float16"]),
    "devices differ": (OK, logits(4, 3, device="meta"), 2, ValueError, ["router_logits_y", "device", "cpu", "meta"]),
    "no experts": (logits(4, 0), logits(4, 0), 0, ValueError, ["router_logits_x", "(4, 0)", "1 to 46340"]),
    "too many experts": (TOO_LARGE, TOO_LARGE, 2, ValueError, ["router_logits_x", "(1, 46341)", "1 to 46340"]),
    "k is negative": (OK, OK, -1, ValueError, ["num_experts_per_token", "-1", "0 to", "9"]),
    "k is above N²": (OK, OK, 10, ValueError, ["num_experts_per_token", "10", "0 to", "9"]),
    "k is huge": (OK, OK, 1 << 40, ValueError, ["num_experts_per_token", str(1 << 40), "0 to", "9"]),
    "k is a float": (OK, OK, 2.0, TypeError, ["num_experts_per_token", "2.0", "int"]),
    "k is a numpy float": (OK, OK, np.float32(2), TypeError, ["num_experts_per_token", "float32", "int"]),
    "k is a string": (OK, OK, "2", TypeError, ["num_experts_per_token", "'2'", "int"]),
    "k is None": (OK, OK, None, TypeError, ["num_experts_per_token", "None", "int"]),
    "k is a bool": (OK, OK, True, TypeError, ["num_experts_per_token", "True", "int"]),
    "k is a list": (OK, OK, [2], TypeError, ["num_experts_per_token", "[2]", "int"]),
}
OLDER = [triton_omni_router_func, triton_omni_router_func_optimized]
NO_MATRICES = {"1-D": logits(3), "3-D": logits(2, 4, 3)}
BAD_EXPERT_SQRT = {
    "too small": (2, ValueError, ["num_expert_sqrt", "2", "3"]),
    "too large": (4, ValueError, ["num_expert_sqrt", "4", "3"]),
    "zero": (0, ValueError, ["num_expert_sqrt", "0", "3"]),
    "negative": (-3, ValueError, ["num_expert_sqrt", "-3", "3"]),
    "out of range": (46341, ValueError, ["num_expert_sqrt", "46341", "3"]),
    "number of experts": (9, ValueError, ["num_expert_sqrt", "9", "3"]),
    "float": (3.0, TypeError, ["num_expert_sqrt", "3.0", "int"]),
    "string": ("3", TypeError, ["num_expert_sqrt", "'3'", "int"]),
    "None": (None, TypeError, ["num_expert_sqrt", "None", "int"]),
    "bool": (True, TypeError, ["num_expert_sqrt", "True", "int"]),
}


def assert_refused(call, error, words, monkeypatch):
    with (
        count_launches(monkeypatch) as launches,
        NothingRuns(),
        pytest.raises(error, match=re.escape(words[0])) as caught,
    ):
        call()
    assert caught.type is error
    for word in words:
        assert word in str(caught.value)
    assert not launches


@pytest.mark.parametrize(("x", "y", "k", "error", "words"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input(x, y, k, error, words, monkeypatch):
    for router in (omni_router, factored_router, brute_force_router):
        assert_refused(lambda router=router: router(x, y, k), error, words, monkeypatch)
    num_expert_sqrt = x.shape[-1] if isinstance(x, torch.Tensor) and x.ndim else 3
    for router in OLDER:
        assert_refused(lambda router=router: router(x, y, num_expert_sqrt, k), error, words, monkeypatch)


BAD_LOGITS = {name: case for name, case in BAD_INPUTS.items() if not name.startswith("k ")}
INDICES = torch.zeros(4, 2, dtype=torch.int32)
BAD_INDICES = {
    "list": ([[1, 2]], TypeError, ["indices", "list", "torch.Tensor"]),
    "float": (INDICES.float(), TypeError, ["indices", "torch.float32", "int32 or int64"]),
    "short": (INDICES.short(), TypeError, ["indices", "torch.int16", "int32 or int64"]),
    "bool": (INDICES.bool(), TypeError, ["indices", "torch.bool", "int32 or int64"]),
    "sparse": (INDICES.to_sparse(), TypeError, ["indices", "torch.sparse_coo", "dense"]),
    "0-D": (INDICES[0, 0], ValueError, ["indices", "()", "(4, num_experts_per_token)"]),
    "1-D": (INDICES[0], ValueError, ["indices", "(2,)", "(4, num_experts_per_token)"]),
    "3-D": (INDICES[None], ValueError, ["indices", "(1, 4, 2)", "(4, num_experts_per_token)"]),
    "tokens": (INDICES[:3], ValueError, ["indices", "(3, 2)", "(4, num_experts_per_token)", "router_logits_x"]),
    "device": (INDICES.to("meta"), ValueError, ["indices", "meta", "cpu", "router_logits_x"]),
}


@pytest.mark.parametrize(("x", "y", "_", "error", "words"), BAD_LOGITS.values(), ids=BAD_LOGITS.keys())
def test_bad_logits_of_replay(x, y, _, error, words, monkeypatch):
    assert_refused(lambda: replay(x, y, INDICES), error, words, monkeypatch)


@pytest.mark.parametrize(("indices", "error", "words"), BAD_INDICES.values(), ids=BAD_INDICES.keys())
def test_bad_indices(indices, error, words, monkeypatch):
    assert_refused(lambda: replay(OK, OK, indices), error, words, monkeypatch)


@pytest.mark.parametrize("normalize", ["sigmoid", "", True, 1, ["softmax"], np.zeros(3)], ids=repr)
def test_bad_normalize(normalize, monkeypatch):
    words = ["normalize", "None", "'log_softmax', 'softmax' or 'topk'", f"got {normalize!r}"]
    for call in (
        lambda: omni_router(OK, OK, 2, normalize=normalize),
        lambda: brute_force_router(OK, OK, 2, normalize),
        lambda: replay(OK, OK, INDICES, normalize=normalize),
    ):
        assert_refused(call, ValueError, words, monkeypatch)


@pytest.mark.parametrize(("x", "y", "k", "error", "words"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_of_explain(x, y, k, error, words, monkeypatch):
    assert_refused(lambda: explain(x, y, k), error, words, monkeypatch)


@pytest.mark.parametrize("router", [*OLDER, factored_router, brute_force_router])
@pytest.mark.parametrize("x", NO_MATRICES.values(), ids=NO_MATRICES)
def test_functions_that_take_matrices_alone(router, x, monkeypatch):
    arguments = (3, 2) if router in OLDER else (2,)
    words = ["router_logits_x", str(tuple(x.shape)), "2-D (num_tokens, num_expert_sqrt)"]
    assert_refused(lambda: router(x, x, *arguments), ValueError, words, monkeypatch)


@pytest.mark.parametrize("router", OLDER)
@pytest.mark.parametrize(("num_expert_sqrt", "error", "words"), BAD_EXPERT_SQRT.values(), ids=BAD_EXPERT_SQRT.keys())
def test_bad_num_expert_sqrt(router, num_expert_sqrt, error, words, monkeypatch):
    assert_refused(lambda: router(OK, OK, num_expert_sqrt, 2), error, words, monkeypatch)


@pytest.mark.parametrize("router", [omni_router, factored_router])
@pytest.mark.parametrize("scores_dtype", [torch.float64, "float32", np.zeros(3)], ids=["double", "string", "array"])
def test_bad_scores_dtype(router, scores_dtype, monkeypatch):
    words = ["scores_dtype", "bfloat16", repr(scores_dtype)]
    assert_refused(lambda: router(OK, OK, 2, scores_dtype), TypeError, words, monkeypatch)
    assert_refused(lambda: replay(OK, OK, INDICES, scores_dtype), TypeError, words, monkeypatch)
    assert_refused(lambda: omni_router(OK, OK, 2, scores_dtype, "softmax"), TypeError, words, monkeypatch)


@ROUTERS
def test_a_sign_that_pytorch_has_put_off(router, device):
    """The imaginary part of a conjugate is a view of other numbers, marked as negative."""
    x, y = exact_logits(5, 4, FP32, device)
    negative = torch.complex(x, -x).conj().imag  # x
    assert negative.is_neg()
    assert_same_bits(router(negative, y, 3), router(x, y, 3))
    grad = torch.randint(-3, 4, (5, 3), device=device).float()
    marked = torch.complex(grad, -grad).conj().imag
    x.requires_grad_()
    scores, _ = router(x, y, 3)
    got, want = (torch.autograd.grad(scores, x, incoming, retain_graph=True) for incoming in (marked, grad))
    assert_same_bits(got, want)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_devices_differ():
    with pytest.raises(ValueError, match=r"router_logits_y must have the device of router_logits_x, cuda:0, got cpu"):
        omni_router(OK.cuda(), OK, 2)


def test_what_refusals_are_watched_by_sees_a_good_call(device, monkeypatch):
    x, y = exact_logits(2, 3, FP32, device)
    with count_launches(monkeypatch) as launches:
        omni_router(x, y, 2)
    assert launches
    with pytest.raises(AssertionError, match="ran"), NothingRuns():
        omni_router(x, y, 2)
