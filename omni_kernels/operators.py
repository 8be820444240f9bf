"""A router as PyTorch's autograd, compilers and transforms see it; router.py makes one for each function people call.

In eager mode a `Router` calls its kernels itself, or through one autograd function. While something traces or
transforms, it is an operator of torch.library, which torch.compile, torch.export, fake tensors, torch.func and
forward-mode derivatives take as they take PyTorch's own.

Once the experts are chosen a router is linear: a score is the sum of two logits. So the tangent of a score is the sum
of two tangents, and the gradient of a logit is the sum of the gradients of the scores it is in. `Pairs` gives the
sums of experts that were chosen before, with the same derivatives.
"""

import re

import torch
from torch import _C, SymInt, Tensor
from torch import _check as check_at_run_time
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter
from torch.utils._device import DeviceContext

from . import reference
from .configs import has_kernels


class Router:
    """A forward kernel and a backward kernel as one function, (x, y, k, scores_dtype) -> (scores, indices).

    name: of its operators. forward_kernel(x, y, k, scores_dtype, out) -> scores, indices, and
    backward_kernel(grad_scores, indices, num_expert_sqrt, dtype, out) -> grad_x, grad_y: both take tensors that are not
    empty. They may write to `out`, two matrices as they make them themselves, if it is given. PyTorch stands in for
    them where Triton does not run. Calls take checked arguments, and what `is_plain` says.
    """

    def __init__(self, name, forward_kernel, backward_kernel):
        self.forward_kernel, self.backward_kernel = forward_kernel, backward_kernel
        logits = "Tensor router_logits_x, Tensor router_logits_y, SymInt num_experts_per_token, ScalarType scores_dtype"
        grads = "Tensor grad_scores, Tensor indices, SymInt num_expert_sqrt, ScalarType dtype"
        self.operator = _register(name, logits, self.route, _empty_result, _Route, self)
        self.backward_operator = _register(f"{name}_backward", grads, self.sum_up, _empty_gradients, _Sums, self)

    def __call__(self, x, y, k, scores_dtype, plain):
        if not plain:
            return self.trace(x, y, k, scores_dtype)
        if (x.requires_grad or y.requires_grad) and torch.is_grad_enabled():
            return _apply_eagerly(x, y, k, scores_dtype, self)
        return self.route(x, y, k, scores_dtype)

    def trace(self, x, y, k, scores_dtype):
        """The call as an operator."""
        return self.operator(_of_this_level(x), y, k, scores_dtype)

    def route(self, x, y, k, scores_dtype, out=None):
        if not (k and x.numel()):
            return _empty_result(x, y, k, scores_dtype)
        if has_kernels(x):
            return self.forward_kernel(x, y, k, scores_dtype, out)
        return reference.eager_router(x, y, k, scores_dtype)

    def sum_up(self, grad_scores, indices, num_expert_sqrt, dtype, out=None):
        if indices.numel() and has_kernels(grad_scores):
            return self.backward_kernel(grad_scores, indices, num_expert_sqrt, dtype, out)
        grads = reference.backward_router(grad_scores.float(), indices, num_expert_sqrt)
        return tuple(grad.to(dtype) for grad in grads)


class Pairs:
    """`reference.sums_of_pairs` as an operator, whose gradient a router's backward kernel sums up.

    name: of the operator. Calls take indices (num_tokens, k), int32, contiguous.
    """

    def __init__(self, name, router):
        self.operator = _register_pairs(name, router)

    def __call__(self, x, y, indices, origin_x=None, origin_y=None):
        return self.operator(_of_this_level(x), y, indices, origin_x, origin_y)


