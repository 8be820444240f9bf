"""omni_router at home in PyTorch: a registered operator that compiles, exports, captures, checkpoints and batches."""

import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.utils.checkpoint
from cases import DTYPES, ON_GPU, DispatchMode, assert_same_bits, dtype_name, oracle_backward
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import functional
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import omni_kernels
from omni_kernels import (
    brute_force_router,
    omni_router,
    replay,
    triton_omni_router_func,
    triton_omni_router_func_optimized,
)

FP32, FP16, BF16 = DTYPES
BACKENDS = ["aot_eager", "inductor"] if ON_GPU else ["aot_eager"]  # without a GPU inductor asks for a C++ compiler
COMPILED = pytest.mark.parametrize("backend", BACKENDS)
NEEDS_GPU = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
OPERATORS = torch.ops.omni_kernels
ROUTE, NORMALIZED = OPERATORS.omni_router.default, OPERATORS.omni_router_normalized.default


def logits(num_tokens, num_expert_sqrt, device, dtype=FP32, seed=0):
    """Two leaves whose sums are exact and distinct enough: every path routes them alike."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randint(-99, 100, (2, num_tokens, num_expert_sqrt), generator=generator) / 8
    return tuple(part.to(device, dtype).requires_grad_() for part in parts)


def gradients(function, x, y):
    """Scores, indices, and the gradients of a weighted sum of the scores."""
    scores, indices = function(x, y)
    weights = torch.linspace(-1, 1, scores.numel(), device=x.device).view_as(scores).to(scores.dtype)
    return scores.detach(), indices, *torch.autograd.grad(scores, (x, y), weights)


def route(x, y):
    return omni_router(x, y, 3)


def route_in_batches(x, y):
    """Leading dimensions of another order than memory's."""
    twice = (part.expand(2, *part.shape).transpose(0, 1) for part in (x, y))
    return tuple(part[:, 1] for part in omni_router(*twice, 3))


def normalized(normalize):
    return lambda x, y: omni_router(x, y, 3, normalize=normalize)


def replayed(normalize):
    def choose_and_replay(x, y):
        _, indices = omni_router(x.detach(), y.detach(), 3)
        return replay(x, y, indices.long(), normalize=normalize), indices

    return choose_and_replay


# Everything that routes, by name: the function, and how the definition normalizes what it gives.
WAYS = {
    "raw": (route, None),
    "batches": (route_in_batches, None),
    "softmax": (normalized("softmax"), "softmax"),  # "log_softmax" takes the same operators
    "topk": (normalized("topk"), "topk"),
    "replay": (replayed(None), None),
    "replay softmax": (replayed("softmax"), "softmax"),
}
EVERY_WAY = pytest.mark.parametrize(("route", "normalize"), WAYS.values(), ids=WAYS)
OPERATORS_ALONE = ["raw", "softmax", "replay softmax"]  # each operator in one way
EVERY_OPERATOR = pytest.mark.parametrize(
    ("route", "normalize"), [WAYS[name] for name in OPERATORS_ALONE], ids=OPERATORS_ALONE
)


def definition(normalize):
    return lambda x, y: brute_force_router(x, y, 3, normalize)


def assert_alike(got, want, normalize):
    """The same bits; but sums of exponentials may be added in another order."""
    if normalize is None:
        assert_same_bits(got, want)
    else:
        torch.testing.assert_close(tuple(got), tuple(want))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


# Registration --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_tokens", "k", "dtype", "scores_dtype"),
    [(5, 3, BF16, BF16), (5, 9, FP16, FP32), (0, 3, FP32, FP32), (5, 0, BF16, FP32)],
)
def test_opcheck(num_tokens, k, dtype, scores_dtype, device):
    x, y = logits(num_tokens, 4, device, dtype)
    torch.library.opcheck(ROUTE, (x, y, k, scores_dtype))
    torch.library.opcheck(ROUTE, (x.t().contiguous().t(), y.detach(), k, scores_dtype))
    scores, indices = ROUTE(x, y, k, scores_dtype)
    opcheck_kernel(OPERATORS.omni_router_kernel.default, x, y, scores, indices)
    grad = torch.ones_like(scores)
    torch.library.opcheck(OPERATORS.omni_router_backward.default, (grad.requires_grad_(), indices, 4, dtype))
    opcheck_kernel(
        OPERATORS.omni_router_backward_kernel.default, grad, indices, *(torch.empty_like(x) for _ in range(2))
    )


