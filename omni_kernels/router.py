"""The functions people call: checks, dispatch to a kernel or to PyTorch, autograd, and PyTorch's operator registry.

`omni_router` and its gradient are operators of torch.library, so torch.compile, torch.export, fake tensors and vmap see
them whole. The two older functions are plain autograd functions.
"""

import re

import torch
from torch.autograd.forward_ad import unpack_dual

from . import backward, factored, forward, original, reference, split_forward
from .checks import check, check_expert_sqrt, check_scores_dtype
from .configs import has_kernels


def omni_router(router_logits_x, router_logits_y, num_experts_per_token, scores_dtype=None):
    """Select the k best of N² experts for every token, exactly, by the fastest path for the shape and device.

    Expert i * N + j scores x[t, i] + y[t, j], summed in fp32. Equal scores put the lower index first. `-inf` masks a
    row or a column of experts: such pairs come last. A token with NaN or +inf among its logits has NaN or +inf among
    its scores and valid indices.

    An operator of torch.library: torch.compile(fullgraph=True), torch.export, CUDA graphs and torch.vmap (which folds
    its dimension into the tokens) take it as it is. Autocast leaves it alone: it routes in the dtype it is given.

    Args:
        router_logits_x: (num_tokens, N), fp32, fp16 or bf16, any strides, on a GPU or the CPU; N from 1 to 46340.
        router_logits_y: the same shape, dtype and device.
        num_experts_per_token: k, from 0 to N². Kernels route up to 256 on NVIDIA GPUs (from Ampere on) and up to
            64 elsewhere, PyTorch what is beyond.
        scores_dtype: of the scores, fp32, fp16 or bf16; the logits' unless given. fp32 keeps the sums of 16-bit logits
            as they are, and the gradients that come back for them too, until the sums of those are rounded once.

    Returns:
        scores: (num_tokens, k), best first, rounded once to their dtype. Differentiable: the gradient of a pair goes to
            its row of x and its column of y, accumulated in fp32, returned in the logits' dtype. It is linear, so a
            second derivative with respect to the logits is zero; one with respect to the incoming gradient is a gather.
        indices: (num_tokens, k), int32, distinct within a token.

    Raises:
        TypeError: a logits argument is no dense floating point tensor, num_experts_per_token no integer, or
            scores_dtype none of the three.
        ValueError: shapes, dtypes or devices differ, or a size is out of range.
        NotImplementedError: forward-mode derivatives are asked for (torch.func.jvp), which PyTorch's operators lack.
    """
    check(router_logits_x, router_logits_y, num_experts_per_token)
    if not torch.compiler.is_compiling():
        _check_no_tangents(router_logits_x, router_logits_y)
    check_scores_dtype(scores_dtype)
    return _ROUTE(router_logits_x, router_logits_y, num_experts_per_token, scores_dtype or router_logits_x.dtype)


def triton_omni_router_func(router_logits_x, router_logits_y, num_expert_sqrt, num_experts_per_token):
    """The original version, the baseline: from all N² sums, with gradients by atomics.

    Args:
        router_logits_x, router_logits_y: as for `omni_router`.
        num_expert_sqrt: N, the number of their columns.
        num_experts_per_token: k, from 0 to N². From N = original.SPLIT_FROM on, more than
            original.MAX_SPLIT_EXPERTS_PER_TOKEN are routed by PyTorch.

    Returns:
        scores, indices: as for `omni_router`.

    Raises:
        TypeError, ValueError: as for `omni_router`, and for a num_expert_sqrt that is no integer or not the logits' N.
    """
    check(router_logits_x, router_logits_y, num_experts_per_token)
    check_expert_sqrt(num_expert_sqrt, router_logits_x)
    route, route_backward = original.original_forward, original.original_backward
    return _PlainRoute.apply(router_logits_x, router_logits_y, num_experts_per_token, route, route_backward)


def triton_omni_router_func_optimized(router_logits_x, router_logits_y, num_expert_sqrt, num_experts_per_token):
    """The guide's optimized version: from all N² sums, in one tile or streamed, with gradients free of atomics.

    Args:
        router_logits_x, router_logits_y: as for `omni_router`.
        num_expert_sqrt: N, the number of their columns.
        num_experts_per_token: k, from 0 to N². Above N = forward.MAX_EXPERT_SQRT, more than
            split_forward.MAX_EXPERTS_PER_TOKEN are routed by PyTorch.

    Returns:
        scores, indices: as for `omni_router`.

    Raises:
        TypeError, ValueError: as for `omni_router`, and for a num_expert_sqrt that is no integer or not the logits' N.
    """
    check(router_logits_x, router_logits_y, num_experts_per_token)
    check_expert_sqrt(num_expert_sqrt, router_logits_x)
    if num_expert_sqrt <= forward.MAX_EXPERT_SQRT:
        route = forward.forward
    elif num_experts_per_token <= split_forward.MAX_EXPERTS_PER_TOKEN:
        route = split_forward.split_forward
    else:
        route = reference.factored_router
    return _PlainRoute.apply(router_logits_x, router_logits_y, num_experts_per_token, route, backward.backward)