class Scores:
    """Normalized scores by kernels, (x, y, k, scores_dtype, normalize) -> (scores, indices) of the k best experts or of
    those chosen before.

    name: of the operators that stand for the kernels in compiled code. kernels: the module factored. Where they take no
    such size, and for those who transform or want more derivatives than one, router selects and
    `in_pytorch(x, y, indices, scores_dtype, normalize)` gives the scores. Calls take checked arguments, and what
    `is_plain` says.
    """

    def __init__(self, name, router, kernels, in_pytorch):
        self.router, self.kernels, self.in_pytorch = router, kernels, in_pytorch
        self.operator, self.backward_operator = _register_scores(name, self)

    def __call__(self, x, y, k, scores_dtype, normalize, plain, experts=None):
        if plain and len(x) and self.take(x, k):
            if (x.requires_grad or y.requires_grad) and torch.is_grad_enabled():
                return _apply_scores(x, y, experts, k, scores_dtype, normalize, self, self.run)[:2]
            return self.run(x, y, experts, k, scores_dtype, normalize, False)[:2]
        if is_compiling():
            return self.operator(_of_this_level(x), y, experts, k, scores_dtype, normalize, False)[:2]
        return self.compose(x, y, experts, k, scores_dtype, normalize, plain)

    def take(self, x, k):
        return has_kernels(x) and self.kernels.normalizes(x, k)

    def compose(self, x, y, experts, k, scores_dtype, normalize, plain):
        """Scores and indices in operators that have all derivatives."""
        if experts is None:
            _, experts = self.router(x.detach(), y.detach(), k, x.dtype, plain)
        return self.in_pytorch(x, y, experts, scores_dtype, normalize), experts

    def run(self, x, y, experts, k, scores_dtype, normalize, save):
        """Scores, indices (None of chosen experts), and if they are wanted the numbers that the gradient needs."""
        saved = self.kernels.room_to_save(x, k, normalize) if save or experts is not None else None
        if experts is not None:
            return self.kernels.replay_pairs(x, y, experts, scores_dtype, normalize, saved), None, saved
        return *self.kernels.factored_forward(x, y, k, scores_dtype, None, normalize, saved), saved

    def sum_up(self, grad_scores, indices, x, y, saved, normalize):
        return self.router.backward_kernel(grad_scores, indices, x.shape[1], x.dtype, None, normalize, (x, y), saved)


def _of_this_level(x):
    """Compiled with tangents, a copy: PyTorch compiles again where the level changes, but its cache of graphs does not
    ask for the level, so this must be another graph than the one without tangents."""
    return x.clone() if is_compiling() and forward_ad._current_level >= 0 else x


def is_plain(x, y):
    """Whether two tensors are ordinary ones and nothing traces or transforms: only then may kernels read them."""
    return (
        not is_compiling()  # torch.compile and torch.export; first, as they know no more of what follows
        and not _C._len_torch_dispatch_stack()  # modes: fake tensors, make_fx, counters, selective checkpoints
        and not _C._are_functorch_transforms_active()  # torch.func and vmap, also where these two are not batched
        and not _C._is_tracing()  # torch.jit.trace
        and forward_ad._current_level < 0  # either may have a tangent
        and (type(x) is Tensor or type(x) is Parameter)  # subclasses: fake, distributed, anybody's
        and (type(y) is Tensor or type(y) is Parameter)
        and not x.is_meta  # has no numbers
        and not (_C._len_torch_function_stack() and _sees_functions())
    )


def _sees_functions():
    """Whether a mode of __torch_function__ wants to see operators; that of a default device does not."""
    return any(type(mode) is not DeviceContext for mode in torch.overrides._get_current_function_mode_stack())


def is_distributed(*tensors):
    """Whether one of some arguments is a DTensor: told by an attribute, as to import the class takes half a second."""
    return any(hasattr(tensor, "device_mesh") for tensor in tensors)


def assume_same_tokens(x, other):
    """While tracing: token counts that only the data tells are checked when the program runs, all others by the checks
    of checks.py."""
    if x.ndim == other.ndim and (is_compiling() or SymInt in map(type, x.shape[:-1])):
        from torch.fx.experimental.symbolic_shapes import guard_or_false  # half a second that others need not wait

        for size, size_of_other in zip(x.shape[:-1], other.shape[:-1], strict=True):
            if not guard_or_false(size != size_of_other):
                # PyTorch 2.11 compiles no message that depends on anything.
                check_at_run_time(
                    size == size_of_other,
                    lambda: "router_logits_y must have the tokens of router_logits_x, and so must indices",
                )