@pytest.mark.parametrize(("num_tokens", "normalize"), [(5, "softmax"), (0, "topk")])
def test_opcheck_of_normalized_scores(num_tokens, normalize, device):
    x, y = logits(num_tokens, 4, device, BF16)
    _, chosen = route(x, y)
    for experts in (None, chosen):
        torch.library.opcheck(NORMALIZED, (x, y, experts, 3, FP32, normalize, False))
        opcheck_kernel(NORMALIZED, x, y, experts, 3, FP32, normalize, True)
    scores, indices, saved = NORMALIZED(x.detach(), y.detach(), None, 3, FP32, normalize, True)
    backward = OPERATORS.omni_router_normalized_backward.default
    opcheck_kernel(backward, torch.ones_like(scores), indices, x, y, saved, normalize)


def opcheck_kernel(operator, *args):
    torch.library.opcheck(operator, [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args])


def test_kernel_operators_write_to_any_matrices(device):
    x, y = (part.detach() for part in logits(6, 4, device))
    want = route(x, y)
    grad = torch.ones_like(want[0])
    for operator, args, results in (
        (OPERATORS.omni_router_kernel.default, (x, y), want),
        (OPERATORS.omni_router_backward_kernel.default, (grad, want[1]), oracle_backward(grad, want[1], 4)),
    ):
        for like in (torch.empty_like, lambda result: torch.empty_like(result.t().contiguous()).t(), at_odd_address):
            matrices = [like(result) for result in results]
            assert operator(*args, *matrices) is None
            assert_same_bits(matrices, results)


def at_odd_address(matrix):
    """A matrix like this one, except that it begins one number later than memory does."""
    return torch.empty(matrix.numel() + 1, dtype=matrix.dtype, device=matrix.device)[1:].view(matrix.shape)


def test_fake_tensors(device):
    with FakeTensorMode():
        x, y = torch.empty(2, 5, 4, device=device, dtype=BF16).unbind()
        scores, indices = omni_router(x.requires_grad_(), y, 3, scores_dtype=FP32)
        scores.sum().backward()
    assert (scores.shape, scores.dtype, indices.shape, indices.dtype) == ((5, 3), FP32, (5, 3), torch.int32)
    assert (x.grad.shape, x.grad.dtype, x.grad.device.type) == ((5, 4), BF16, torch.device(device).type)


def test_eager_calls_do_without_the_operator(device, monkeypatch):
    """Not even where every tensor made is one of a default device."""
    x, y = logits(6, 4, device)
    want = gradients(route, x, y)
    for name in ("operator", "backward_operator"):
        monkeypatch.setattr(omni_kernels.router._OMNI_ROUTER, name, None)
    assert_same_bits(gradients(route, x, y), want)
    with torch.device(device):
        assert_same_bits(gradients(route, x, y), want)


class FunctionMode(TorchFunctionMode):
    def __init__(self):
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


@EVERY_WAY
@pytest.mark.parametrize("mode", [FunctionMode, DispatchMode])
def test_modes_see_the_operator(route, normalize, mode, device):
    x, y = logits(6, 4, device)
    with mode() as watching:
        got = gradients(route, x, y)
    assert ROUTE in watching.seen
    assert_alike(got, gradients(route, x, y), normalize)


def test_checkpoint_may_keep_the_operator(device):
    """A policy of selective checkpoints finds it by its name: what it keeps is not computed again."""
    x, y = logits(6, 4, device)
    policy = functools.partial(torch.utils.checkpoint.create_selective_checkpoint_contexts, [ROUTE])
    scores, _ = checkpoint(route, x, y, use_reentrant=False, context_fn=policy)
    with DispatchMode() as watching:
        scores.sum().backward()
    assert OPERATORS.omni_router_backward.default in watching.seen
    assert ROUTE not in watching.seen


@EVERY_WAY
def test_subclasses_and_meta_tensors(route, normalize, device):
    class Logits(torch.Tensor):
        pass

    x, y = (part.detach() for part in logits(6, 4, device))
    assert type(route(x.as_subclass(Logits), y)[0]) is Logits
    assert type(route(torch.nn.Parameter(x), y)[0]) is torch.Tensor
    assert route(x.to("meta"), y.to("meta"))[1].shape == (6, 3)