class _PlainRoute(torch.autograd.Function):
    """Ties a forward function to a backward one, which needs the indices alone; PyTorch stands in without kernels."""

    @staticmethod
    def forward(ctx, x, y, k, route, route_backward):
        if len(x) and k:
            scores, indices = (route if has_kernels(x) else reference.factored_router)(x, y, k)
        else:
            scores, indices = _empty_result(x, y, k, x.dtype)
        ctx.save_for_backward(indices)
        ctx.num_expert_sqrt, ctx.route_backward = x.shape[1], route_backward
        ctx.mark_non_differentiable(indices)
        return scores, indices

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_scores, _):
        (indices,) = ctx.saved_tensors
        run = ctx.route_backward if has_kernels(grad_scores) and len(indices) else reference.backward_router
        return *run(grad_scores, indices, ctx.num_expert_sqrt), None, None, None


# The operators -------------------------------------------------------------------------------------------------------


def _route(x, y, k, scores_dtype):
    if not (len(x) and k):
        return _empty_result(x, y, k, scores_dtype)
    route = factored.factored_forward if has_kernels(x) else reference.factored_router
    return route(x, y, k, scores_dtype)


def _empty_result(x, _, k, scores_dtype):
    scores = x.new_empty((x.shape[0], k), dtype=scores_dtype)
    return scores, torch.empty_like(scores, dtype=torch.int32)


def _save_route(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.num_expert_sqrt, ctx.dtype = inputs[0].shape[1], inputs[0].dtype


def _differentiate_route(ctx, grad_scores, _):
    return *_ROUTE_BACKWARD(grad_scores, ctx.saved_tensors[0], ctx.num_expert_sqrt, ctx.dtype), None, None


def _route_backward(grad_scores, indices, num_expert_sqrt, dtype):
    if has_kernels(grad_scores) and indices.numel():
        return backward.backward(grad_scores, indices, num_expert_sqrt, dtype)
    grads = reference.backward_router(grad_scores.float(), indices, num_expert_sqrt)
    return tuple(grad.to(dtype) for grad in grads)


def _empty_gradients(grad_scores, _, num_expert_sqrt, dtype):
    return tuple(grad_scores.new_empty((grad_scores.shape[0], num_expert_sqrt), dtype=dtype) for _ in range(2))


def _save_backward(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.num_expert_sqrt, ctx.dtype = inputs[2], inputs[0].dtype


def _differentiate_backward(ctx, grad_of_x, grad_of_y):
    """Every slot had been added to one number of each gradient, so what comes back to it is the sum of those two."""
    experts = ctx.saved_tensors[0].long()
    rows, columns = experts // ctx.num_expert_sqrt, experts % ctx.num_expert_sqrt
    grad = grad_of_x.float().gather(1, rows) + grad_of_y.float().gather(1, columns)
    return grad.to(ctx.dtype), None, None, None


def _register(name, arguments, run, fake, save, differentiate):
    """An operator (Tensor, Tensor, int, dtype) -> (Tensor, Tensor) that works on the tokens one by one."""
    schema = f"{name}({arguments}) -> (Tensor, Tensor)"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    full_name = f"{_LIBRARY.ns}::{name}"
    torch.library.register_fake(full_name, fake, lib=_LIBRARY)
    torch.library.register_autograd(full_name, differentiate, setup_context=save, lib=_LIBRARY)
    operator = getattr(getattr(torch.ops, _LIBRARY.ns), name).default

    def fold_into_tokens(info, in_dims, first, second, size, dtype):
        tensors = []
        for tensor, dim in zip((first, second), in_dims, strict=False):
            tensor = tensor.movedim(dim, 0) if dim is not None else tensor.expand(info.batch_size, *tensor.shape)
            tensors.append(tensor)
        results = operator(*(tensor.flatten(0, 1) for tensor in tensors), size, dtype)
        return tuple(part.unflatten(0, tensors[0].shape[:2]) for part in results), (0, 0)

    torch.library.register_vmap(full_name, fold_into_tokens, lib=_LIBRARY)
    return operator


def _new_library():
    """A namespace of the package's own name, whatever it is called; another if it has been imported before."""
    namespace = re.sub(r"\W", "_", __package__, flags=re.ASCII)
    namespace = namespace if namespace[0].isalpha() else f"omni_{namespace}"
    while hasattr(getattr(torch.ops, namespace), "omni_router"):
        namespace += "_"
    return torch.library.Library(namespace, "FRAGMENT")


def _check_no_tangents(*tensors):
    """PyTorch would drop them without a word."""
    if any(unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError("omni_router has no forward-mode derivative; use reverse mode (backward, grad)")


_LIBRARY = _new_library()
_ROUTE = _register(
    "omni_router",
    "Tensor router_logits_x, Tensor router_logits_y, SymInt num_experts_per_token, ScalarType scores_dtype",
    _route,
    _empty_result,
    _save_route,
    _differentiate_route,
)
_ROUTE_BACKWARD = _register(
    "omni_router_backward",
    "Tensor grad_scores, Tensor indices, SymInt num_expert_sqrt, ScalarType dtype",
    _route_backward,
    _empty_gradients,
    _save_backward,
    _differentiate_backward,
)