def as_matrix(tensor):
    """Its leading dimensions, however many, as one of tokens."""
    if tensor.ndim == 2:
        return tensor
    return tensor.flatten(0, -2) if tensor.ndim > 2 else tensor[None]


def is_ordinary(x, y, k):
    """Whether, while compiling and without tangents, `check` lets pass what is usual. In as few names as can be: every
    name that the compiler meets, a compiled call looks up again, and those of `check` take a tenth of its time. (So the
    largest N stands here as a number, and shapes are not compared as a whole.)"""
    if not (k.__class__ is (0).__class__ and x.ndim == y.ndim == 2 and forward_ad._current_level < 0):
        return False
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # as above

    return (
        guard_or_false(x.shape[0] == y.shape[0])  # not where only the data tells
        and x.shape[1] == y.shape[1]
        and x.dtype is y.dtype
        and x.dtype.is_floating_point
        and x.dtype.itemsize in (2, 4)
        and not (x.is_sparse or x.is_sparse_csr or x.is_mkldnn or x.is_nested)
        and not (y.is_sparse or y.is_sparse_csr or y.is_mkldnn or y.is_nested)
        and x.__class__.__name__ != "DTensor" != y.__class__.__name__
        and x.device == y.device
        and 1 <= x.shape[1] <= 46340
        and 0 <= k <= x.shape[1] * x.shape[1]
    )


# Derivatives ---------------------------------------------------------------------------------------------------------


class _EagerRoute(torch.autograd.Function):
    """A call in eager mode."""

    @staticmethod
    def forward(ctx, x, y, k, scores_dtype, router):
        scores, indices = router.route(x, y, k, scores_dtype)
        ctx.save_for_backward(indices)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)  # else PyTorch fills a tensor of zeros for the indices
        ctx.rest = router, x.shape[1], x.dtype
        return scores, indices

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return None, None, None, None, None
        router, num_expert_sqrt, dtype = ctx.rest
        (indices,) = ctx.saved_tensors
        sum_up = router.backward_operator if _is_transformed(grad, indices) else router.sum_up
        grad_x, grad_y = sum_up(grad, indices, num_expert_sqrt, dtype)
        return grad_x, grad_y, None, None, None


def _is_transformed(grad, indices):
    """Whether kernels may not take a gradient: with create_graph it has a gradient itself, with is_grads_batched it is
    an older kind of batched tensor."""
    return torch.is_grad_enabled() or not is_plain(grad, indices) or _is_batched(grad)


_is_batched = _C._functorch.is_legacy_batchedtensor


class _Scores(torch.autograd.Function):
    """A call that normalizes, in eager mode or compiled: run, and what it gives, are as `Scores.run`."""

    @staticmethod
    def forward(ctx, x, y, experts, k, scores_dtype, normalize, kernels, run):
        scores, indices, saved = run(x, y, experts, k, scores_dtype, normalize, True)
        ctx.save_for_backward(x, y, indices if experts is None else experts, saved)
        ctx.mark_non_differentiable(*(part for part in (indices, saved) if part is not None))
        ctx.set_materialize_grads(False)
        ctx.rest = scores_dtype, normalize, kernels
        return scores, indices, saved

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 8
        x, y, indices, saved = ctx.saved_tensors
        scores_dtype, normalize, kernels = ctx.rest
        if torch.is_grad_enabled() or _C._are_functorch_transforms_active() or _is_batched(grad):
            wanted = [factor for factor in (x, y) if factor.requires_grad]
            with torch.enable_grad():
                scores = kernels.in_pytorch(x, y, indices, scores_dtype, normalize)
            found = iter(torch.autograd.grad(scores, wanted, grad, create_graph=torch.is_grad_enabled()))
            grads = [next(found) if factor.requires_grad else None for factor in (x, y)]
        else:
            sum_up = kernels.sum_up if is_plain(grad, indices) else kernels.backward_operator
            grads = sum_up(grad, indices, x, y, saved, normalize)
        return *grads, *(None,) * 6