def test_saved_tensors(device):
    """The indices alone, through the hooks that people put there."""
    x, y = logits(6, 4, device)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: packed.append(tensor) or tensor.cpu(), lambda part: part.to(device)
    ):
        scores, indices = route(x, y)
    scores.sum().backward()
    assert [part.data_ptr() for part in packed] == [indices.data_ptr()]
    assert x.grad.sum() == y.grad.sum() == 18


def test_imported_twice(tmp_path):
    """Under another name, and again under its own after it was forgotten: each import works, and the older ones too."""
    package = pathlib.Path(omni_kernels.__file__).parent
    shutil.copytree(package, tmp_path / "their_router", ignore=shutil.ignore_patterns("__pycache__"))
    program = """
import sys, torch, omni_kernels, their_router
from torch.fx.experimental.proxy_tensor import make_fx
routers = [omni_kernels.omni_router, their_router.omni_router]
for name in [name for name in sys.modules if name.split(".")[0] == "omni_kernels"]:
    del sys.modules[name]
import omni_kernels as again
routers.append(again.omni_router)
for router in routers:
    x = torch.zeros(1, 2, requires_grad=True)
    scores, indices = router(x, torch.tensor([[1.0, 3.0]]), 3)
    scores.sum().backward()
    traced = make_fx(lambda x: router(x, x, 3)[0])(torch.zeros(1, 2)).graph
    print(indices.tolist(), x.grad.tolist(), *[node.target for node in traced.nodes if "omni_router" in node.name])
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lines = [line.rpartition(" ") for line in run.stdout.splitlines()]
    assert [result for result, _, _ in lines] == ["[[1, 3, 0]] [[2.0, 1.0]]"] * 3
    assert len({name for _, _, name in lines}) == 3


# Compilers -----------------------------------------------------------------------------------------------------------


@EVERY_WAY
@COMPILED
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_compiles_without_graph_breaks(route, normalize, backend, dtype, device):
    x, y = logits(6, 4, device, dtype)

    def layer(x, y):
        scores, indices = route(x / 2, y + 1)
        return scores * 2, indices

    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=False)
    assert_alike(gradients(compiled, x, y), gradients(layer, x, y), normalize)


@EVERY_OPERATOR
@COMPILED
def test_compiles_once_for_all_token_counts(route, normalize, backend, device):
    compiled = torch.compile(route, fullgraph=True, backend=backend, dynamic=True)
    gradients(compiled, *logits(6, 4, device))
    with torch.compiler.set_stance("fail_on_recompile"):
        for num_tokens in (2, 7, 100):
            x, y = logits(num_tokens, 4, device)
            assert_alike(gradients(compiled, x, y), gradients(route, x, y), normalize)


@EVERY_OPERATOR
@COMPILED
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_compiles_for_hardly_any_tokens(route, normalize, backend, num_tokens, device):
    x, y = logits(num_tokens, 4, device)
    compiled = torch.compile(route, fullgraph=True, backend=backend)
    assert_alike(gradients(compiled, x, y), gradients(route, x, y), normalize)


def test_compiles_with_fp32_scores(device):
    x, y = logits(6, 4, device, BF16)
    compiled = torch.compile(omni_router, fullgraph=True, backend="aot_eager")
    assert_same_bits(
        gradients(lambda x, y: compiled(x, y, 3, scores_dtype=FP32), x, y),
        gradients(lambda x, y: omni_router(x, y, 3, scores_dtype=FP32), x, y),
    )


def test_checks_stay_when_compiled(device):
    x, y = logits(6, 4, device)
    compiled = torch.compile(omni_router, backend="eager")
    with pytest.raises(ValueError, match=r"num_experts_per_token must be from 0 to num_expert_sqrt² = 16, got 17"):
        compiled(x, y, 17)
    with pytest.raises(ValueError, match="router_logits_y must have the shape of router_logits_x"):
        compiled(x, y[:, :3], 3)
    with pytest.raises(TypeError, match="num_experts_per_token must be an int"):
        compiled(x, y, 3.0)


@EVERY_WAY
@pytest.mark.parametrize("strict", [False, True])
def test_exports(route, normalize, strict, device):
    class Layer(torch.nn.Module):
        def forward(self, x, y):
            return route(x, y)

    tokens = torch.export.Dim("tokens", min=2)
    example = tuple(part.detach() for part in logits(6, 4, device))
    program = torch.export.export(Layer(), example, dynamic_shapes=({0: tokens}, {0: tokens}), strict=strict)
    routers = [node.target for node in program.graph.nodes if node.target in (ROUTE, NORMALIZED)]
    assert 0 < len(routers) == len(set(routers))
    for num_tokens in (2, 9):
        x, y = (part.detach() for part in logits(num_tokens, 4, device))
        assert_alike(program.module()(x, y), route(x, y), normalize)


@EVERY_OPERATOR
@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(route, normalize, tracing_mode, pre_dispatch, device):
    x, y = (part.detach() for part in logits(6, 4, device))
    traced = make_fx(route, tracing_mode=tracing_mode, pre_dispatch=pre_dispatch)(x, y)
    operator = ROUTE if pre_dispatch else OPERATORS.omni_router_kernel.default
    assert [node.target for node in traced.graph.nodes].count(operator) == 1
    assert_alike(traced(y, x), route(y, x), normalize)


@EVERY_OPERATOR
@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_jit_trace(route, normalize, device):
    x, y = (part.detach() for part in logits(6, 4, device))
    assert_alike(torch.jit.trace(route, (x, y))(y, x), route(y, x), normalize)


AHEAD_OF_TIME = """
import sys, torch
from omni_kernels import omni_router

def add(x, y):
    return x * 2 + y, y

def route(x, y):
    return omni_router(x * 2, y, 3)

class Layer(torch.nn.Module):
    forward = staticmethod({"add": add, "route": route}[sys.argv[1]])

tokens = torch.export.Dim("tokens", min=2)
example = torch.randn(2, 6, 4, device="cuda").unbind()
program = torch.export.export(Layer(), example, dynamic_shapes=({0: tokens}, {0: tokens}))
layer = torch._inductor.aoti_load_package(
    torch._inductor.aoti_compile_and_package(program, package_path=f"{sys.argv[2]}/layer.pt2")
)
x, y = torch.randn(2, 9, 4, device="cuda")
print(all(map(torch.equal, layer(x, y), Layer.forward(x, y))))
"""


@NEEDS_GPU
def test_compiles_ahead_of_time(tmp_path):
    """Into a library of its own (AOTInductor), where PyTorch can do so with its own operators."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    programs = []
    for name in ("add", "route"):
        (tmp_path / name).mkdir()
        command = [sys.executable, "-c", AHEAD_OF_TIME, name, tmp_path / name]
        programs.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    printed = [program.communicate()[0].split() for program in programs]
    if programs[0].returncode:
        pytest.skip(f"PyTorch's own operators end with {programs[0].returncode}")
    assert printed == [["True"], ["True"]]


@EVERY_OPERATOR
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_token_counts_that_the_data_tells(route, normalize, device):
    """Two masks that keep as many tokens; where they do not, the program says so when it runs."""
    x, y = logits(6, 4, device)
    first, second = torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 0, 0]], device=device).bool()

    def route_some(x, y, first, second):
        return route(x[first], y[second])

    compiled = torch.compile(route_some, fullgraph=True, backend="aot_eager")
    got = gradients(lambda x, y: compiled(x, y, first, second), x, y)
    assert_alike(got, gradients(lambda x, y: route_some(x, y, first, second), x, y), normalize)
    with pytest.raises(RuntimeError, match=r"must have the tokens of router_logits_x|Eq\(u0, u1\)"):
        compiled(x, y, first, ~second)  # PyTorch 2.11 says it in its own words


@EVERY_OPERATOR
def test_token_counts_marked_unbacked(route, normalize, device):
    x, y = (part.detach() for part in logits(6, 4, device))
    torch._dynamo.decorators.mark_unbacked(x, 0)
    torch._dynamo.decorators.mark_unbacked(y, 0)
    compiled = torch.compile(route, fullgraph=True, backend="aot_eager")
    compiled(x, y)
    with torch.compiler.set_stance("fail_on_recompile"):
        for num_tokens in (0, 1, 9):
            x, y = (part.detach() for part in logits(num_tokens, 4, device))
            assert_alike(compiled(x, y), route(x, y), normalize)


@EVERY_OPERATOR
def test_compiled_autograd(route, normalize, device):
    x, y = logits(6, 4, device)
    want = gradients(route, x, y)[2:]
    scores, _ = route(x, y)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        scores.backward(torch.linspace(-1, 1, 18, device=device).view(6, 3))
    assert_alike((x.grad, y.grad), want, normalize)