class _Route(torch.autograd.Function):
    """The operator that routes."""

    @staticmethod
    def forward(ctx, x, y, k, scores_dtype, router, run):
        scores, indices = run(x, y, k, scores_dtype)
        ctx.save_for_backward(indices)
        ctx.save_for_forward(indices)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.rest = router, x.shape[1], x.dtype, scores_dtype
        return scores, indices

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 6
        router, num_expert_sqrt, dtype, _ = ctx.rest
        return *router.backward_operator(grad, ctx.saved_tensors[0], num_expert_sqrt, dtype), None, None, None, None

    @staticmethod
    def jvp(ctx, tangent_x, tangent_y, *_):
        _, num_expert_sqrt, _, scores_dtype = ctx.rest
        return _sums_of_pairs(tangent_x, tangent_y, ctx.saved_tensors[0], num_expert_sqrt, scores_dtype), None


class _Sums(torch.autograd.Function):
    """The operator that sums up gradients. It is linear, and its gradient is the route's tangent."""

    @staticmethod
    def forward(ctx, grad, indices, num_expert_sqrt, dtype, router, run):
        ctx.save_for_backward(indices)
        ctx.save_for_forward(indices)
        ctx.set_materialize_grads(False)
        ctx.rest = router, num_expert_sqrt, dtype, grad.dtype
        return run(grad, indices, num_expert_sqrt, dtype)

    @staticmethod
    def backward(ctx, grad_x, grad_y):
        if grad_x is None and grad_y is None:
            return (None,) * 6
        _, num_expert_sqrt, _, dtype = ctx.rest
        return _sums_of_pairs(grad_x, grad_y, ctx.saved_tensors[0], num_expert_sqrt, dtype), *(None,) * 5

    @staticmethod
    def jvp(ctx, tangent, *_):
        router, num_expert_sqrt, dtype, _ = ctx.rest
        return router.backward_operator(tangent, ctx.saved_tensors[0], num_expert_sqrt, dtype)


class _SumsOfPairs(torch.autograd.Function):
    """The operator that sums the pairs of experts chosen before. Of its five tensors x and y alone have derivatives."""

    @staticmethod
    def forward(ctx, x, y, indices, origin_x, origin_y, router, run):
        ctx.save_for_backward(indices)
        ctx.save_for_forward(indices)
        ctx.set_materialize_grads(False)
        ctx.rest = router, x.shape[1], x.dtype
        return run(x, y, indices, origin_x, origin_y)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 7
        router, num_expert_sqrt, dtype = ctx.rest
        grads = router.backward_operator(grad.float(), ctx.saved_tensors[0], num_expert_sqrt, dtype)
        return *grads, None, None, None, None, None

    @staticmethod
    def jvp(ctx, tangent_x, tangent_y, *_):
        return _sums_of_pairs(tangent_x, tangent_y, ctx.saved_tensors[0], ctx.rest[1], torch.float64)