@pytest.mark.parametrize("older", [triton_omni_router_func, triton_omni_router_func_optimized])
def test_older_functions(older, device):
    """They compile and transform as omni_router does, with kernels of their own."""

    def route_older(x, y):
        return older(x, y, 4, 3)

    x, y = logits(6, 4, device)
    compiled = torch.compile(route_older, fullgraph=True, backend="aot_eager")
    assert_same_bits(gradients(compiled, x, y), gradients(route, x, y))
    for transform in ("grad", "jvp", "vmap of grad"):
        assert_transforms_alike(TRANSFORMS[transform], route_older, device)


# Training ------------------------------------------------------------------------------------------------------------


@EVERY_OPERATOR
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(route, normalize, use_reentrant, device):
    x, y = logits(6, 4, device)
    want = gradients(route, x, y)
    scores, indices = checkpoint(route, x, y, use_reentrant=use_reentrant)
    scores.backward(torch.linspace(-1, 1, 18, device=device).view(6, 3))
    assert_alike((scores.detach(), indices, x.grad, y.grad), want, normalize)


@EVERY_OPERATOR
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=dtype_name)
def test_autocast_leaves_the_dtype_alone(route, normalize, dtype, device):
    for own in DTYPES:
        x, y = logits(6, 4, device, own)
        with torch.autocast(torch.device(device).type, dtype):
            got = gradients(route, x, y)
        assert_alike(got, gradients(route, x, y), normalize)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=dtype_name)
def test_trains_under_autocast_with_a_scaler(dtype, device):
    torch.manual_seed(0)
    kind = torch.device(device).type
    gates = torch.nn.Linear(8, 32).to(device)
    hidden = torch.randn(6, 8, device=device)
    scaler, optimizer = torch.amp.GradScaler(kind, init_scale=256.0), torch.optim.SGD(gates.parameters(), lr=1e-3)
    before = gates.weight.detach().clone()
    with torch.autocast(kind, dtype):
        x, y = gates(hidden).chunk(2, dim=1)
        scores, _ = omni_router(x, y, 3)
        loss = scores.float().logsumexp(1).sum()
    assert x.dtype == scores.dtype == dtype
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    change = gates.weight.detach() - before
    assert change.isfinite().all()
    assert change.any()


@EVERY_WAY
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_double_backward(route, normalize, dtype, device):
    """As autograd finds through the definition: of raw scores a gather in the incoming gradient, nothing for logits."""
    x, y = logits(6, 4, device, dtype)
    results = []
    for router in (route, definition(normalize)):
        incoming = (torch.arange(18, device=device).view(6, 3) - 8).to(dtype).requires_grad_()
        grads = torch.autograd.grad(router(x, y)[0], (x, y), incoming, create_graph=True)
        weights = [torch.arange(24, device=device).view(6, 4).to(dtype) - shift for shift in (5, 11)]
        back = torch.autograd.grad(grads, (incoming, x, y), weights, allow_unused=True, materialize_grads=True)
        results.append(back)
    if normalize is None:
        assert_same_bits(*results)
    else:  # what is left of gradients a hundred times as large
        rtol = {FP32: 1e-4, FP16: 5e-3, BF16: 4e-2}[dtype]
        torch.testing.assert_close(*map(tuple, results), rtol=rtol, atol=rtol)
    assert results[0][0].any()
    assert results[0][1].any() == results[0][2].any() == (normalize is not None)


def test_third_backward(device):
    x, y = logits(6, 4, device)
    incoming, weights = torch.randn(6, 3, device=device).requires_grad_(), torch.randn(6, 4, device=device)
    weights.requires_grad_()
    (grad,) = torch.autograd.grad(route(x, y)[0], x, incoming, create_graph=True)
    (back,) = torch.autograd.grad(grad, incoming, weights, create_graph=True)
    (again,) = torch.autograd.grad(back, weights, incoming.detach())
    assert torch.equal(again, grad)  # the gather's gradient is the sum the router's was


# Transforms ----------------------------------------------------------------------------------------------------------

# function -> (x, y, their tangents) -> what is compared with the definition
TRANSFORMS = {
    "jvp": lambda f: lambda x, y, u, v: jvp(lambda x, y: f(x, y)[0], (x, y), (u, v)),
    "jvp of x": lambda f: lambda x, y, u, v: jvp(lambda x: f(x, y), (x,), (u,), has_aux=True),
    "jacfwd": lambda f: lambda x, y, u, v: jacfwd(lambda x, y: f(x, y)[0], (0, 1))(x, y),
    "linearize": lambda f: lambda x, y, u, v: linearize(lambda x, y: f(x, y)[0], x, y)[1](u, v),
    "grad": lambda f: lambda x, y, u, v: grad(loss_of(f), (0, 1))(x, y),
    "vjp": lambda f: lambda x, y, u, v: vjp(lambda x, y: f(x, y)[0], x, y)[1](u[:, :3]),
    "jacrev": lambda f: lambda x, y, u, v: jacrev(lambda x, y: f(x, y)[0], (0, 1))(x, y),
    "hessian": lambda f: lambda x, y, u, v: hessian(loss_of(f), (0, 1))(x, y),
    "grad of jvp": lambda f: grad(lambda x, y, u, v: jvp(lambda y: loss_of(f)(x, y), (y,), (v,))[1]),
    "jvp of jvp": lambda f: lambda x, y, u, v: jvp(lambda x: jvp(lambda y: f(x, y)[0] ** 2, (y,), (v,)), (x,), (u,)),
    "jacrev of grad": lambda f: lambda x, y, u, v: jacrev(grad(loss_of(f)), (0, 1))(x, y),
    "vmap of jvp": lambda f: torch.vmap(lambda x, y, u, v: jvp(lambda x: one(f, x, y), (x,), (u,))),
    "jvp of vmap": lambda f: lambda x, y, u, v: jvp(torch.vmap(lambda x, y: one(f, x, y)), (x, y), (u, v)),
    "vmap of grad": lambda f: torch.vmap(grad(lambda x, y, u, v: (one(f, x, y) ** 2).sum(), (0, 1))),
    "vmap of hessian": lambda f: torch.vmap(hessian(lambda x, y, u, v: (one(f, x, y) ** 2).sum())),
    "functionalize": lambda f: lambda x, y, u, v: functionalize(f)(x, y),
    "jacobian": lambda f: lambda x, y, u, v: functional.jacobian(lambda x: f(x, y)[0], x, vectorize=True),
    "jacobian forward": lambda f: (
        lambda x, y, u, v: functional.jacobian(lambda x: f(x, y)[0], x, vectorize=True, strategy="forward-mode")
    ),
    "dual tensors": lambda f: lambda x, y, u, v: dual(f, x, y, u, v),
    "one dual tensor": lambda f: lambda x, y, u, v: dual(f, x, y, None, v),
    "no gradient inside": lambda f: grad(lambda x, y, u, v: grad(lambda x: loss_without(f, x, y))(x).square().sum()),
}


def one(function, x, y):
    """The scores of one token, without a dimension for it."""
    return function(x[None], y[None])[0][0]


def loss_of(function):
    """Curved, so that second derivatives are not zero."""
    return lambda x, y: (function(x, y)[0] ** 2).sum()


def loss_without(function, x, y):
    with torch.no_grad():
        scores, _ = function(x, y)
    return (scores * x[:, :3]).sum()


def dual(function, x, y, tangent_x, tangent_y):
    with forward_ad.dual_level():
        x, y = (
            part if tangent is None else forward_ad.make_dual(part, tangent)
            for part, tangent in ((x, tangent_x), (y, tangent_y))
        )
        return tuple(forward_ad.unpack_dual(function(x, y)[0]))


def assert_transforms_alike(
    transform, function, device, dtype=FP32, compiled=lambda function: function, normalize=None
):
    """As the definition under the same transform. The logits are small integers, so every sum is exact."""
    generator = torch.Generator().manual_seed(0)
    inputs = [part.to(device, dtype) for part in torch.rand(4, 6, 4, generator=generator).argsort(2) * 4.0]
    inputs[1] /= 4  # no two sums are equal
    if normalize is not None:
        inputs[:2] = inputs[0] / 4, inputs[1] / 4  # more than one expert counts
    got = compiled(transform(function))(*inputs)
    want = transform(definition(normalize))(*inputs)
    torch.testing.assert_close(got, want)


@EVERY_OPERATOR
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(route, normalize, name, device):
    assert_transforms_alike(TRANSFORMS[name], route, device, normalize=normalize)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_16_bits(name, device):
    assert_transforms_alike(TRANSFORMS[name], route, device, BF16)