def _sums_of_pairs(x, y, experts, num_expert_sqrt, dtype):
    """x of every expert's row + y of its column, in fp32, rounded once; None stands for zeros."""
    experts = experts.long()
    places = (x, experts // num_expert_sqrt), (y, experts % num_expert_sqrt)
    parts = [factor.float().gather(1, place) for factor, place in places if factor is not None]
    return sum(parts[1:], parts[0]).to(dtype)


# Function.apply would look up and unwrap things that nobody has here, for half the time of a call, and would not take
# an operator of one level of torch.func's transforms.
_apply_eagerly = super(torch.autograd.Function, _EagerRoute).apply
_apply_scores = super(torch.autograd.Function, _Scores).apply


# The operators -------------------------------------------------------------------------------------------------------


def _register(name, arguments, run, fake, function, router):
    """An operator (Tensor, Tensor, int, dtype) -> (Tensor, Tensor) that works on the tokens one by one.

    Traced, it leaves its kernel alone in the graph: an operator without derivatives, which writes to matrices that the
    graph makes. That costs a third of the time a call, since nobody asks what came back for its strides and alignment.
    """
    operator = define(name, f"({arguments}) -> (Tensor, Tensor)", run, fake)
    tensors = ", ".join(arguments.split(", ")[:2])

    def write(first, second, *matrices):
        one, other = matrices
        as_new = one.is_contiguous() and other.is_contiguous() and not (one.data_ptr() | other.data_ptr()) % 16
        results = run(first, second, one.shape[1], one.dtype, matrices if as_new else None)
        if results is not matrices:
            one.copy_(results[0])
            other.copy_(results[1])

    schema = f"({tensors}, Tensor(a!) result, Tensor(b!) result_2) -> ()"
    kernel = define(f"{name}_kernel", schema, write, lambda *_: None)

    def leave_kernel(*args):
        matrices = fake(*args)
        kernel(*args[:2], *matrices)
        return matrices

    def batch(info, in_dims, first, second, size, dtype):
        tensors, shape = _fold_into_tokens(info, in_dims, first, second)
        return tuple(part.unflatten(0, shape) for part in operator(*tensors, size, dtype)), (0, 0)

    _differentiate(name, operator, function, router, leave_kernel)
    torch.library.register_vmap(operator, batch, lib=_LIBRARY)
    return operator


def _register_pairs(name, router):
    """The operator of `reference.sums_of_pairs`. Traced, it leaves PyTorch's operators, which compilers fuse."""
    tensors = "Tensor x, Tensor y, Tensor indices, Tensor? origin_x, Tensor? origin_y"

    def fake(x, y, indices, *_):
        return x.new_empty(indices.shape, dtype=torch.float64)

    def batch(info, in_dims, *tensors):
        tensors, shape = _fold_into_tokens(info, in_dims, *tensors)
        return operator(*tensors).unflatten(0, shape), 0

    operator = define(name, f"({tensors}) -> Tensor", reference.sums_of_pairs, fake)
    _differentiate(name, operator, _SumsOfPairs, router, reference.sums_of_pairs)
    torch.library.register_vmap(operator, batch, lib=_LIBRARY)
    return operator


def _register_scores(name, kernels):
    """The operators of normalized scores and of their gradient. Transforms, tangents and sizes without a kernel get
    PyTorch's operators instead."""
    room = kernels.kernels.room_to_save

    def whole(scores, indices, saved):
        """As operators return it: empty tensors where there is nothing, or what the caller has."""
        indices = scores.new_empty(0, dtype=torch.int32) if indices is None else indices
        return scores, indices, scores.new_empty(0, dtype=torch.float32) if saved is None else saved

    def compose(x, y, experts, *rest):
        scores, indices = kernels.compose(x, y, experts, *rest)
        return whole(scores, indices if experts is None else None, None)

    def fake(x, y, experts, k, scores_dtype, normalize, save):
        scores, indices = _empty_result(x, y, k, scores_dtype)
        return whole(scores, None if experts is not None else indices, room(x, k, normalize) if save else None)

    def run(x, y, experts, k, scores_dtype, normalize, save):
        if x.shape[0] and kernels.take(x, k):
            scores, indices, saved = kernels.run(x, y, experts, k, scores_dtype, normalize, save)
            return whole(scores, indices, saved if save else None)
        return compose(x, y, experts, k, scores_dtype, normalize, True)

    def fake_gradients(_, __, x, y, *rest):
        return x.new_empty(x.shape), y.new_empty(y.shape)

    def sum_up(grad_scores, indices, x, y, saved, normalize):
        sum_up = kernels.sum_up if x.shape[0] else fake_gradients
        return sum_up(grad_scores, indices, x, y, saved, normalize)

    def differentiate(keys, x, y, experts, k, scores_dtype, normalize, save):
        if _C._are_functorch_transforms_active() or _tangents_come(x, y) or not kernels.take(x, k):
            return compose(x, y, experts, k, scores_dtype, normalize, False)

        def run_below(*args):
            with _C._AutoDispatchBelowAutograd():
                return operator.redispatch(keys & _C._after_autograd_keyset, *args)

        if (x.requires_grad or y.requires_grad) and torch.is_grad_enabled():
            return _apply_scores(x, y, experts, k, scores_dtype, normalize, kernels, run_below)
        return run_below(x, y, experts, k, scores_dtype, normalize, save)

    def batch(info, in_dims, x, y, experts, *rest):
        tensors, shape = _fold_into_tokens(info, in_dims, x, y, experts)
        scores, indices, saved = operator(*tensors, *rest)
        indices, dim = (indices.unflatten(0, shape), 0) if experts is None else (indices, None)
        return (scores.unflatten(0, shape), indices, saved), (0, dim, None)

    chosen = "Tensor x, Tensor y, Tensor? experts, SymInt k, ScalarType scores_dtype, str normalize, bool save"
    grads = "Tensor grad_scores, Tensor indices, Tensor x, Tensor y, Tensor saved, str normalize"
    operator = define(name, f"({chosen}) -> (Tensor, Tensor, Tensor)", run, fake)
    _LIBRARY.impl(name, differentiate, "Autograd", with_keyset=True)
    torch.library.register_vmap(operator, batch, lib=_LIBRARY)
    return operator, define(f"{name}_backward", f"({grads}) -> (Tensor, Tensor)", sum_up, fake_gradients)


def _differentiate(name, operator, function, router, trace):
    """Gives an operator the derivatives of an autograd function. A graph into which no tangents will come gets, below
    them, what `trace` leaves there."""
    apply = super(torch.autograd.Function, function).apply

    def differentiate(keys, *args):
        """The operator at one level of torch.func's transforms, or without any: below it are the others."""
        modes = torch.is_grad_enabled(), _C._is_fwd_grad_enabled()

        def run_below(*args):
            with (
                _C._AutoDispatchBelowAutograd(),
                torch.set_grad_enabled(modes[0]),  # off in here, but another level's gradients may be wanted
                forward_ad._set_fwd_grad_enabled(modes[1]),
            ):
                if _C._are_functorch_transforms_active() or not _is_traced():
                    return operator.redispatch(keys & _C._after_autograd_keyset, *args)
                return trace(*args)

        with enable_single_level_autograd_function():
            return apply(*args, router, run_below)

    _LIBRARY.impl(name, differentiate, "Autograd", with_keyset=True)


def _fold_into_tokens(info, in_dims, *tensors):
    """Tensors of a batch (or none) as those of its tokens, and the shape of these in the batch."""
    folded = []
    for tensor, dim in zip(tensors, in_dims, strict=False):
        if tensor is not None:
            tensor = tensor.movedim(dim, 0) if dim is not None else tensor.expand(info.batch_size, *tensor.shape)
            shape, tensor = tensor.shape[:2], tensor.flatten(0, 1)
            if not tensor.is_floating_point():
                tensor = tensor.contiguous()  # the backward kernel takes no strides of indices
        folded.append(tensor)
    return folded, shape


def _is_traced():
    """Whether a graph is traced into which no tangents will come."""
    return _C._get_dispatch_mode(_C._TorchDispatchModeKey.PROXY) is not None and forward_ad._current_level < 0


def _tangents_come(*tensors):
    """Whether tensors have tangents or may have some later. (A level that a graph opens has no number here.)"""
    return forward_ad._current_level >= 0 or any(
        torch._VF._unpack_dual(tensor, level=0).tangent is not None for tensor in tensors
    )


def define(name, schema, run, fake):
    """An operator without derivatives, for any device."""
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    operator = getattr(getattr(torch.ops, _LIBRARY.ns), name).default
    torch.library.register_fake(operator, fake, lib=_LIBRARY)
    return operator


def _empty_result(x, _, k, scores_dtype):
    scores = x.new_empty((x.shape[0], k), dtype=scores_dtype)
    return scores, torch.empty_like(scores, dtype=torch.int32)


def _empty_gradients(grad_scores, _, num_expert_sqrt, dtype):
    return tuple(grad_scores.new_empty((grad_scores.shape[0], num_expert_sqrt), dtype=dtype) for _ in range(2))


def _new_library():
    """A namespace of the package's own name, whatever it is called; another if it has been imported before."""
    namespace = re.sub(r"\W", "_", __package__, flags=re.ASCII)
    namespace = namespace if namespace[0].isalpha() else f"omni_{namespace}"
    while hasattr(getattr(torch.ops, namespace), "omni_router"):
        namespace += "_"
    return torch.library.Library(namespace, "FRAGMENT")


_LIBRARY = _new_library()