@EVERY_OPERATOR
@COMPILED
@pytest.mark.parametrize(
    "name", ["jvp", "grad", "jacrev", "grad of jvp", "jvp of jvp", "vmap of jvp", "vmap of grad", "dual tensors"]
)
def test_transforms_compiled(route, normalize, name, backend, device):
    compiled = functools.partial(torch.compile, fullgraph=True, backend=backend)
    assert_transforms_alike(TRANSFORMS[name], route, device, compiled=compiled, normalize=normalize)


@EVERY_OPERATOR
def test_dual_tensors_into_compiled_code(route, normalize, device):
    """Also where it had been compiled without tangents. PyTorch refuses them together with gradients."""
    x, y = logits(6, 4, device)
    tangents = torch.arange(48.0, device=device).view(2, 6, 4)
    compiled = torch.compile(route, fullgraph=True, backend="aot_eager")
    compiled(x.detach(), y.detach())
    got = dual(compiled, x.detach(), y.detach(), *tangents)
    assert_alike(got, dual(definition(normalize), x.detach(), y.detach(), *tangents), normalize)
    with pytest.raises(NotImplementedError, match="jvp"):
        dual(compiled, x, y, *tangents)


def test_tangents_of_nan_and_infinity(device):
    """A tangent is the sum of two, whatever the score."""
    x, y = (part.detach() for part in logits(3, 4, device))
    x[0, 1], x[1, 2], y[2, :3] = torch.nan, torch.inf, -torch.inf
    tangents = torch.arange(24.0, device=device).view(2, 3, 4)
    scores, indices = route(x, y)
    got = dual(route, x, y, *tangents)
    rows, columns = indices.long() // 4, indices.long() % 4
    assert_same_bits(got, (scores, tangents[0].gather(1, rows) + tangents[1].gather(1, columns)))


@EVERY_OPERATOR
def test_gradients_through_a_functional_gradient(route, normalize, device):
    def twice(function):
        x, y = logits(6, 4, device)
        inner = grad(lambda x: loss_of(function)(x, y))(x)
        return inner.detach(), *torch.autograd.grad(inner.sum(), (x, y))

    assert_alike(twice(route), twice(definition(normalize)), normalize)


@EVERY_OPERATOR
def test_functional_gradients_have_the_kernels_bits(route, normalize, device):
    x, y = logits(6, 4, device)
    weights = torch.randn(6, 3, device=device)
    want = torch.autograd.grad(route(x, y)[0], (x, y), weights)
    assert_alike(vjp(lambda x, y: route(x, y)[0], x.detach(), y.detach())[1](weights), want, normalize)


@EVERY_OPERATOR
@pytest.mark.parametrize("in_dims", [(0, 0), (1, 0), (0, None), (None, 2)])
@pytest.mark.parametrize("num_tokens", [0, 6])
def test_vmap(route, normalize, in_dims, num_tokens, device):
    """As a loop over the batch; also backward, where a logit that all share gets the sum."""
    leaves = logits(3 * num_tokens, 4, device, seed=1)
    batches = [leaf.detach().unflatten(0, (3, num_tokens)) for leaf in leaves]
    x, y = (
        (batch[0] if dim is None else batch.movedim(0, dim)).contiguous().requires_grad_()
        for batch, dim in zip(batches, in_dims, strict=True)
    )
    parts = [
        [part if dim is None else part.select(dim, index) for part, dim in zip((x, y), in_dims, strict=True)]
        for index in range(3)
    ]

    def loop(x, y):
        return tuple(map(torch.stack, zip(*(route(*part) for part in parts), strict=True)))

    got, want = gradients(torch.vmap(route, in_dims), x, y), gradients(loop, x, y)
    assert_alike(got[:2], want[:2], normalize)
    torch.testing.assert_close(got, want)


@EVERY_OPERATOR
def test_vmap_of_no_batch(route, normalize, device):
    x = torch.zeros(0, 6, 4, device=device)
    scores, indices = torch.vmap(route)(x, x)
    assert scores.shape == indices.shape == (0, 6, 3)


@EVERY_OPERATOR
def test_vmap_of_the_backward(route, normalize, device):
    x, y = logits(6, 4, device)
    scores, _ = route(x, y)
    incoming = torch.randint(-8, 9, (5, 6, 3), device=device).float()
    batched = torch.autograd.grad(scores, (x, y), incoming, retain_graph=True, is_grads_batched=True)
    single = [torch.autograd.grad(scores, (x, y), grad, retain_graph=True) for grad in incoming]
    assert_alike(batched, [torch.stack(grads) for grads in zip(*single, strict=True)], normalize)


# Scores of another dtype ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [5, 16, 70])  # by a kernel, and past its limit
@pytest.mark.parametrize("scores_dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_scores_dtype(dtype, scores_dtype, k, device):
    """The fp32 sums, rounded once; the experts do not depend on it, and the gradients have the logits' dtype."""
    x, y = logits(6, 9, device, dtype)
    scores, indices = omni_router(x, y, k, scores_dtype=scores_dtype)
    want, want_indices = brute_force_router(x.detach().float(), y.detach().float(), k)
    assert_same_bits((scores.detach(), indices), (want.to(scores_dtype), want_indices))
    grad = torch.randn(6, k, device=device).to(scores_dtype)
    want = [part.to(dtype) for part in oracle_backward(grad.float(), indices, 9)]
    grads = torch.autograd.grad(scores, (x, y), grad)
    if k <= 64:
        assert_same_bits(grads, want)
    else:
        torch.testing.assert_close(grads, tuple(want))


@pytest.mark.parametrize("scores_dtype", [torch.float64, torch.int32, "float32", 32])
def test_bad_scores_dtype(scores_dtype, device):
    with pytest.raises(TypeError, match=r"scores_dtype must be None, float32, float16 or bfloat16, got "):
        omni_router(*logits(6, 4, device), 3, scores_dtype=scores_dtype)


# Processes, streams, graphs, devices ---------------------------------------------------------------------------------

SOME_GRADIENTS = """
import hashlib, torch
from omni_kernels import omni_router
device = "cuda" if torch.cuda.is_available() else "cpu"
generator = torch.Generator().manual_seed(0)
size = (2, 5000, 64) if device == "cuda" else (2, 6, 8)
x, y = (part.to(device).requires_grad_() for part in torch.randn(size, generator=generator))
scores, indices = omni_router(x, y, 16)
weights = torch.randn(scores.shape, generator=generator).to(device)
grads = torch.autograd.grad(scores, (x, y), weights)
print(hashlib.sha256(torch.stack(grads).cpu().numpy().tobytes()).hexdigest())
"""


def test_two_processes_give_the_same_bits():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SOME_GRADIENTS]
    runs = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    digests = [run.communicate()[0].strip() for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert len(digests[0]) == hashlib.sha256().digest_size * 2
    assert digests[0] == digests[1]


@NEEDS_GPU
@pytest.mark.parametrize(("num_expert_sqrt", "k"), [(64, 16), (256, 40)])
def test_cuda_graph(num_expert_sqrt, k):
    """Forward and backward captured once, replayed on other logits."""
    x, y = logits(100, num_expert_sqrt, "cuda")
    weights = torch.randn(100, k, device="cuda")

    def step():
        scores, indices = omni_router(x, y, k)
        return scores.detach(), indices, *torch.autograd.grad(scores, (x, y), weights)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        with torch.no_grad():
            for leaf, value in zip((x, y), logits(100, num_expert_sqrt, "cuda", seed=seed), strict=True):
                leaf.copy_(value)
        graph.replay()
        assert_same_bits(captured, step())


@NEEDS_GPU
def test_compiled_into_cuda_graphs():
    x, y = logits(64, 64, "cuda", BF16)
    compiled = torch.compile(route, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        assert_same_bits(gradients(compiled, x, y), gradients(route, x, y))


@NEEDS_GPU
def test_side_stream():
    """The logits are written on the same stream, behind work that keeps it busy; nobody waits for another stream."""
    want = gradients(route, *logits(5000, 64, "cuda"))
    values = logits(5000, 64, "cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        got = gradients(route, *(value.detach().clone().requires_grad_() for value in values))
    stream.synchronize()
    assert_same_bits(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device():
    """Whichever device is the current one."""
    want = gradients(route, *logits(50, 64, "cuda:0"))
    got = gradients(route, *logits(50, 64, "cuda:1"))
    assert all(part.device == torch.device("cuda:1") for part in got)
    assert_same_bits([part.cpu() for part in got], [part.cpu() for part in want])
